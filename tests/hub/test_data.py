"""Data sets from the Hub: pinned, private, broken, and too large to download."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from hub_server import HubServer

from hf_nft import data as room
from hf_nft.data import Data, Wanted, load_data
from hf_nft.defenses.nft import NFT
from hf_nft.errors import DataError, HFNFTError, NetworkError, UnknownNameError
from hf_nft.suspect import load_suspect
from hf_nft.workflows import PurifyJob, VerifyJob, draw_shots

OTHER, READER = "hf_other_0123456789abcdef", "hf_read_0123456789abcdef"
pytestmark = pytest.mark.usefixtures("datasets_library")


@pytest.fixture
def publish(hub: HubServer, tmp_path: Path) -> Callable[..., object]:
    """Publish rows as parquet shards: `publish(train=[rows, rows], test=[rows], private=True)`."""

    def write(id: str = "org/data", **settings: object) -> object:
        parts = {name: value for name, value in settings.items() if isinstance(value, list)}
        for name, shards in parts.items():
            for i, rows in enumerate(shards):
                file = tmp_path / "stored" / "data" / f"{name}-{i:05d}-of-{len(shards):05d}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(str(file))
        rest = {name: value for name, value in settings.items() if name not in parts}
        return hub.store.add(id, tmp_path / "stored", type="dataset", **rest)

    return write


def numbers(start: int, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"value": list(range(start, start + count))})


def asked(hub: HubServer) -> set[str]:
    """Names of the parquet files that somebody asked for."""
    found = {request.path.split("?")[0].rsplit("/", 1)[1] for request in hub.requests if request.route == "resolve"}
    return {name for name in found if name.endswith(".parquet")}


def test_the_commit_is_resolved_first(hub, publish) -> None:
    repo = publish(train=[numbers(0, 3)], test=[numbers(9, 2)])
    data = load_data("org/data")
    assert (data.name, data.revision, data.streamed) == ("org/data", repo.head.sha, False)
    assert (list(data.train["value"]), list(data.test["value"])) == ([0, 1, 2], [9, 10])
    assert data.provenance() == {"name": "org/data", "revision": repo.head.sha}
    paths = [request.path for request in hub.requests if request.route in ("tree", "resolve", "paths-info")]
    assert paths
    assert all(repo.head.sha in path for path in paths)


def test_a_named_revision(hub, publish) -> None:
    repo = publish(train=[numbers(0, 3)])
    first = repo.head.sha
    repo.refs["refs/tags/v1"] = first
    repo.write({}, "empty now", delete=("data/",))
    assert load_data("org/data@v1").revision == first
    with pytest.raises(DataError, match="org/data"):
        load_data("org/data")


@pytest.mark.parametrize(
    ("settings", "token", "error", "text"),
    [
        ({"private": True}, OTHER, DataError, "no such repository there.*hf auth login"),
        ({"gated": "manual"}, OTHER, NetworkError, "gated. Ask for access on its page"),
        ({"gated": "manual"}, None, HFNFTError, "gated|hf auth login"),
    ],
    ids=["private", "gated", "gated, no user"],
)
def test_no_access(hub, publish, monkeypatch, settings, token, error, text: str) -> None:
    publish(train=[numbers(0, 3)], **settings)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(error, match=text):
        load_data("org/data")


def test_the_users_token_opens(hub, publish, monkeypatch) -> None:
    publish("lab/data", train=[numbers(0, 3)], private=True)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert list(load_data("lab/data").train["value"]) == [0, 1, 2]


def test_splits_by_option(publish) -> None:
    publish(train=[numbers(0, 3)], validation=[numbers(5, 1)], test=[numbers(9, 2)])
    data = load_data("org/data", Wanted(train="validation", test="train"))
    assert (list(data.train["value"]), list(data.test["value"])) == ([5], [0, 1, 2])
    data = load_data("org/data", Wanted(train="test"))  # then not measured on the shots' own split
    assert (list(data.train["value"]), list(data.test["value"])) == ([9, 10], [5])
    assert load_data("org/data", Wanted(train="test", test="test")).single_split
    with pytest.raises(UnknownNameError, match=r"split 'tset'.*Closest: test.*--eval-split"):
        load_data("org/data", Wanted(test="tset"))


@pytest.mark.parametrize("name", ["org/nothing", "org/data@nothing", "org/data:nothing"])
def test_names_that_do_not_exist(publish, name: str) -> None:
    publish(train=[numbers(0, 3)])
    with pytest.raises(DataError):
        load_data(name)


def test_a_passing_fault(hub, publish, waits) -> None:
    publish(train=[numbers(0, 3)])
    hub.fail("info", 503, times=2)
    assert list(load_data("org/data").train["value"]) == [0, 1, 2]
    assert waits[:2] == [1.0, 2.0]


# streams


@pytest.fixture
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "STREAM_ABOVE", 0)


@pytest.mark.usefixtures("_streams")
def test_a_large_data_set_is_read_as_far_as_needed(hub, publish) -> None:
    shards = [numbers(1000 * i, 1000) for i in range(6)]
    repo = publish(train=shards, test=[numbers(0, 50), numbers(50, 50)])
    looks: list[int] = []

    def enough(rows: datasets.Dataset) -> bool:
        looks.append(len(rows))
        return len(rows) >= 2000

    data = load_data("org/data", Wanted(test_rows=20, enough=enough))
    assert looks == [1000, 2000]
    assert list(data.train["value"]) == list(range(2000))  # row numbers are those of the split
    assert list(data.test["value"]) == list(range(20))
    assert data.provenance() == {"name": "org/data", "revision": repo.head.sha, "streamed": True}
    assert not asked(hub) & {f"train-0000{i}-of-00006.parquet" for i in (3, 4, 5)}


@pytest.mark.usefixtures("_streams")
def test_a_stream_has_a_bound_and_an_end(publish, monkeypatch) -> None:
    publish(train=[numbers(0, 2500)])
    assert len(load_data("org/data", Wanted(enough=lambda rows: False)).train) == 2500
    monkeypatch.setattr(room, "STREAM_ROWS", 1700)
    data = load_data("org/data", Wanted(enough=lambda rows: False))
    assert len(data.train) == 1700
    assert data.single_split
    assert not load_data("org/data").streamed  # whoever needs all of it gets all of it


def job(suspect_folder: Path, shots: int, **settings: object) -> PurifyJob:
    return PurifyJob(model=str(suspect_folder), dataset="org/data", shots=shots, limit=8, **settings)


def drawn(job: PurifyJob) -> tuple[list[int], list[int], str]:
    case = job.open()
    labels = np.asarray(case.data.train["label"])[list(case.shots.indices)]
    return list(case.shots.indices), labels.tolist(), case.shots.fingerprint


def test_a_stream_draws_what_the_whole_would_of_its_first_rows(
    hub, publish, image_rows, suspect_folder, monkeypatch
) -> None:
    rows = image_rows(2400, 8, seed=5)
    publish(train=[rows.select(range(i, i + 400)) for i in range(0, 2400, 400)], test=[image_rows(8, 8, seed=6)])
    monkeypatch.setattr(room, "STREAM_ABOVE", 0)
    hub.requests.clear()
    first = drawn(job(suspect_folder, 3))
    assert first == drawn(job(suspect_folder, 3))
    assert sorted(first[1]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert max(first[0]) < 1000
    assert first[0] != drawn(job(suspect_folder, 3, shot_seed=1))[0]
    assert not asked(hub) & {f"train-0000{i}-of-00006.parquet" for i in (4, 5)}
    monkeypatch.undo()
    suspect = load_suspect(str(suspect_folder))
    head = rows.select(range(1000))
    assert list(draw_shots(suspect, Data("x", head, head), 3, 0).indices) == first[0]


@pytest.mark.usefixtures("_streams")
def test_a_cure_whose_data_were_streamed_is_verified_on_as_many_rows(
    publish, image_rows, suspect_folder, tmp_path
) -> None:
    rows = image_rows(1400, 8, seed=5)
    late = np.argsort(np.asarray(rows["label"]) == 3, kind="stable")  # the fourth class comes last
    publish(train=[rows.select(late[i : i + 200]) for i in range(0, 1400, 200)], test=[image_rows(8, 8, seed=6)])
    quick = NFT.from_preset("default", steps=2, exposures=0, cut=0.0, batch_size=8, pushes="never")
    record = job(suspect_folder, 2, defense=quick, out=str(tmp_path / "clean")).run()
    assert max(record.shots["indices"]) > 1000
    assert VerifyJob(model=str(tmp_path / "clean"), dataset="org/data").run().problems == []


@pytest.mark.usefixtures("_streams")
def test_a_stream_sorted_by_class_is_refused(publish, image_rows, suspect_folder, monkeypatch) -> None:
    rows = image_rows(400, 8)
    rows = rows.select(np.argsort(rows["label"], kind="stable"))
    publish(train=[rows], test=[image_rows(8, 8)])
    monkeypatch.setattr(room, "STREAM_ROWS", 150)
    with pytest.raises(DataError, match="2 rows of every class among its first 150, found fewer of 2 classes"):
        job(suspect_folder, 2).open()


# the whole way


def test_purify_from_the_hub_with_the_data_set_of_the_card(hub, suspect_folder, image_rows, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, seed in (("train", 1), ("test", 2)):
        image_rows(40, 16, seed=seed).to_parquet(str(data / f"{split}-00000-of-00001.parquet"))
    rows = hub.store.add("org/data", data, type="dataset", private=True)
    (suspect_folder / "README.md").write_text("---\ndatasets:\n- org/data\n---\n")
    repo = hub.store.add("org/model", {file.name: file.read_bytes() for file in suspect_folder.iterdir()})
    with pytest.raises(DataError, match="no such repository"):  # not among `me`'s repositories
        PurifyJob(model="org/model", out=str(tmp_path / "clean")).run()
    rows.private = False
    job = PurifyJob(
        model="org/model@main",
        out=str(tmp_path / "clean"),
        shots=2,
        defense=NFT.from_preset("default", steps=2, exposures=0, cut=0.0, batch_size=8),
    )
    record = job.run()
    assert record.suspect["revision"] == repo.head.sha
    assert (record.data["name"], record.data["revision"]) == ("org/data", rows.head.sha)
    assert len(record.shots["indices"]) == 8
    assert (tmp_path / "clean" / "model" / "model.safetensors").exists()
