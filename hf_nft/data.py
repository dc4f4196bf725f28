"""Data sets: load one safely from the Hub or from disk, and find its splits."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_nft.errors import DataError, HFNFTError, UnknownNameError
from hf_nft.hub import answers, cause_of, first_line, patiently, split_reference, translate

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
STREAM_ABOVE = 5 * 2**30
"""Bytes on the Hub above which a data set is streamed instead of downloaded."""
STREAM_ROWS = 100_000
"""Rows of a streamed train split that are read at most; all of them are kept in memory."""
STREAM_TEST_ROWS = 10_000
"""Rows of a streamed test split that are read, if no limit is set."""

Enough = Callable[[datasets.Dataset], bool]
"""Whether the first rows of a split, columns as stored, will do to draw shots from."""


@dataclass(frozen=True)
class Wanted:
    """Which part of a data set is asked for.

    Attributes:
        train: Split that shots are drawn from; default found by its name.
        test: Split that metrics are measured on; default found by its name.
        test_rows: Rows that will be measured at most; a streamed test split is read no further.
        enough: How far a split that is too large to download is read; None: it is downloaded however large it is.
    """

    train: str | None = None
    test: str | None = None
    test_rows: int | None = None
    enough: Enough | None = None


@dataclass(frozen=True)
class Data:
    """The two parts of a data set that a purification looks at.

    Attributes:
        name: What the user called it: a Hub id or a path's last component.
        train: Rows that shots are drawn from.
        test: Rows that metrics are measured on. The same object as `train` when the data set has a single split; then
            the shots are left out of the evaluation.
        revision: Commit on the Hub; None for a folder, and without a network.
        streamed: Whether the parts are only the first rows of their splits, because the data set is too large. Row
            numbers are those of the whole split.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset
    revision: str | None = None
    streamed: bool = False

    @property
    def single_split(self) -> bool:
        """Whether shots and evaluation rows come from one split."""
        return self.train is self.test

    def provenance(self) -> dict[str, Any]:
        """Return what a record says about where the rows come from."""
        commit = {} if self.revision is None else {"revision": self.revision}
        return {"name": self.name, **commit, **({"streamed": True} if self.streamed else {})}


def load_data(reference: str, wanted: Wanted | None = None) -> Data:
    """Load a data set.

    Args:
        reference: A local folder of parquet files (`train*.parquet`, `test/*.parquet` ..., at any depth), a saved
            `DatasetDict`, an image folder, or a Hub id, which `@REVISION` may follow; `:config` may follow either.
        wanted: Splits, and how far large ones are read; default what their names tell, whole.

    Returns:
        Its train and test parts, columns as stored.

    Raises:
        DataError: If nothing can be loaded, a file is corrupt, or no rows are found.
        UnknownNameError: If a split that is asked for does not exist.
        NetworkError: If a Hub data set cannot be reached, or may not be read.
    """
    wanted = wanted or Wanted()
    path, _, config = reference.partition(":")
    revision = None
    try:
        local = Path(path).expanduser()
        if local.exists():
            loaded, streamed = _load_local(_config_folder(local, config)), False
        else:
            revision, loaded, streamed = _load_hub(path, config or None, wanted.enough is not None)
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        first, second = _choose_splits(list(splits), wanted)
        train, test = splits[first], splits[second]
        if streamed:
            train = _head(train, STREAM_ROWS, wanted.enough)
            test = train if first == second else _head(test, wanted.test_rows or STREAM_TEST_ROWS)
    except HFNFTError:
        raise
    except Exception as error:
        raise _unloadable(reference, error) from error
    for part in (train, test):
        if not part.num_rows:
            raise DataError(f"data set '{reference}': expected rows, found an empty split. Check the files.")
    return Data(local.name if local.exists() else path.partition("@")[0], train, test, revision, streamed)


def _choose_splits(found: list[str], wanted: Wanted) -> tuple[str, str]:
    """Names of the train and the test part, the same one where there is but one."""
    for name, option in ((wanted.train, "--split"), (wanted.test, "--eval-split")):
        if name is not None and name not in found:
            raise UnknownNameError("split", name, found, f"Name another one with {option}.")
    train = wanted.train or next((name for name in TRAIN_NAMES if name in found), None)
    test = wanted.test or next((name for name in TEST_NAMES if name in found and name != wanted.train), None)
    return train or test or found[0], test or train or found[0]


