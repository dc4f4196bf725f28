"""What the app does for strangers: public things of the Hub at a commit, small ones, asked for as nobody."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import HubServer

from hf_nft.app import guests
from hf_nft.app.orders import Demonstration, Order, carry_out
from hf_nft.errors import ConfigError, DataError, HFNFTError, SuspectError, UnsafeModelError
from hf_nft.reporting.record import RunRecord

pytestmark = pytest.mark.usefixtures("datasets_library")
READ_ME = b"---\ndatasets:\n- lab/data\n---\n"


@pytest.fixture
def shelf(hub: HubServer, suspect_folder: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Put a model and its data set onto the Hub, and ask as a guest."""
    hub.store.add("lab/data", Path(data), type="dataset")
    hub.store.add("lab/model", {"README.md": READ_ME, **{f.name: f.read_bytes() for f in suspect_folder.iterdir()}})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)  # and back at the end
    guests.forget_token()
    return hub


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., object]:
    def carry(model: str, dataset: str = "") -> object:
        return carry_out(Order(model, dataset, 2, "default"), Demonstration(), tmp_path, guest=True)

    return carry


def test_from_hub_ids_to_the_run_folder(shelf, ask, tmp_path) -> None:
    found = ask("lab/model@main", "lab/data")
    commit = {id: repo.head.sha for (_, id), repo in shelf.store.repos.items()}
    record = RunRecord.load(tmp_path / "clean/record.json")
    assert record.suspect["revision"] == commit["lab/model"]
    assert record.data["revision"] == commit["lab/data"]
    assert record.command == (
        f"hf-nft purify lab/model --revision {commit['lab/model']} --dataset lab/data@{commit['lab/data']} "
        f"--shots 2 --preset default --limit 1000"
    )
    assert record.command in found.card
    assert found.card.count("](data:image/png;base64,") == found.card.count("![") >= 2
    assert found.table.splitlines()[2].startswith("| ACC | ")
    with zipfile.ZipFile(found.archive) as held:
        assert {"record.json", "adapter/adapter_model.safetensors", "figures/masks.png"} <= set(held.namelist())
    assert {request.token for request in shelf.requests} == {None}


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_the_owner_may_read_is_not_for_guests(shelf, ask, kind: str) -> None:
    shelf.store.repos[kind, f"lab/{kind.removesuffix('set')}"].private = True  # `me` is a member
    with pytest.raises(HFNFTError, match="no such repository there"):
        ask("lab/model")
    assert {request.token for request in shelf.requests} == {None}


@pytest.mark.parametrize(
    ("limit", "value", "error", "text"),
    [
        ("LARGEST_MODEL", 1, SuspectError, "model of 0 MiB at most here"),
        ("LONGEST", 0.0, SuspectError, "expected to take 0 s at most here"),
        ("LARGEST_DATA", 1, DataError, "expected 0 MiB of data at most here"),
    ],
)
def test_what_is_too_large_is_not_downloaded(shelf, ask, monkeypatch, limit, value, error, text: str) -> None:
    monkeypatch.setattr(guests, limit, value)
    with pytest.raises(error, match=text):
        ask("lab/model")
    assert not any(request.path.endswith(".parquet") for request in shelf.requests)
    assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_what_a_purification_refuses(shelf, ask, suspect_folder) -> None:
    config = (suspect_folder / "config.json").read_bytes()
    shelf.store.add("lab/pickle", {"config.json": config, "pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(UnsafeModelError, match="expected weights in safetensors"):
        ask("lab/pickle")


def test_no_folder_as_data_set(shelf, ask) -> None:
    for given in ("/etc", "../data", "~", "/etc:lab/data"):
        with pytest.raises(ConfigError, match=r"data set: .* Folders are not read"):
            ask("lab/model", given)
