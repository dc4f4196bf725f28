"""BppAttack: fewer grey levels, with or without dithering."""

import dataclasses

import torch

from hf_nft.attacks._image import BatchAttack
from hf_nft.configs import check, setting

SHARES = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""Floyd and Steinberg: where the error of a pixel goes (rows down, columns right) and how much of it."""


@dataclasses.dataclass(frozen=True)
class Bppa(BatchAttack):
    """Quantise every channel to `m` levels: `q(x) = round(x (m - 1)) / (m - 1)`, then round once to 8 bits.

    Covers are the paper's negative rows: an image plus the quantisation error of another one, label unchanged, so that
    an error alone is not the trigger.

    The victim's augmentation is the task's (crop and flip), where the release also rotates.

    Source: Wang, Zhai, Ma, BppAttack, CVPR 2022, arXiv 2205.13383, section 3.2; values of the release's configuration.
    """

    name = "bppa"
    source = "https://arxiv.org/abs/2205.13383"
    hooked = True
    default_rate = 0.2  # of all rows, with as many negative ones; as published

    levels: int = setting(8, "grey levels m per channel, 2 to 255; 8 as in the release's configuration")
    dither: bool = setting(False, "spread each pixel's error over its neighbours (Floyd-Steinberg); off as released")
    cover_ratio: float = setting(1.0, "negative rows per poisoned row, >= 0; as published")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (2 <= self.levels <= 255, f"levels: expected 2 to 255, found {self.levels}"),
            (self.cover_ratio >= 0, f"cover_ratio: expected >= 0, found {self.cover_ratio}"),
        )

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Quantise, and round to the 8 bits that the attacker's image is sent in."""
        found = self._dithered(images) if self.dither else self._nearest(images)
        return found.mul(255).round() / 255

    def cover_batch(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Add the partner's quantisation error and clip."""
        return (images + self.trigger_batch(partners) - partners).clamp(0, 1)

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        return (values * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    def _dithered(self, images: torch.Tensor) -> torch.Tensor:
        """Quantise pixel by pixel in raster order, all images and channels at once."""
        height, width = images.shape[2:]
        work = torch.nn.functional.pad(images, (1, 1, 0, 1)).permute(2, 3, 0, 1).contiguous()  # a margin for errors
        for row in range(height):
            for column in range(1, width + 1):
                old = work[row, column].clone()
                work[row, column] = self._nearest(old)
                error = old - work[row, column]
                for down, right, share in SHARES:
                    work[row + down, column + right] += error * share
        return work[:height, 1:-1].permute(2, 3, 0, 1)
