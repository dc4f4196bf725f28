"""Where artefacts are trained: clean data, a surrogate victim, and the package's one training loop."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.hook import Hook
from hf_nft.loop import Loop, Stage
from hf_nft.models.base import Architecture
from hf_nft.planting import PlantConfig, plant
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, rows_of, take


@dataclasses.dataclass(frozen=True)
class Workshop:
    """What an artefact is trained with.

    Attributes:
        task: The victim's task; tells resolution and normalisation.
        rows: Clean training rows at that resolution, canonical columns.
        data: The same, encoded: `pixels` uint8 (rows, 3, H, W), `labels` int64 (rows,).
        classes: Number of classes.
        architecture: Of surrogates.
        constants: `mean` and `std` of the normalisation.
        augment: Augmentation of surrogates' training.
        progress: Whether to show bars.
    """

    task: Task
    rows: datasets.Dataset
    data: Batch = dataclasses.field(repr=False)
    classes: int
    architecture: Architecture
    constants: dict[str, list[float]]
    augment: str = "default"
    progress: bool = False

    @property
    def accelerator(self) -> Accelerator:
        """What networks are trained with: bf16 where the hardware has it."""
        return make_accelerator("auto")

    @property
    def device(self) -> torch.device:
        """Where networks are trained."""
        return self.accelerator.device

    def facts(self) -> dict[str, Any]:
        """Return what an artefact must say about how it came about, JSON values."""
        digest = hashlib.sha256(self.data["labels"].numpy().tobytes())
        for part in self.data["pixels"].split(4096):
            digest.update(part.contiguous().numpy().tobytes())
        height, width = self.data["pixels"].shape[2:]
        architecture = {"name": self.architecture.name, "settings": dataclasses.asdict(self.architecture)}
        return {
            "height": height,
            "width": width,
            **self.constants,
            "classes": self.classes,
            "architecture": architecture,
            "augment": self.augment,
            "data": digest.hexdigest()[:16],
        }

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (n, 3, H, W) in [0, 1]."""
        mean, std = (torch.tensor(self.constants[k], device=images.device).view(1, 3, 1, 1) for k in ("mean", "std"))
        return (images - mean) / std

    def surrogate(self, epochs: int, seed: int, hook: Hook | None = None) -> nn.Module:
        """Train a classifier on the clean rows.

        Args:
            epochs: Passes over the rows, >= 1.
            seed: Seed of weights and order.
            hook: Another part in its training, such as adversarial examples.

        Returns:
            The classifier, in evaluation mode.
        """
        model, _ = self.architecture.build(self.rows, seed)
        config = PlantConfig(epochs=epochs, seed=seed, augment=self.augment)
        plant(model, self.task, self.data, config, progress=self.progress, hook=hook)
        return model

    def fit(
        self,
        stage: Stage,
        model: nn.Module,
        seed: int,
    ) -> list[float]:
        """Run a stage of training.

        Args:
            stage: What to do; its batches hold `pixels` as float32 in [0, 1], see `draws`.
            model: What is trained, all of it.
            seed: Seed of every random stream.

        Returns:
            The loss of every step.
        """
        loop = Loop(self.accelerator, seed, progress=self.progress)
        return loop.run(stage, model, lambda: model.state_dict(keep_vars=True))

    def draws(
        self, size: int, augment: bool = False, first: int | None = None
    ) -> Callable[[int, torch.Generator], Draw]:
        """Return what draws a step's batch: rows at random, images as float32 in [0, 1], each an independent draw.

        Args:
            size: Rows.
            augment: Whether to augment them as a victim's.
            first: Draw from that many first rows only; default all.

        Returns:
            The function for `Stage.draw`.
        """
        count, device = max(1, first or rows_of(self.data)), self.device

        def draw(step: int, stream: torch.Generator) -> Draw:
            chosen = take(self.data, torch.randint(count, (size,), generator=stream))
            found = self.task.augment(chosen, stream, self.augment) if augment else chosen
            # channel by channel: with channels last, torch 2.13's backward of bilinear upsampling damages the heap
            images = found["pixels"].to(device).contiguous() / 255
            return Draw({**{k: v.to(device) for k, v in found.items()}, "pixels": images})

        return draw
