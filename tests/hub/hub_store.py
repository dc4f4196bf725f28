"""Repositories as the Hub keeps them: commits that hold files, references that name commits, in memory."""

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

import yaml

MAIN = "refs/heads/main"
LARGE = 10 * 1024 * 1024
KEPT_IN_LFS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".parquet", ".msgpack", ".h5", ".onnx")


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is kept in LFS."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's id of what lies in the repository: of the content, or of its LFS pointer."""
        stored = self.content
        if self.lfs:
            spec = "version https://git-lfs.github.com/spec/v1"
            stored = f"{spec}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\x00" % len(stored) + stored).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    title: str
    files: dict[str, Blob]
    parent: str | None = None


@dataclass
class User:
    """Who a token belongs to; `role` is that of the token: read, write or fineGrained."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Repo:
    """A repository with its whole history."""

    id: str
    type: str = "model"
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, object]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.refs:  # as on the Hub, a new repository has one commit with one file
            self.write(
                {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit"
            )

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.refs[MAIN]]

    @property
    def history(self) -> list[Commit]:
        """Commits of the main branch, the first one first."""
        found, sha = [], self.refs[MAIN]
        while sha:
            found.append(self.commits[sha])
            sha = self.commits[sha].parent or ""
        return found[::-1]

    def names(self, revision: str = "main") -> list[str]:
        """Return the files of a revision, without the one that every repository has."""
        return sorted(set(self.commits[self.resolve(revision) or ""].files) - {".gitattributes"})

    def stored(self, sha256: str) -> bytes | None:
        """Return an object of the repository's LFS storage."""
        blobs = (blob for commit in self.commits.values() for blob in commit.files.values() if blob.lfs)
        return self.uploads.get(sha256) or next((b.content for b in blobs if b.sha256 == sha256), None)

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch, tag, full reference or commit id names."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        return revision if revision in self.commits else None

    def write(
        self,
        add: dict[str, Blob],
        title: str,
        delete: tuple[str, ...] = (),
        ref: str = MAIN,
        parent: str | None = None,
    ) -> Commit:
        """Make a commit on top of `parent` (default: where `ref` points) and move `ref` to it."""
        parent = parent or self.refs.get(ref)
        files = dict(self.commits[parent].files) if parent else {}
        files = {
            n: b for n, b in files.items() if not any(n == d or (d[-1] == "/" and n.startswith(d)) for d in delete)
        }
        files |= add
        text = repr((self.id, len(self.commits), parent, title, sorted((n, b.oid) for n, b in files.items())))
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files, parent)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def header(self) -> dict[str, object]:
        """Return the YAML header of the card."""
        card = self.head.files.get("README.md", Blob(b"")).content.decode()
        try:
            found = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        except (yaml.YAMLError, IndexError):
            return {}
        return found if isinstance(found, dict) else {}


class Store:
    """All repositories, users and moves of one Hub."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {
            "hf_write_0123456789abcdef": User("me", orgs=("lab",)),
            "hf_read_0123456789abcdef": User("me", role="read", orgs=("lab",)),
            "hf_other_0123456789abcdef": User("other"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}

    def add(
        self, id: str, source: Path | dict[str, bytes] | None = None, type: str = "model", **settings: object
    ) -> Repo:
        """Make a repository with one commit that holds a folder's files, or those of a dict."""
        repo = Repo(id, type, **settings)
        if isinstance(source, Path):
            files = {file.relative_to(source).as_posix(): file for file in sorted(source.rglob("*")) if file.is_file()}
            source = {name: file.read_bytes() for name, file in files.items()}
        if source:
            repo.write({n: Blob(c, kept_in_lfs(n, c[:512], len(c))) for n, c in source.items()}, "files")
        self.repos[type, id] = repo
        return repo

    def move(self, id: str, to: str, type: str = "model") -> None:
        """Rename a repository; its old name redirects."""
        repo = self.repos.pop((type, id))
        repo.id = to
        self.repos[type, to], self.moved[type, id] = repo, to


def kept_in_lfs(name: str, sample: bytes, size: int) -> bool:
    """Return whether a file goes to LFS: by its suffix, its size, or because it is no text."""
    return size > 0 and (name.endswith(KEPT_IN_LFS) or size > LARGE or b"\x00" in sample)