def _load_hub(reference: str, config: str | None, may_stream: bool) -> tuple[str | None, Any, bool]:
    """Resolve to a commit, look at the size of that configuration's files, then download or open a stream."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    name, revision = split_reference("data set", reference, None, DataError)
    with answers("data set", name, DataError):
        try:
            api = HfApi(library_name="hf-nft")
            info = patiently(lambda: api.dataset_info(name, revision=revision, files_metadata=True, timeout=30))
        except OfflineModeIsEnabled:
            return None, datasets.load_dataset(name, config, revision=revision), False
        if info.gated:  # its listing is public, its files are not
            patiently(lambda: api.auth_check(name, repo_type="dataset"))
    builder = patiently(lambda: datasets.load_dataset_builder(name, config, revision=info.sha))
    listed = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    if not listed:  # then the library may have fallen back to what another commit left in its cache
        raise DataError(f"data set '{name}': expected data files at commit {info.sha}, found none that can be read.")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    used = [size for file, size in sizes.items() if any(path.endswith(f"/{file}") for path in listed)]
    if may_stream and sum(used or sizes.values()) > STREAM_ABOVE:
        return info.sha, builder.as_streaming_dataset(), True
    patiently(builder.download_and_prepare)
    return info.sha, builder.as_dataset(), False


def _head(stream: datasets.IterableDataset, most: int, enough: Enough | None = None) -> datasets.Dataset:
    """Read the first rows of a stream, twice as many each time, until they are enough; media stay encoded."""
    stream = stream._resolve_features()
    features, rows = stream.features, iter(stream.decode(False))
    parts: list[datasets.Dataset] = []
    step = min(1000, most) if enough is not None else most
    while chunk := list(islice(rows, step)):
        parts.append(datasets.Dataset.from_list(chunk, features=features))
        read = datasets.concatenate_datasets(parts)
        if len(chunk) < step or len(read) >= most or (enough is not None and enough(read)):
            return read
        step = min(len(read), most - len(read))
    return datasets.concatenate_datasets(parts) if parts else datasets.Dataset.from_list([], features=features)


def _unloadable(reference: str, error: Exception) -> HFNFTError:
    cause = cause_of(error)
    found = translate(f"data set '{reference}'", cause, DataError) if cause is not None else None
    return found or DataError(
        f"data set '{reference}': expected parquet files, an image folder or a Hub id, found something that does not "
        f"load ({first_line(error.__cause__ or error, 200)}). Check the files, or pass another --dataset."
    )


def _config_folder(local: Path, config: str) -> Path:
    """A configuration of a local data set is a folder in it, as on the Hub."""
    folder = local / config if config else local
    if config and (not folder.is_dir() or local.resolve() not in folder.resolve().parents):
        raise DataError(f"data set '{local}:{config}': expected a folder {config} in it, found none. Check the name.")
    return folder


def _load_local(folder: Path) -> Any:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    found = sorted(folder.rglob("*.parquet") if folder.is_dir() else [folder])
    for file in found:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: expected a parquet file, found an empty one. Copy or download it again.")
    if found:
        splits = _splits([file.relative_to(folder) for file in found])
        files: dict[str, list[str]] = {}
        for file, split in zip(found, splits, strict=True):
            files.setdefault(split, []).append(str(file))
        return datasets.load_dataset("parquet", data_files=files)
    parts = {part.name.lower(): str(part / "**") for part in folder.iterdir() if part.is_dir()}
    named = {split: files for split, files in parts.items() if split in TRAIN_NAMES + TEST_NAMES}
    if named.keys() & {*TRAIN_NAMES} and named.keys() & {*TEST_NAMES}:  # the library itself tells capitals apart
        return datasets.load_dataset("imagefolder", data_files=named)
    return datasets.load_dataset("imagefolder", data_dir=str(folder))


def _splits(files: list[Path]) -> list[str]:
    """Tell the splits of files from the first word of their names, else of the nearest folders'.

    What nothing tells is training data, but not beside files that are: there a split is what the name says.
    """
    words = [[re.match("[a-z]*", part.lower())[0] for part in reversed(file.parts)] for file in files]  # type: ignore[index]
    known = [next((word for word in told if word in TRAIN_NAMES + TEST_NAMES), None) for told in words]
    beside = any(split in TRAIN_NAMES for split in known)
    return [split or ((beside and told[0]) or "train") for split, told in zip(known, words, strict=True)]


def fingerprint(dataset: datasets.Dataset, column: str) -> str:
    """Identify a data set by its content, wherever it lies.

    Args:
        dataset: Any data set.
        column: The column whose values are hashed; its row count and feature names are hashed as well.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{dataset.num_rows} {sorted(dataset.column_names)}".encode())
    values = dataset[column][:]
    if values and isinstance(values[0], str):  # as NumPy holds them, padded to the longest, but one at a time
        width = 4 * max(1, *map(len, values))
        for value in values:
            digest.update(value.encode("utf-32-le", "surrogatepass").ljust(width, b"\0"))
        return digest.hexdigest()[:16]
    digest.update(np.asarray(values).astype(str).tobytes())
    return digest.hexdigest()[:16]
