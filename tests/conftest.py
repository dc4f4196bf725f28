"""Every test runs offline, on one thread, with caches of its own; and the small things many tests start from."""

# ruff: noqa: E402 - the environment is set before the imports that read it

import os
import shutil
import tempfile

CACHE = tempfile.mkdtemp(prefix="hf-nft-tests-")
# before anything imports torch or a Hugging Face library, since all of them read these once
os.environ.update(
    HF_HOME=CACHE,
    HF_HUB_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    COLUMNS="100",
    NO_COLOR="1",
    PYTHONSAFEPATH="1",  # children import the installed package, not the folder the tests were started in
)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE", "FORCE_COLOR"):
    os.environ.pop(name, None)

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from hf_nft.cli.main import main
from PIL import Image

from hf_nft.models.preact_resnet18 import PreActResNet18, PreActResNetConfig, PreActResNetForImageClassification
from hf_nft.shots import Shots
from hf_nft.tasks.image_classification import ImageClassification

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
CLASSES = ("cat", "dog", "frog", "ship")


def pytest_unconfigure() -> None:
    """Remove the caches."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_lasting_rng_or_threads() -> Iterator[None]:
    """Leave torch's and numpy's global streams as they were: the package must not need them, nor tests each other."""
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()
    yield
    torch.random.set_rng_state(before)
    np.random.set_state(numpy_before)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository."""
    return ROOT


@pytest.fixture(scope="session")
def child() -> Callable[..., str]:
    """Run Python code in a process of its own; returns what it printed. `env` adds to the environment."""

    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Return the error message, without progress bars and usage lines before it."""
        return self.err[max(self.err.rfind("\nError: "), self.err.rfind("\rError: ")) + 1 :].strip()


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """Run a command in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def image_rows() -> Callable[..., datasets.Dataset]:
    """Make labelled RGB noise images whose class tints them: `image_rows(rows=40, side=32, classes=4, seed=0)`."""

    def make(rows: int = 40, side: int = 32, classes: int = 4, seed: int = 0) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        labels = np.arange(rows) % classes
        pixels = rng.integers(0, 128, (rows, side, side, 3))
        pixels[np.arange(rows), :, :, labels % 3] += (40 * (1 + labels // 3))[:, None, None]
        names = [*CLASSES, *(f"class{i}" for i in range(len(CLASSES), classes))][:classes]
        return datasets.Dataset.from_dict(
            {"image": [Image.fromarray(p.clip(0, 255).astype(np.uint8)) for p in pixels], "label": labels.tolist()},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
        )

    return make


@pytest.fixture(scope="session")
def image_task() -> ImageClassification:
    """Return the task of a 16-pixel model with CIFAR's constants."""
    from hf_nft.models.base import image_processor

    return ImageClassification(image_processor(16))


@pytest.fixture
def image_model() -> PreActResNetForImageClassification:
    """Return an untrained 4-class network of 4 blocks for 16 pixels; its BatchNorm values are not those of creation."""
    config = PreActResNetConfig(
        width=4,
        blocks=(1, 1, 1, 1),
        image_size=16,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        architectures=["PreActResNetForImageClassification"],
    )
    torch.manual_seed(7)
    model = PreActResNetForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def image_shots(image_rows, image_task) -> Shots:
    """Return 20 encoded shots, 5 of each of 4 classes, of 16 pixels."""
    rows = image_rows(20, 16)
    return Shots(image_task.encode(rows), per_class=5.0, classes=4, indices=tuple(range(20)), fingerprint="shots")


@pytest.fixture
def suspect_folder(tmp_path, image_model, image_task) -> Path:
    """Return a folder that holds a small model with its processor, as transformers stores them."""
    folder = tmp_path / "suspect"
    image_model.save_pretrained(str(folder))
    image_task.save_processor(str(folder))
    return folder


@pytest.fixture(scope="session")
def architecture() -> PreActResNet18:
    """Return the smallest PreAct-ResNet-18."""
    return PreActResNet18(**PreActResNet18.tiny)
