"""What lies under a model's name, listed and refused before any of it is loaded.

A Hub id is resolved to a commit first; every later request names that commit, so that a branch that moves meanwhile
changes nothing. File names, sizes and checksums come from the listing of that commit, and what was downloaded is held
against it.
"""

import glob
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_nft.errors import HFNFTError, NetworkError, OutputError, SuspectError, UnsafeModelError
from hf_nft.hub import answers, patiently, safe_name, split_reference

PLAIN_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
WEIGHTS, WEIGHT_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_TEXT = 200 * 2**20
"""Bytes of the largest file that is read as text (a tokenizer's vocabulary takes some 30 MB)."""
LARGEST_CONFIG = 10 * 2**20
"""Bytes of the largest JSON file that is parsed before anything is known about the model."""


@dataclass(frozen=True)
class Source:
    """The files of a model at one commit, or in a folder.

    Attributes:
        name: Hub id, or the folder as the user wrote it.
        revision: Commit on the Hub; None for a folder.
        files: Name -> bytes, of all files on the Hub, of the top level of a folder.
        digests: Name -> SHA-256 of the files that the Hub knows it of: the large ones.
        folder: Where the files lie; None on the Hub as long as nothing was fetched.
        complete: Whether there is nothing to fetch: a folder, or what an earlier download left.
        asked: Branch, tag or commit that the user named.
    """

    name: str
    revision: str | None
    files: dict[str, int] = field(repr=False)
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    complete: bool = False
    asked: str = "main"

    @property
    def top(self) -> list[str]:
        """Names of the files at the top level, sorted: nothing else is looked at."""
        return sorted(name for name in self.files if "/" not in name)

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter on a model that lies elsewhere."""
        return ADAPTER in self.files

    @property
    def pickles(self) -> list[str]:
        """Names of top-level files in a pickle format."""
        return [name for name in self.top if any(fnmatch(name, pattern) for pattern in PICKLES)]

    def plain_files(self, remote_code: bool) -> list[str]:
        """Names of the small files that a model needs besides its weights; its code only if that may run."""
        found = [name for name in self.top if any(fnmatch(name, pattern) for pattern in PLAIN_FILES)]
        return found + ([name for name in self.files if name.endswith(".py")] if remote_code else [])

    def fetch(self, names: Iterable[str]) -> "Source":
        """Download files of this commit, as far as they are not cached.

        Args:
            names: Names as listed.

        Returns:
            The same source with its folder.

        Raises:
            NetworkError: If the Hub refuses, cannot be reached, or sends other bytes than it lists.
            SuspectError: If a file is gone.
        """
        chosen = sorted(set(names))
        if self.complete or not chosen:
            return self
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for name in chosen]
        with answers("model", self.name, SuspectError):
            folder = Path(
                patiently(lambda: snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))
            )
        for name in chosen:
            self._check_download(folder / name, name)
        self._remember(folder)
        return replace(self, folder=folder)

    def _remember(self, folder: Path) -> None:
        """Note in the cache, as its owner does for branches and tags, which commit the name stood for."""
        if self.asked == self.revision:
            return
        note = folder.parents[1] / "refs" / self.asked
        with answers("model", self.name, SuspectError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(self.revision))

    def _check_download(self, file: Path, name: str) -> None:
        """Hold what arrived against what was listed."""
        size = file.stat().st_size if file.is_file() else -1
        wanted, found = f"{self.files[name]} bytes", f"{max(size, 0)} bytes"
        if wanted == found and name in self.digests:
            with file.open("rb") as stream:
                wanted, found = self.digests[name], hashlib.file_digest(stream, "sha256").hexdigest()
        if wanted != found:
            raise NetworkError(
                f"{self.name}/{name}: expected what the Hub lists ({wanted[:16]}), found a file of {found[:16]}. "
                f"Delete {file.resolve()} and try again."
            )

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the fetched JSON files.

        Args:
            name: Its name.

        Returns:
            The JSON object.

        Raises:
            SuspectError: If it is missing, too large, or no JSON object.
        """
        if self.folder is None or name not in self.files:
            inside = self.folder is not None and (self.folder / "model" / name).is_file()
            hint = f"Pass {self.name.rstrip('/')}/model" if inside else "Check the name"
            raise SuspectError(f"{self.name}: expected a model with {name}, found none. {hint}.")
        return read_object(self.folder / name)


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a stranger's file.

    Args:
        file: The file.

    Returns:
        The object.

    Raises:
        SuspectError: If it is larger than `LARGEST_CONFIG`, or no JSON object.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise SuspectError(f"{file}: expected at most {LARGEST_CONFIG} bytes, found {file.stat().st_size}.")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SuspectError):
            raise
        raise SuspectError(f"{file}: expected JSON, found {str(error)[:100]}.") from error
    if not isinstance(content, dict):
        raise SuspectError(f"{file}: expected an object, found {type(content).__name__}.")
    return content


