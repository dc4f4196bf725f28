"""Loading data sets from disk, with everything that can be wrong with the files; offline."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_nft.data import Data, Wanted, fingerprint, load_data
from hf_nft.errors import DataError, NetworkError, UnknownNameError


def numbers(*values: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"value": list(values), "label": [v % 2 for v in values]})


def write(folder: Path, **files: datasets.Dataset) -> Path:
    for name, rows in files.items():
        file = folder / f"{name.replace('__', '/')}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(str(file))
    return folder


def contents(data: Data) -> tuple[list[int], list[int]]:
    return list(data.train["value"]), list(data.test["value"])


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    write(
        tmp_path / "mine",
        **{
            "train-00000-of-00002": numbers(1, 2),
            "train-00001-of-00002": numbers(3),
            "test-00000-of-00001": numbers(4),
        },
    )
    data = load_data(str(tmp_path / "mine"))
    assert contents(data) == ([1, 2, 3], [4])
    assert data.name == "mine"
    assert not data.single_split


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("training", "validation"),
        ("data__train", "data__val"),
        ("train_0", "test_0"),
        ("train__0000", "test__0000"),  # as the Hub converts to parquet: default/train/0000.parquet
        ("default__train__0000", "default__validation__0000"),
        ("Train", "Test"),
    ],
)
def test_splits_are_told_from_file_and_folder_names(tmp_path: Path, train: str, test: str) -> None:
    assert contents(load_data(str(write(tmp_path, **{train: numbers(1, 2), test: numbers(3)})))) == ([1, 2], [3])


def test_a_test_file_is_preferred_to_a_validation_file(tmp_path: Path) -> None:
    write(tmp_path, train=numbers(1), validation=numbers(2), test=numbers(3))
    assert contents(load_data(str(tmp_path))) == ([1], [3])


def test_a_single_split_is_both(tmp_path: Path) -> None:
    for name in ("train", "test", "rows"):
        data = load_data(str(write(tmp_path / name, **{name: numbers(1, 2)})))
        assert contents(data) == ([1, 2], [1, 2])
        assert data.single_split


def test_a_configuration_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "small", train=numbers(1), test=numbers(2))
    write(tmp_path / "mine" / "large", train=numbers(3), test=numbers(4))
    write(tmp_path / "other", train=numbers(5))
    assert contents(load_data(f"{tmp_path / 'mine'}:large")) == ([3], [4])
    for config in ("huge", "../other", "small/train.parquet"):
        with pytest.raises(DataError, match="expected a folder"):
            load_data(f"{tmp_path / 'mine'}:{config}")


def test_splits_that_are_asked_for(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": numbers(1, 2), "test": numbers(3), "extra": numbers(9)})
    both.save_to_disk(str(tmp_path))
    assert contents(load_data(str(tmp_path), Wanted(train="extra"))) == ([9], [3])
    assert contents(load_data(str(tmp_path), Wanted(test="extra"))) == ([1, 2], [9])
    assert contents(load_data(str(tmp_path), Wanted(train="test"))) == ([3], [3])
    with pytest.raises(UnknownNameError, match=r"split 'extr'.*Closest: extra.*--split"):
        load_data(str(tmp_path), Wanted(train="extr"))


def test_one_parquet_file(tmp_path: Path) -> None:
    write(tmp_path, rows=numbers(5, 6))
    data = load_data(str(tmp_path / "rows.parquet"))
    assert contents(data) == ([5, 6], [5, 6])


def test_saved_data_sets(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": numbers(1, 2), "dev": numbers(3), "extra": numbers(9)})
    both.save_to_disk(str(tmp_path / "both"))
    assert contents(load_data(str(tmp_path / "both"))) == ([1, 2], [3])
    numbers(7).save_to_disk(str(tmp_path / "one"))
    assert load_data(str(tmp_path / "one")).single_split


def test_an_image_folder(tmp_path: Path, image_rows) -> None:
    rows = image_rows(6, 8, 2)
    for split, chosen in (("train", range(4)), ("test", range(4, 6))):
        for i in chosen:
            file = tmp_path / split / ("cat", "dog")[rows[i]["label"]] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows[i]["image"].save(file)
    data = load_data(str(tmp_path))
    assert data.train.features["label"].names == ["cat", "dog"]
    assert sorted(data.train["label"]) == [0, 0, 1, 1]
    assert len(data.test) == 2
    assert data.train[0]["image"].size == (8, 8)


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("Training", "Testing"), ("train", "eval")])
def test_an_image_folder_whose_splits_have_other_names(tmp_path: Path, image_rows, train: str, test: str) -> None:
    rows = image_rows(6, 8, 2)
    for i, split in enumerate([train] * 4 + [test] * 2):
        file = tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows[i]["image"].save(file)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.train.features["label"].names == data.test.features["label"].names == ["cat", "dog"]


def test_a_file_that_is_empty_is_named(tmp_path: Path) -> None:
    write(tmp_path, train=numbers(1))
    (tmp_path / "test-0.parquet").touch()
    with pytest.raises(DataError, match=r"test-0\.parquet: expected a parquet file, found an empty one"):
        load_data(str(tmp_path))


def test_a_file_that_is_corrupt(tmp_path: Path) -> None:
    file = write(tmp_path, train=numbers(*range(100))) / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="does not load"):
        load_data(str(tmp_path))
    file.write_text("not parquet")
    with pytest.raises(DataError, match="does not load"):
        load_data(str(tmp_path))


def test_no_rows(tmp_path: Path) -> None:
    empty = numbers(1).select([])
    with pytest.raises(DataError, match="no data"):
        load_data(str(write(tmp_path / "files", train=numbers(1), test=empty)))
    datasets.DatasetDict({"train": numbers(1), "test": empty}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="saved"):
        load_data(str(tmp_path / "saved"))


def test_a_split_of_another_name_is_not_mixed_into_the_training_data(tmp_path: Path) -> None:
    named = {"train-00000-of-00001": numbers(1, 2), "test": numbers(4), "triggered": numbers(5), "0001": numbers(3)}
    folder = str(write(tmp_path, **named))
    assert contents(load_data(folder)) == ([3, 1, 2], [4])
    assert contents(load_data(folder, Wanted(test="triggered"))) == ([3, 1, 2], [5])
    other = write(tmp_path / "other", **{"part-0": numbers(1), "part-1": numbers(2), "test": numbers(4)})
    assert contents(load_data(str(other))) == ([1, 2], [4])


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data set"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["org/not-here", "org/not-here:config", "./no/such/folder"])
def test_offline_a_missing_name_says_so(name: str) -> None:
    with pytest.raises((NetworkError, DataError), match=r"data set '.*': expected a folder.*Check the path"):
        load_data(name)


def test_a_hub_id_offline_is_a_network_error() -> None:
    with pytest.raises(NetworkError, match=r"or a Hub that can be reached.*Check the path or the network"):
        load_data("org/not-here")


def test_fingerprint_tells_content_not_place(tmp_path: Path) -> None:
    rows = numbers(*range(50))
    mark = fingerprint(rows, "label")
    assert len(mark) == 16
    assert int(mark, 16) >= 0
    rows.save_to_disk(str(tmp_path / "saved"))
    assert fingerprint(datasets.load_from_disk(str(tmp_path / "saved")), "label") == mark
    assert fingerprint(rows.select(range(50)), "label") == mark
    different = [rows.select(range(49)), rows.rename_column("value", "other"), rows.select([1, 0, *range(2, 50)])]
    assert mark not in {fingerprint(other, "label") for other in different}


def test_the_fingerprint_of_texts_is_that_of_their_padded_array() -> None:
    texts = ["", "short", "longer than the others", "\U0001f600 é"]
    rows = datasets.Dataset.from_dict({"prompt": texts, "response": texts[::-1]})
    digest = hashlib.sha256(b"4 ['prompt', 'response']")
    digest.update(np.asarray(texts[::-1]).tobytes())
    assert fingerprint(rows, "response") == digest.hexdigest()[:16]
