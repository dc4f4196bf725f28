"""SIG: a horizontal sinusoid added to images of the target class, labels unchanged."""

import dataclasses
import math
from typing import Literal

import numpy as np
import torch

from hf_nft.attacks._image import ImageAttack
from hf_nft.configs import check, setting

WAVES = {"standard": (40.0, 6.0), "nft": (20.0, 0.80 * 32 / (2 * math.pi))}
"""Amplitude in grey levels and cycles per image width; the NFT release steps the phase by 0.80 per pixel of 32."""


@dataclasses.dataclass(frozen=True)
class SIG(ImageAttack):
    """`x' = clip(x + v)`, `v(i, j) = D sin(2 pi j f / W)` in grey levels of 255, the same for all rows and channels.

    The preset `nft` reproduces the NFT release, which stores v in 8 bits, where negative levels wrap around, and blends
    it in: `x' = 0.8 x + 0.2 (trunc(v) mod 256)`, a grating of two levels on a darker image.

    Source: Barni, Kallas, Tondi, ICIP 2019, equation 1; D = 40, f = 6 as in BackdoorBench.
    """

    name = "sig"
    source = "https://arxiv.org/abs/1902.11237"
    clean_label = True
    label_maps = ("all_to_one",)
    default_base = "target_class"
    default_rate = 0.8  # at 1.0 the class is never seen clean and its accuracy collapses

    preset: Literal["standard", "nft"] = setting("standard", "standard: the sinusoid, added; nft: wrapped and blended")
    delta: float | None = setting(None, "amplitude D in grey levels, in (0, 255]; default: the preset's, 40 or 20")
    frequency: float | None = setting(None, "cycles per image width, > 0; default: the preset's, 6 or 4.07")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.preset in WAVES, f"preset: expected standard or nft, found {self.preset!r}"),
            (self.delta is None or 0 < self.delta <= 255, f"delta: expected in (0, 255], found {self.delta}"),
            (self.frequency is None or self.frequency > 0, f"frequency: expected > 0, found {self.frequency}"),
        )

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Add the sinusoid and clip, or blend it in as the release does."""
        delta, frequency = WAVES[self.preset]
        delta, frequency, width = self.delta or delta, self.frequency or frequency, image.shape[2]
        wave = delta * torch.sin(2 * torch.pi * torch.arange(width) * frequency / width)
        if self.preset == "nft":
            return torch.lerp(image, wave.trunc().remainder(256) / 255, 0.2)
        return (image + wave / 255).clamp(0, 1)