def _local(name: str, folder: Path, revision: str | None = None) -> Source:
    try:
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    except OSError as error:
        raise OutputError(f"{folder}: expected a folder that can be read, found: {error.strerror}.") from error
    return _checked(Source(name, revision, files, folder=folder, complete=True))


def locate(reference: str, revision: str | None = None, on_hub: bool = False) -> Source:
    """List a model's files; nothing is downloaded, only asked for.

    Args:
        reference: A folder, or a Hub id, which `@REVISION` may follow.
        revision: Branch, tag or commit on the Hub; default the main branch.
        on_hub: Whether no folder will do: for names that do not come from the user.

    Returns:
        The files at the commit that the revision stands for now.

    Raises:
        SuspectError: If there is no such model, it is empty, a file is absurdly large, or a folder is to have a
            revision.
        UnsafeModelError: If a file name is not safe to write.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir() and not on_hub:
        if revision is not None:
            raise SuspectError(
                f"model '{reference}': expected a Hub id for revision '{revision}', found a folder, which has none. "
                f"Leave the revision out."
            )
        return _local(reference, folder)
    if reference.startswith(("runs/", ".", "/", "~")):  # `runs/victim` looks like a Hub id, but is where we write
        raise SuspectError(f"model '{reference}': expected a folder or a Hub id, found neither. Check the path.")
    name, wanted = split_reference("model", reference, revision, SuspectError)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    with answers("model", name, SuspectError):
        try:
            api = HfApi(library_name="hf-nft")
            info = patiently(lambda: api.model_info(name, revision=wanted, files_metadata=True, timeout=30))
            listed: list[Any] = info.siblings or []
            if any(file.size is None for file in listed):  # mirrors of the Hub may list names alone
                tree = patiently(lambda: list(api.list_repo_tree(name, recursive=True, revision=info.sha)))
                listed = [entry for entry in tree if isinstance(entry, RepoFile)]
        except OfflineModeIsEnabled:
            cached = _cached(name, wanted)
            if cached is None:
                raise
            return cached
    files = {file.rfilename: file.size for file in listed}
    digests = {file.rfilename: file.lfs.sha256 for file in listed if file.lfs is not None}
    return _checked(Source(name, info.sha, files, digests, asked=wanted or "main"))


def _cached(name: str, revision: str | None) -> Source | None:
    """What an earlier download left, for work without a network; the folder is named after the commit."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", ADAPTER):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return _local(name, Path(found).parent, Path(found).parent.name)
    return None


def _checked(source: Source) -> Source:
    if not source.files.keys() - {".gitattributes"}:  # which every repository of the Hub has
        raise SuspectError(f"{source.name}: expected a model, found an empty repository or folder. Check the name.")
    for name in source.files:
        if not safe_name(name):
            raise UnsafeModelError(
                f"{source.name}: expected file names inside the repository, found {name!r}. Do not download it."
            )
    large = [name for name in source.plain_files(True) if source.files[name] > LARGEST_TEXT]
    if large:
        raise SuspectError(
            f"{source.name}/{large[0]}: expected at most {LARGEST_TEXT} bytes, found {source.files[large[0]]}."
        )
    return source


def base_of(adapter: Source) -> tuple[str, str | None]:
    """Read which model an adapter belongs to.

    Args:
        adapter: An adapter, its small files fetched.

    Returns:
        Name and revision (None: not said) of its base model.

    Raises:
        SuspectError: If it is no LoRA, or lies beside a whole model, so that nobody can tell which of them is meant.
        UnsafeModelError: If its weights are a pickle, or loading it would import something or multiply layers.
    """
    whole = [name for name in (WEIGHTS, WEIGHT_INDEX) if name in adapter.files]
    if whole:
        raise SuspectError(
            f"{adapter.name}: expected a whole model or an adapter, found {ADAPTER} beside {whole[0]}. Keep one."
        )
    if ADAPTER_WEIGHTS not in adapter.files:
        kind: type[HFNFTError] = UnsafeModelError if adapter.pickles else SuspectError
        found = f"{adapter.pickles[0]}, a pickle file, which can run code" if adapter.pickles else "none"
        raise kind(f"{adapter.name}: expected weights in {ADAPTER_WEIGHTS}, found {found}. Convert it elsewhere.")
    config = adapter.read_json(ADAPTER)
    for name in ("megatron_config", "layer_replication"):  # a module to import; layers without end
        if config.get(name) is not None:
            raise UnsafeModelError(f"{adapter.name}/{ADAPTER}: expected a plain LoRA, found '{name}'. Do not load it.")
    if config.get("peft_type") != "LORA":
        raise SuspectError(
            f"{adapter.name}: expected a LoRA adapter, found {config.get('peft_type')!r}. Merge it into its base model."
        )
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise SuspectError(f"{adapter.name}/{ADAPTER}: expected the name of a base model, found {base!r}.")
    return base, revision or None
