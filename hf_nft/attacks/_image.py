"""Attacks on image classification.

Contract of an image trigger: float32 tensor (3, H, W) in [0, 1] at the final resolution in, the same out; any
randomness from the generator handed over, which is seeded by (seed, row index). Poisoned rows are rounded to 8 bits
and stored losslessly; every row is stored as a new image, because `datasets` would write an untouched one back in its
source's format, and JPEG destroys triggers.
"""

import dataclasses
import functools
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from PIL import Image

from hf_nft.attacks.base import Attack
from hf_nft.configs import check, setting
from hf_nft.errors import DataError


@dataclasses.dataclass(frozen=True)
class ImageAttack(Attack):
    """An attack on image classification; subclasses write `trigger`."""

    modality = "image_classification"
    input_column = "image"
    target_column = "label"
    min_side: ClassVar[int] = 8

    target_class: int = setting(0, "class the attacker wants, as the model numbers it")
    label_map: Literal["all_to_one", "all_to_all"] = setting("all_to_one", "all_to_one, or all_to_all: (y + 1) mod C")

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            (self.target_class >= 0, f"target_class: expected >= 0, found {self.target_class}"),
            (self.label_map in ("all_to_one", "all_to_all"), f"label_map: found {self.label_map!r}"),
            (not (self.clean_label and self.label_map == "all_to_all"), "a clean-label attack has one target class"),
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

    def apply(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Trigger a PIL image, rounding to 8 bits."""
        pixels = np.asarray(example["image"].convert("RGB"), dtype=np.float32) / 255.0
        triggered = self.trigger(torch.from_numpy(pixels).permute(2, 0, 1), rng)
        grey = triggered.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return {**example, "image": Image.fromarray(grey)}

    def store(self, value: Any) -> Any:
        """Return a new RGB image without a source format, which is stored as PNG."""
        return Image.fromarray(np.asarray(value.convert("RGB")))

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
        if self.target_class >= classes:
            raise DataError(
                f"{self.name}: expected a target class below {classes}, found {self.target_class}. "
                f"Choose one of 0..{classes - 1}."
            )
        side = min(dataset[0]["image"].size)
        if side < self.min_side:
            raise DataError(f"{self.name}: expected images of at least {self.min_side} px, found {side}.")


@functools.lru_cache(maxsize=8)
def fixed_noise(seed: int, side: int) -> torch.Tensor:
    """Draw uniform integers 0..255 once per seed and side; float32 (3, side, side) in [0, 1]."""
    noise = np.random.default_rng((seed, 3)).integers(0, 256, (3, side, side))
    return torch.from_numpy(noise.astype(np.float32) / 255.0)
