"""Data sets: load one safely from the Hub or from disk, and find its splits."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_nft.errors import DataError, NetworkError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Data:
    """The two parts of a data set that a purification looks at.

    Attributes:
        name: What the user called it: a Hub id or a path's last component.
        train: Rows that shots are drawn from.
        test: Rows that metrics are measured on. The same object as `train` when the data set has a single split; then
            the shots are left out of the evaluation.
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset

    @property
    def single_split(self) -> bool:
        """Whether shots and evaluation rows come from one split."""
        return self.train is self.test


def load_data(reference: str) -> Data:
    """Load a data set.

    Args:
        reference: A local folder of parquet files (`train*.parquet`, `test/*.parquet` ..., at any depth), a saved
            `DatasetDict`, an image folder, or a Hub id; `:config` may follow.

    Returns:
        Its train and test parts, columns as stored.

    Raises:
        DataError: If nothing can be loaded, a file is corrupt, or no rows are found.
        NetworkError: If a Hub data set cannot be reached.
    """
    path, _, config = reference.partition(":")
    local = Path(path).expanduser()
    try:
        loaded = _load_local(local) if local.exists() else datasets.load_dataset(path, config or None)
    except DataError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise NetworkError(
            f"data set '{reference}': expected a local folder or a Hub id that can be reached, "
            f"found neither ({_first_line(error)}). Pass --dataset FOLDER to work offline."
        ) from error
    except Exception as error:
        raise DataError(
            f"data set '{reference}': expected parquet files, an image folder or a Hub id, "
            f"found something that does not load ({_first_line(error)}). Check the files, or pass another --dataset."
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    first = next(iter(splits.values()))
    train, test = train or test or first, test or train or first
    for part in (train, test):
        if not part.num_rows:
            raise DataError(f"data set '{reference}': expected rows, found an empty split. Check the files.")
    return Data(local.name if local.exists() else path, train, test)


def _load_local(folder: Path) -> Any:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    files: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet") if folder.is_dir() else [folder]):
        if file.stat().st_size == 0:
            raise DataError(f"{file}: expected a parquet file, found an empty one. Copy or download it again.")
        files.setdefault(_split_of(file.relative_to(folder)), []).append(str(file))
    if files:
        return datasets.load_dataset("parquet", data_files=files)
    return datasets.load_dataset("imagefolder", data_dir=str(folder))


def _split_of(file: Path) -> str:
    """Tell the split from the first word of the file's name, else of the nearest folder's; `train` if none says."""
    words = (re.match("[a-z]*", part.lower()) for part in reversed(file.parts))
    return next((word[0] for word in words if word and word[0] in TRAIN_NAMES + TEST_NAMES), "train")


def _first_line(error: BaseException) -> str:
    text = str(error.__cause__ or error) or type(error).__name__
    return text.splitlines()[0][:200]


def fingerprint(dataset: datasets.Dataset, column: str) -> str:
    """Identify a data set by its content, wherever it lies.

    Args:
        dataset: Any data set.
        column: The column whose values are hashed; its row count and feature names are hashed as well.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{dataset.num_rows} {sorted(dataset.column_names)}".encode())
    values = dataset.select_columns([column]).with_format("numpy")[:][column]
    digest.update(np.asarray(values).astype(str).tobytes())
    return digest.hexdigest()[:16]
