"""A Hub that takes a request and never answers: every request ends, in an error that says so."""

from pathlib import Path

import datasets
import pytest

from hf_nft.data import load_data
from hf_nft.errors import NetworkError
from hf_nft.suspect import load_suspect

pytestmark = pytest.mark.usefixtures("datasets_library")


@pytest.fixture
def patience(waits, monkeypatch) -> list[float]:
    """Make a request fail after a tenth of a second of silence, and give up after one such."""
    monkeypatch.setattr("hf_nft.hub.TIMEOUT", 0.1)
    monkeypatch.setattr("hf_nft.hub.PATIENCE", 0.05)
    return waits


@pytest.mark.parametrize("route", ["info", "tree", "resolve", "storage"])
def test_a_model(hub, suspect_folder: Path, patience, route: str) -> None:
    hub.store.add("org/model", suspect_folder)
    hub.fail(route, "slow", times=99, delay=60)
    with pytest.raises(NetworkError, match="model 'org/model': expected a folder, or a Hub that can be reached"):
        load_suspect("org/model")
    assert 1 <= hub.count(route) < 30  # the client itself asks several times for files


@pytest.mark.parametrize("route", ["info", "tree", "resolve"])
def test_a_data_set(hub, tmp_path: Path, patience, route: str) -> None:
    rows = datasets.Dataset.from_dict({"value": [1, 2, 3]})
    rows.to_parquet(str(tmp_path / "stored/train.parquet"))
    hub.store.add("org/data", tmp_path / "stored", type="dataset")
    hub.fail(route, "slow", times=99, delay=60)
    with pytest.raises(NetworkError, match="data set 'org/data'"):
        load_data("org/data")


@pytest.mark.parametrize("route", ["whoami", "info", "create", "preupload", "lfs-batch", "lfs-upload", "commit"])
def test_a_push(hub, cli, run_dir, patience, route: str) -> None:
    hub.fail(route, "slow", times=99, delay=60)
    done = cli("push", run_dir, "me/model")
    assert (done.code, "expected" in done.message) == (7, True), done.err


def test_silence_is_borne_for_a_while(hub, suspect_folder: Path, patience, monkeypatch) -> None:
    monkeypatch.setattr("hf_nft.hub.PATIENCE", 60)
    hub.store.add("org/model", suspect_folder)
    hub.fail("info", "slow", times=3, delay=60)
    load_suspect("org/model")
    assert patience[:3] == [1, 2, 4]
