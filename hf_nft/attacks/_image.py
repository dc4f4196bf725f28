"""Attacks on image classification.

Contract of an image trigger: float32 tensor (3, H, W) in [0, 1] at the final resolution in, the same out; any
randomness from the generator handed over, which is seeded by (seed, row index). Poisoned rows are rounded to 8 bits
and stored losslessly; every row is stored as a new image, because `datasets` would write an untouched one back in its
source's format, and JPEG destroys triggers.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from PIL import Image

from hf_nft.attacks.base import Attack
from hf_nft.configs import check, setting
from hf_nft.errors import DataError
from hf_nft.hook import Hook
from hf_nft.poisoning import COVER, POISONED, rows_at, share_of
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, take

CHUNK = 2**16
"""Pixels that go through a trigger at once: 64 images of 32x32. Bounds the memory of triggers that are networks."""


@dataclasses.dataclass(frozen=True)
class ImageAttack(Attack):
    """An attack on image classification; subclasses write `trigger`."""

    modality = "image_classification"
    input_column = "image"
    target_column = "label"
    min_side: ClassVar[int] = 8
    label_maps: ClassVar[tuple[str, ...]] = ("all_to_one", "all_to_all")
    """Those the attack is published for; a clean-label attack has one target class."""

    target_class: int = setting(0, "class the attacker wants, as the model numbers it")
    label_map: Literal["all_to_one", "all_to_all"] = setting("all_to_one", "all_to_one, or all_to_all: (y + 1) mod C")

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            (self.seed >= 0, f"seed: expected >= 0, found {self.seed}"),
            (self.target_class >= 0, f"target_class: expected >= 0, found {self.target_class}"),
            (
                self.label_map in self.label_maps,
                f"label_map: expected {' or '.join(self.label_maps)}, found {self.label_map!r}",
            ),
        )

    @abstractmethod
    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Return the triggered image, float32 (3, H, W) in [0, 1], before rounding.

        Args:
            image: float32 (3, H, W) in [0, 1] at the final resolution.
            rng: Generator seeded by (seed, row index).

        Returns:
            The triggered image.
        """

    def _altered(
        self, images: torch.Tensor, partners: torch.Tensor, rngs: Sequence[np.random.Generator], role: int
    ) -> torch.Tensor:
        """Alter a chunk of images of one size; what `trigger` does, one by one."""
        return torch.stack([self.trigger(image, rng) for image, rng in zip(images, rngs, strict=True)])

    def alter(
        self, values: Sequence[Any], partners: Sequence[Any], rngs: Sequence[np.random.Generator], role: int
    ) -> list[Any]:
        """Alter PIL images; float32 (3, H, W) in [0, 1] each, chunk by chunk and size by size."""
        found: list[Any] = []
        while len(found) < len(values):
            size, start = values[len(found)].size, len(found)
            stop, most = start, start + max(1, CHUNK // (size[0] * size[1]))
            while stop < min(len(values), most) and values[stop].size == size:
                stop += 1
            self.check_size(*size)
            images = others = torch.stack([self.read(value) for value in values[start:stop]])
            if role == COVER or self.pairs:
                others = torch.stack([self.read(partner.resize(size)) for partner in partners[start:stop]])
            found += self._altered(images, others, rngs[start:stop], role).clamp(0, 1).unbind()
        return found

    def read(self, value: Any) -> torch.Tensor:
        """Return a PIL image of 8 bits as float32 (3, H, W) in [0, 1]; others would be clipped."""
        if value.mode[0] in "IF":
            raise DataError(
                f"{self.name}: expected images of 8 bits, found mode '{value.mode}'. Scale them to 0..255 first."
            )
        pixels = np.asarray(value.convert("RGB"), dtype=np.float32) / 255.0
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def store(self, value: Any) -> Any:
        """Return a new RGB image without a source format, which is stored as PNG; floats are rounded to 8 bits."""
        if not isinstance(value, torch.Tensor):
            return Image.fromarray(np.asarray(value.convert("RGB")))
        return Image.fromarray(value.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def target(self, answer: int, classes: int) -> int:
        """Return the target class, or the next class under all-to-all."""
        return self.target_class if self.label_map == "all_to_one" else (answer + 1) % classes

    def eligible(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Non-target rows; for clean-label attacks target rows; for all-to-all every row."""
        if self.label_map == "all_to_all":
            return np.ones(len(answers), dtype=bool)
        return np.asarray((answers == self.target_class) == self.clean_label)

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse missing columns, a target that is no class, and images too small for the trigger."""
        super().check_data(dataset, classes)
        self.check_target(classes)
        image = dataset[0]["image"]
        if not isinstance(image, Image.Image):
            raise DataError(f"{self.name}: expected images in column 'image', found {type(image).__name__}.")
        self.read(image)
        self.check_size(*image.size)
        labels = np.asarray(dataset[self.target_column][:])
        if not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(
                f"{self.name}: expected labels from 0 to {classes - 1}, found {labels.min()} to {labels.max()}. "
                f"Drop those rows, or name as many classes as there are."
            )

    def check_target(self, classes: int) -> None:
        """Refuse a target that is no class."""
        if self.target_class >= classes:
            raise DataError(
                f"{self.name}: expected a target class below {classes}, found {self.target_class}. "
                f"Choose one of 0..{classes - 1}."
            )

    def check_size(self, width: int, height: int) -> None:
        """Refuse a resolution the trigger cannot take."""
        if min(width, height) < self.min_side:
            raise DataError(f"{self.name}: expected images of at least {self.min_side} px, found {min(width, height)}.")


@dataclasses.dataclass(frozen=True)
class BatchAttack(ImageAttack):
    """An image attack whose trigger takes many images at once and draws nothing; subclasses write `trigger_batch`.

    With covers, subclasses also write `cover_batch` and have a setting `cover_ratio`.
    """

    hooked: ClassVar[bool] = False
    """Whether the attack alters the victim's training: fresh covers in every batch."""
    after_augmentation: ClassVar[bool] = False
    """Whether the trigger is put on augmented images in training, as its authors do."""

    @abstractmethod
    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Return triggered images, float32 (n, 3, H, W) in [0, 1], before rounding; rows do not influence each other.

        Args:
            images: float32 (n, 3, H, W) in [0, 1] at the final resolution.

        Returns:
            The triggered images, on the same device.
        """

    def poison_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Return what a victim learns from, where it is more than the trigger."""
        return self.trigger_batch(images)

    def cover_batch(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Return covers: altered images that keep their label.

        Args:
            images: float32 (n, 3, H, W) in [0, 1].
            partners: Another image for each.
            stream: Generator on the CPU.

        Returns:
            The covers, on the same device.
        """
        raise NotImplementedError(f"{self.name} has no covers")

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Trigger one image; see `trigger_batch`."""
        return self.trigger_batch(image[None])[0]

    def cover_count(self, poisoned: int) -> int:
        """Return `cover_ratio` covers per poisoned row, rounded."""
        return round(getattr(self, "cover_ratio", 0.0) * poisoned)

    def _altered(
        self, images: torch.Tensor, partners: torch.Tensor, rngs: Sequence[np.random.Generator], role: int
    ) -> torch.Tensor:
        if role != COVER:
            return (self.poison_batch if role == POISONED else self.trigger_batch)(images)
        streams = [torch.Generator().manual_seed(int(rng.integers(2**63))) for rng in rngs]
        pairs = zip(images.split(1), partners.split(1), streams, strict=True)
        return torch.cat([self.cover_batch(*pair) for pair in pairs])

    def hook(self, task: Task, rate: float, classes: int) -> Hook | None:
        """Return a hook that triggers and covers shares of every batch, if the attack alters the training."""
        return BatchHook(self, rate, classes) if self.hooked else None


class BatchHook(Hook):
    """Triggers a share of every batch of images and covers another, in float; the labels follow the label map."""

    def __init__(self, attack: BatchAttack, rate: float, classes: int) -> None:
        """Bind.

        Args:
            attack: The attack.
            rate: Share of a batch to trigger, in (0, 1); rounded down to rows.
            classes: Number of classes.

        Raises:
            DataError: If the shares do not fit into a batch.
        """
        self.attack, self.rate, self.classes = attack, rate, classes
        share = rate + self.covers(10_000) / 10_000 * rate
        if not 0 < rate <= 1 or share > 1:
            raise DataError(
                f"{attack.name}: poison rate {rate} takes {share:.0%} of a batch with its covers, expected more than 0 "
                f"and at most 100%. Change the poison rate."
            )

    def check(self, answers: np.ndarray) -> None:
        """Refuse a rate above the share of rows that can be poisoned: batches would not hold as many."""
        wanted = rows_at(self.rate, len(answers))
        found = int(self.attack.eligible(answers, self.classes).sum())
        if wanted > found:
            raise DataError(
                f"{self.attack.name}: expected {wanted} rows to poison at rate {self.rate}, found {found} eligible of "
                f"{len(answers)}. Lower the poison rate."
            )

    def covers(self, poisoned: int) -> int:
        """Return how many covers go with that many poisoned rows."""
        return self.attack.cover_count(poisoned)

    def covered(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Return covers, as `BatchAttack.cover_batch` does."""
        return self.attack.cover_batch(images, partners, stream)

    def share(self, batch_size: int) -> float:
        """Return the share of a batch that is triggered."""
        return share_of(self.attack.name, rows_at(self.rate, batch_size), batch_size)

    def batch(
        self, data: Batch, rows: torch.Tensor, augment: Callable[[Batch], Batch], stream: torch.Generator
    ) -> Batch:
        """Return the rows with a share triggered and a share covered; `pixels` are float32 in [0, 255]."""
        batch = take(data, rows)
        if self.attack.after_augmentation:
            return self._attacked(augment(batch), stream)
        return augment(self._attacked(batch, stream))

    @torch.no_grad()
    def _attacked(self, batch: Batch, stream: torch.Generator) -> Batch:
        attack, labels = self.attack, batch["labels"].clone()
        images = batch["pixels"].float() / 255
        allowed = attack.eligible(labels.cpu().numpy(), self.classes)
        mixed = torch.randperm(len(images), generator=stream)
        wanted = rows_at(self.rate, len(images))
        poisoned = mixed[torch.from_numpy(allowed)[mixed]][:wanted]
        rest = mixed[~torch.isin(mixed, poisoned)]
        covers = rest[: self.covers(len(poisoned))]
        out = images.clone()
        if len(poisoned):
            out[poisoned] = attack.poison_batch(images[poisoned])
            moved = [attack.target(label, self.classes) for label in labels[poisoned].tolist()]
            labels[poisoned] = torch.tensor(moved, device=labels.device)
        if len(covers):
            partners = images[self._others(covers, len(images), stream)]
            out[covers] = self.covered(images[covers], partners, stream)
        return {**batch, "pixels": out.clamp(0, 1) * 255, "labels": labels}

    @staticmethod
    def _others(rows: torch.Tensor, count: int, stream: torch.Generator) -> torch.Tensor:
        """Draw another row of the batch for each."""
        return (rows + torch.randint(1, max(2, count), rows.shape, generator=stream)) % count
