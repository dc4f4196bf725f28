"""Attacks with something to train first: a generator, an encoder, a patch, a surrogate.

What is trained is kept in a folder of two files, `artefact.safetensors` and `artefact.json` (settings, resolution,
normalisation, and what they were trained on), which is read from disk or from the Hub. Triggers take images in [0, 1]
and normalise by the artefact's own constants, so they do not depend on a victim's.
"""

import dataclasses
import functools
import hashlib
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import hf_nft
from hf_nft import registry
from hf_nft.attacks._image import BatchAttack
from hf_nft.attacks._workshop import Workshop
from hf_nft.configs import build, setting
from hf_nft.errors import ConfigError, DataError, HFNFTError, NetworkError
from hf_nft.hub import answers, patiently, split_reference
from hf_nft.tasks.base import Task

WEIGHTS, FACTS = "artefact.safetensors", "artefact.json"
BESIDE = "attack"
"""Folder in a victim's, or in a run's, that keeps both."""


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What was trained, ready to use.

    Attributes:
        nets: Networks and tensors by name, in evaluation mode, without gradients.
        facts: `attack`, `settings`, `height`, `width`, `mean`, `std`, `classes`, `architecture`, `data`, `version`.
        digest: SHA-256 of both files.
    """

    nets: nn.ModuleDict
    facts: dict[str, Any]
    digest: str

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was made with, which decide its shape."""
        return {key: value for key, value in self.facts["settings"].items() if key != "name"}

    def net(self, name: str, device: torch.device) -> Any:
        """Return a network on a device."""
        return self.nets[name].to(device)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (n, 3, H, W) in [0, 1] by the artefact's constants."""
        return (images - self._constant("mean", images)) / self._constant("std", images)

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return normalised images to [0, 1]."""
        return images * self._constant("std", images) + self._constant("mean", images)

    def _constant(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.facts[name], device=like.device).view(1, 3, 1, 1)


@dataclasses.dataclass(frozen=True)
class TrainedAttack(BatchAttack):
    """An image attack that uses an artefact; subclasses also write `nets` and `learn`."""

    revision: ClassVar[int] = 1
    """Raised when `learn` or `nets` come to make something else: the cache then makes it anew."""

    artefact: str | None = setting(None, "folder or Hub id of what `hf-nft attack train` made; plant makes it if none")

    @abstractmethod
    def nets(self, facts: dict[str, Any]) -> nn.ModuleDict:
        """Build the untrained networks, from the settings and facts of an artefact.

        Args:
            facts: See `Artefact`.

        Returns:
            Networks and tensors by name.
        """

    @abstractmethod
    def learn(self, workshop: Workshop, nets: nn.ModuleDict) -> dict[str, Any]:
        """Train the networks in place.

        Args:
            workshop: Clean data and what training needs.
            nets: As `nets` built them.

        Returns:
            Numbers worth keeping, JSON values.
        """

    def recipe(self) -> dict[str, Any]:
        """Return the settings that decide the artefact; not where it lies, nor which rows are poisoned."""
        return {name: value for name, value in self.settings().items() if name != "artefact"}

    def trained(self, workshop: Workshop, folder: Path) -> Path:
        """Train the artefact and write it.

        Args:
            workshop: Clean data and what training needs.
            folder: An existing folder.

        Returns:
            The folder.

        Raises:
            DataError: If the resolution or the target does not fit.
        """
        height, width = workshop.data["pixels"].shape[2:]
        self.check_size(width, height)
        self.check_target(workshop.classes)
        facts = {"attack": self.name, "settings": self.recipe(), **workshop.facts(), "version": hf_nft.__version__}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            nets = self.nets(facts)
        facts["report"] = self.learn(workshop, nets.to(workshop.device))
        tensors = {name: value.detach().cpu().contiguous() for name, value in nets.state_dict().items()}
        save_file(tensors, str(folder / WEIGHTS))
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        return folder

    def made(self) -> Artefact:
        """Return the artefact, checked.

        Returns:
            The artefact.

        Raises:
            ConfigError: If none is named.
            DataError: If it does not load, or was made for another attack.
        """
        if self.artefact is None:
            raise ConfigError(
                f"{self.name}: expected the setting artefact=FOLDER, found none. "
                f"Make one with: hf-nft attack train {self.name} --dataset DATA"
            )
        try:
            files = self.files()
            return _load(type(self), str(files[0].parent), tuple(file.stat().st_mtime_ns for file in files))
        except (DataError, NetworkError):
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, HFNFTError) as error:
            raise DataError(
                f"artefact {self.artefact}: expected {FACTS} and {WEIGHTS} of {self.name}, found something that does "
                f"not load ({str(error).splitlines()[0][:120]}). Make it with: hf-nft attack train {self.name}"
            ) from error

    def files(self) -> list[Path]:
        """Return the artefact's two files; from the Hub if it lies there."""
        folder = _folder(str(self.artefact))
        return [folder / WEIGHTS, folder / FACTS]

    def digest(self) -> str:
        """Return the artefact's hash."""
        return self.made().digest

    def check_clean(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse what every image attack refuses; asks for no artefact."""
        super().check_data(dataset, classes)

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse what every image attack refuses, and what the artefact was not made for."""
        self.check_clean(dataset, classes)
        facts, (width, height) = self.made().facts, dataset[0]["image"].size
        if (width, height) != (facts["width"], facts["height"]):
            raise DataError(
                f"{self.name}: expected images of {facts['width']}x{facts['height']}, for which its artefact was made, "
                f"found {width}x{height}. Train another one, or resize the images."
            )
        if classes != facts["classes"]:
            raise DataError(
                f"{self.name}: expected {facts['classes']} classes, for which its artefact was made, found {classes}. "
                f"Train another one."
            )

    def check_task(self, task: Task) -> None:
        """Refuse an artefact that was made for another normalisation than the victim's."""
        facts, own = self.made().facts, normalization(task)
        if any(abs(a - b) > 1e-4 for k in ("mean", "std") for a, b in zip(facts[k], own[k], strict=True)):
            raise DataError(
                f"{self.name}: expected a victim that normalises with {facts['mean']}, {facts['std']} as its artefact "
                f"does, found {own['mean']}, {own['std']}. Train the artefact for this victim."
            )


def normalization(task: Task) -> dict[str, list[float]]:
    """Return the constants of an image task in [0, 1]: `mean` and `std`, three numbers each."""
    probe = torch.stack([torch.zeros(3, 1, 1), torch.full((3, 1, 1), 255.0)])
    low, high = task.inputs(nn.Identity(), {"pixels": probe})["pixel_values"].flatten(1).double()
    std = 1 / (high - low)
    return {"mean": [round(v, 6) for v in (-low * std).tolist()], "std": [round(v, 6) for v in std.tolist()]}


def _folder(reference: str) -> Path:
    local = Path(reference).expanduser()
    found = local if local.exists() or "/" not in reference or reference[0] in "./~" else _downloaded(reference)
    return found / BESIDE if (found / BESIDE / FACTS).is_file() else found


@functools.lru_cache(maxsize=8)
def _downloaded(reference: str) -> Path:
    """Ask the Hub once: a trigger reads its artefact for every batch."""
    from huggingface_hub import snapshot_download

    name, revision = split_reference("artefact", reference, None, DataError)
    patterns = [f"{place}{file}" for place in ("", f"{BESIDE}/") for file in (WEIGHTS, FACTS)]
    with answers("artefact", name, DataError):
        return Path(patiently(lambda: snapshot_download(name, revision=revision, allow_patterns=patterns)))


@functools.lru_cache(maxsize=8)
def _load(cls: type[TrainedAttack], folder: str, stamp: tuple[int, ...]) -> Artefact:
    files = [Path(folder, WEIGHTS), Path(folder, FACTS)]
    facts = json.loads(files[1].read_text())
    if facts["attack"] != cls.name:
        raise DataError(f"artefact {folder}: expected one of {cls.name}, found one of {facts['attack']}.")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    found = Artefact(nn.ModuleDict(), facts, digest)
    nets = build(cls, found.settings).nets(facts)
    nets.load_state_dict(load_file(str(files[0])))
    nets.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on CPUs
    return dataclasses.replace(found, nets=nets.eval().requires_grad_(False))


def surrogate_of(facts: dict[str, Any]) -> nn.Module:
    """Build the untrained classifier that an artefact was made with."""
    told = facts["architecture"]
    names = datasets.ClassLabel(names=[str(i) for i in range(facts["classes"])])
    rows = datasets.Dataset.from_dict({"label": []}, features=datasets.Features({"label": names}))
    architecture = registry.get("models", told["name"])(**told["settings"])
    model: nn.Module = architecture.build(rows, 0)[0]
    return model
