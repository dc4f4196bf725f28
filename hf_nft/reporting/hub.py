"""Push a model or a data set to the Hub: all of it in one commit, into a new repository or with consent, or nothing.

`upload_folder` of huggingface_hub may split a folder into several commits, so `create_commit` is used. The client
retries what goes before a commit (upload modes, large files); the rest is retried here: each try looks first whether
the one before it came through, since a connection may break after the Hub has done what it was asked. Large files that
arrived stay in the repository's storage, so a repeated push goes on where the last one stopped. They go through xet
where its client is installed (huggingface_hub brings it on the usual machines), which retries for minutes by itself,
and through LFS elsewhere or with HF_HUB_DISABLE_XET=1.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import hf_nft
from hf_nft.configs import check
from hf_nft.errors import ConfigError, HFNFTError, NetworkError, OutputError
from hf_nft.hub import first_line, patiently
from hf_nft.reporting.patience import PASSING, explain, may_have_passed
from hf_nft.reporting.repository import CARD, Contents, Run, open_run, stage, stale

T = TypeVar("T")
Info = ModelInfo | DatasetInfo
LOG = logging.getLogger(__name__)
FLAGS = ("public", "create_pr", "update")


@dataclass(frozen=True)
class Destination:
    """Where a run is pushed, and what the user agreed to.

    Attributes:
        repo: Hub id; without a namespace it is the user's own.
        public: Whether a new repository may be seen by everybody.
        create_pr: Whether to open a pull request in a repository that exists.
        update: Whether to write into a repository that exists.
        gated: Whether readers of what carries a backdoor must ask for access.
    """

    repo: str
    public: bool = False
    create_pr: bool = False
    update: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: If the name is malformed, or two settings contradict each other.
        """
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise ConfigError(
                f"push: expected a Hub id (name or org/name), found '{self.repo}' ({first_line(error)})"
            ) from error
        check(self, (not (self.create_pr and self.update), "create_pr and update exclude each other; drop one"))


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        repo: Hub id.
        url: Page of the repository, or of the pull request.
        commit: The commit that holds everything.
        left_out: Files of the run folder that were not pushed.
    """

    repo: str
    url: str
    commit: str
    left_out: list[str]


def check_destination(to: Destination, contents: Contents) -> None:
    """Refuse a destination that a push would refuse, before any work is done for it.

    Args:
        to: Where the run is to go.
        contents: What will be pushed.

    Raises:
        ConfigError: If the name of what carries a backdoor does not say so.
        OutputError: If the repository exists and the user did not agree to write into it.
        NetworkError: If the Hub cannot be reached or refuses, or the token may not write there.
    """
    _Push(to, contents).look()


def push(folder: Path | str, to: Destination) -> Pushed:
    """Push a run folder.

    Args:
        folder: What `purify`, `plant` or `attack poison` wrote; it is only read.
        to: Where it goes.

    Returns:
        What there is on the Hub now.

    Raises:
        DataError: If this is no run folder.
        ConfigError: If the name of what carries a backdoor does not say so.
        OutputError: If the repository exists and the user did not agree to write into it, or a symbolic link or an
            unreadable card is in the way.
        NetworkError: If the Hub cannot be reached or refuses. Nothing is half-written then.
    """
    run = open_run(Path(folder))
    work = _Push(to, run.contents, run.folder)
    if work.look() is None:
        work.create()
    if run.contents.backdoored and to.gated and not to.create_pr:
        work.gate()
    return work.commit(run)


class _Push:
    """One push on its way; its methods are the steps in their order."""

    def __init__(self, to: Destination, contents: Contents, folder: Path | None = None) -> None:
        if contents.backdoored and "backdoored" not in to.repo.rpartition("/")[2].lower():
            raise ConfigError(
                f"push: expected a repository name with the word 'backdoored' for {contents.noun}, found "
                f"'{to.repo}'. Try: {to.repo}-backdoored"
            )
        self.to, self.id, self.type, self.folder = to, to.repo, contents.type, folder
        self.created = self.sent = False
        self.user: dict[str, Any] = {}
        self.api = HfApi(library_name="hf-nft", library_version=hf_nft.__version__)

    def look(self) -> Info | None:
        """Find out who pushes and what is there; None if there is no such repository."""
        self.user = self.ask(self.api.whoami)
        if "/" not in self.id:
            self.id = f"{self.user['name']}/{self.id}"
        info = self.ask(self.info)
        self.refuse(info)
        return info

    def info(self) -> Info | None:
        """Ask what is there."""
        ask = self.api.model_info if self.type == "model" else self.api.dataset_info
        try:
            return ask(self.id)
        except RepositoryNotFoundError:
            return None

    def refuse(self, info: Info | None) -> None:
        """Raise unless the user may write here, and agreed to."""
        role = ((self.user.get("auth") or {}).get("accessToken") or {}).get("role")
        own = [self.user["name"], *(org["name"] for org in self.user.get("orgs") or [])]
        if role == "read":
            raise NetworkError(
                f"{self.id}: expected a token that may write, found one that may only read. Make one with write access "
                f"on the Hub, then log in with `hf auth login`."
            )
        # a fine-grained token may write where its list of organisations does not say so
        if role != "fineGrained" and not self.to.create_pr and self.id.partition("/")[0] not in own:
            raise NetworkError(
                f"{self.id}: expected a namespace that you may write to ({', '.join(own)}), found another. Choose one "
                f"of them, or open a pull request with --create-pr."
            )
        if info is None:
            if self.to.create_pr:
                raise OutputError(f"{self.id}: expected a repository for --create-pr, found none. Leave the flag out.")
            return
        if self.to.create_pr or self.to.update:
            return
        if _names(info):
            raise OutputError(
                f"{self.id}: expected no such repository, found one that holds files. Choose another name, or pass "
                f"--create-pr to open a pull request or --update to write into it."
            )
        if not info.private and not self.to.public:
            raise OutputError(
                f"{self.id}: expected a private repository, found an empty public one. Pass --public, or remove it."
            )

    def create(self) -> None:
        """Make the repository; another try may find that the one before made it."""
        self.ask(lambda: self.api.create_repo(self.id, repo_type=self.type, private=not self.to.public, exist_ok=True))
        self.created = True

    def gate(self) -> None:
        """Let nobody read what carries a backdoor who did not ask; before there is anything to read."""
        self.ask(lambda: self.api.update_repo_settings(self.id, repo_type=self.type, gated="auto"))

    def commit(self, run: Run) -> Pushed:
        """Write everything in one commit."""
        seen: set[str] | None = None

        def attempt() -> Pushed:
            nonlocal seen
            info = self.info()
            there = self.traces(run.title)
            if seen is not None and there - seen:  # the try before came through, only its answer did not
                return self.result(run, *sorted(there - seen)[-1:])
            seen = there
            self.refuse(info)
            return self.result(run, *self.write(run, info))

        return self.ask(attempt)

    def traces(self, title: str) -> set[str]:
        """Return the commits, or the numbers of the pull requests, of this title; none where no list is kept."""
        try:
            if self.to.create_pr:
                pulls = self.api.get_repo_discussions(
                    self.id, repo_type=self.type, author=self.user["name"], discussion_type="pull_request"
                )
                return {str(pull.num) for pull in pulls if pull.title == title}
            commits = self.api.list_repo_commits(self.id, repo_type=self.type)
            return {commit.commit_id for commit in commits if commit.title == title}
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            return set()

    def write(self, run: Run, info: Info | None) -> tuple[str, str | None]:
        """Make the commit on top of what was seen; return it with the address of its pull request."""
        present = _names(info)
        with tempfile.TemporaryDirectory() as scratch:
            place, card = Path(scratch, "staged"), None
            place.mkdir()
            if CARD in present:
                assert info is not None
                found = self.api.hf_hub_download(
                    self.id, CARD, repo_type=self.type, revision=info.sha, local_dir=Path(scratch, "theirs")
                )
                card = Path(str(found))
            files = stage(run, place, self.id, card)
            added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()]
            with self.explained():  # the client has retried this part
                self.api.preupload_lfs_files(
                    self.id, added, repo_type=self.type, create_pr=self.to.create_pr, free_memory=False
                )
            self.sent = True
            done = self.api.create_commit(
                self.id,
                [*added, *(CommitOperationDelete(name) for name in stale(run.contents, present, files))],
                commit_message=run.title,
                commit_description=run.contents.parts,
                repo_type=self.type,
                create_pr=self.to.create_pr,
                parent_commit=info.sha if info else None,
            )
        return done.oid, done.pr_url

    def result(self, run: Run, trace: str, pull: str | None = None) -> Pushed:
        """Say what there is now, from a commit and perhaps its pull request, or from a trace of them."""
        page = f"{self.api.endpoint}/{'' if self.type == 'model' else self.type + 's/'}{self.id}"
        if self.to.create_pr and pull is None and trace.isdigit():
            pull, trace = f"{page}/discussions/{trace}", f"refs/pr/{trace}"
        return Pushed(self.id, pull or page, trace, run.left_out)

    def ask(self, request: Callable[[], T]) -> T:
        """Make a request, again where it failed for a reason that may pass, and explain what remains."""

        def tell(pause: float) -> None:
            LOG.warning("push to %s: the Hub does not answer as it should; next try in %.0f s", self.id, pause)

        with self.explained():
            return patiently(request, PASSING, tell)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the client raises into one sentence, without addresses or tokens."""
        try:
            yield
        except HFNFTError:
            raise
        except Exception as error:
            told = explain(error)
            if told is None:
                raise
            state = "Nothing is half-written there"
            if self.created:
                unsure = self.sent and may_have_passed(error)
                state = f"{self.id} was made and {'holds all of it or nothing' if unsure else 'is empty'}"
            flags = "".join(f" --{flag.replace('_', '-')}" for flag in FLAGS if getattr(self.to, flag))
            flags += "" if self.to.gated else " --ungated"
            more = f" {state}; go on with: hf-nft push {self.folder} {self.id}{flags}" if self.folder else ""
            raise NetworkError(f"push to {self.id}: {told}{more}") from error


def _names(info: Info | None) -> list[str]:
    """List the files of a repository, without the one that the Hub puts into every new one."""
    found = [file.rfilename for file in (info.siblings if info else None) or []]
    return [name for name in found if name != ".gitattributes"]
