"""The local Hub as a fixture: the real client talks to it, in this process and in children."""

import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import huggingface_hub.hf_api
import huggingface_hub.utils._detect_agent
import pytest
import torch
import transformers.utils.hub
from hf_nft.cli.main import main
from hub_server import HubServer
from hub_store import Repo
from huggingface_hub.utils import close_session
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from hf_nft.adapter import NFTConfig, get_nft_model, mask_layers
from hf_nft.models.base import image_processor
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import figures_of
from hf_nft.reporting.record import RunRecord


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Start a Hub of its own for a test, with an empty cache; the client's user is `me`, who may write.

    `hub.environment` holds the variables that point a child process at it.
    """
    with a_hub(tmp_path_factory.mktemp("hf-home"), monkeypatch) as server:
        yield server


@contextmanager
def a_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Start a Hub and point this process at it."""
    with HubServer() as server:
        server.environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": server.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        point_client_at(server.url, home, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server
    close_session()


def point_client_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set in this process what the client read from the environment when it was imported."""
    settings: dict[str, Any] = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.utils._detect_agent, "_registry", None)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    close_session()


@pytest.fixture
def datasets_library(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set what the library `datasets` read from the environment when it was imported."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the waits between retries, in seconds, instead of waiting."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def tiny_resnet() -> ResNetForImageClassification:
    """Return an untrained stock ResNet of transformers."""
    torch.manual_seed(0)
    names = ("cat", "dog", "frog", "ship")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels)
    )


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a stock ResNet with its processor, as a suspect."""
    folder = tmp_path_factory.mktemp("resnet")
    tiny_resnet().save_pretrained(str(folder))
    image_processor(16).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run folder as `purify` does, without its work."""
    folder = tmp_path_factory.mktemp("run")
    wrapped = get_nft_model(tiny_resnet().eval(), NFTConfig())
    for layer in mask_layers(wrapped).values():
        torch.nn.init.uniform_(layer.nft_mask["default"], 0.5, 1.0)
    wrapped.peft_config["default"].base_model_name_or_path = "/home/alice/suspect"
    wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter/README.md").unlink(missing_ok=True)
    wrapped.merge_and_unload().save_pretrained(str(folder / "model"))
    image_processor(16).save_pretrained(str(folder / "model"))
    (folder / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "figures/masks.png")
    record = RunRecord(
        kind="purify",
        command="hf-nft purify org/suspect --dataset /home/alice/data --shots 10",
        suspect={
            "name": "org/suspect",
            "revision": "0123456789abcdef0123456789abcdef01234567",
            "architecture": "ResNetForImageClassification",
            "task": "image_classification",
            "pipeline_tag": "image-classification",
        },
        data={"name": "org/data", "test_rows": 40},
        config={"defense": "nft", "preset": "default"},
        metrics={"before": {"acc": 0.9, "asr": 1.0}, "after": {"acc": 0.875, "asr": 0.02}, "counts": {}},
        attack={"name": "badnets", "target_class": 0},
        created="2026-01-02T03:04:05+00:00",
    )
    record.save(folder / "record.json")
    write_card(record, folder, figures_of(folder))
    return folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """Return a run folder of the test's own, `clean` in the folder where it runs."""
    shutil.copytree(finished, tmp_path / "clean")
    return tmp_path / "clean"


SHORT = ["--shots=2", "--mixed-precision=no", "--set=steps=2", "--set=exposures=0", "--set=cut=0", "--set=batch_size=8"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, image_rows: Callable[..., Any]) -> str:
    """Write a data set of 4 classes, 16 pixels wide."""
    folder = tmp_path_factory.mktemp("data")
    image_rows(120, 16, seed=1).to_parquet(str(folder / "train.parquet"))
    image_rows(40, 16, seed=2).to_parquet(str(folder / "test.parquet"))
    return str(folder)


@pytest.fixture(scope="session")
def short() -> list[str]:
    """Return options that make a purification take two steps."""
    return SHORT


@pytest.fixture(scope="session")
def cured(tmp_path_factory: pytest.TempPathFactory, resnet: Path, data: str) -> tuple[Path, dict[Any, Repo]]:
    """Purify `org/suspect` by its Hub id and push it to `me/purified`; return run folder and repositories."""
    with pytest.MonkeyPatch.context() as patch, a_hub(tmp_path_factory.mktemp("hf-home"), patch) as server:
        server.store.add("org/suspect", resnet)
        folder = tmp_path_factory.mktemp("cured") / "clean"
        told = ["--dataset", data, "--attack", "badnets", *SHORT, "--set=lr=0.3", "--out", str(folder)]
        assert main(["purify", "org/suspect", *told, "--push-to", "me/purified"]) == 0
        return folder, server.store.repos


@pytest.fixture
def purified(hub: HubServer, cured: tuple[Path, dict[Any, Repo]], tmp_path: Path) -> Path:
    """Put `org/suspect` and `me/purified` onto the test's Hub; return a copy of the run folder they came from."""
    folder, repos = cured
    hub.store.repos.update(copy.deepcopy(repos))
    shutil.copytree(folder, tmp_path / "clean")
    return tmp_path / "clean"


@pytest.fixture
def planted_dir(run_dir: Path) -> Path:
    """Return a run folder as `plant` writes it: the model at the top."""
    for file in (run_dir / "model").iterdir():
        file.rename(run_dir / file.name)
    (run_dir / "model").rmdir()
    (run_dir / "README.md").unlink()
    record = RunRecord.load(run_dir / "record.json")
    dataclasses.replace(record, kind="plant").save(run_dir / "record.json")
    return run_dir
