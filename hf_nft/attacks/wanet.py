"""WaNet: a smooth, fixed warp of the whole image."""

import dataclasses
import functools

import numpy as np
import torch
from torch.nn import functional as F

from hf_nft.attacks._image import BatchAttack
from hf_nft.configs import check, setting


@dataclasses.dataclass(frozen=True)
class WaNet(BatchAttack):
    """`x' = grid_sample(x, T)`, `T = clip((I + S g / H) r, -1, 1)` with one smooth random field `g` for all images.

    Covers are warped by `T` plus fresh noise of a pixel's size and keep their label, so that only the exact warp is
    learnt. The displacement is about a quarter of a pixel at every size; at 224 pixels use grid=28 and strength=1.

    The victim's augmentation is the task's (crop and flip), where the release also rotates.

    Source: Nguyen and Tran, WaNet, ICLR 2021, arXiv 2102.10369, equations 3 to 6; values of its release.
    """

    name = "wanet"
    source = "https://arxiv.org/abs/2102.10369"
    hooked = True

    grid: int = setting(4, "control points k per side of the field, >= 2; as published up to 64 pixels")
    strength: float = setting(0.5, "strength S of the warp, > 0; as published")
    rescale: float = setting(1.0, "factor r on the sampling grid, > 0; as published")
    cover_ratio: float = setting(2.0, "noise rows per poisoned row, >= 0; as published")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.grid >= 2, f"grid: expected >= 2, found {self.grid}"),
            (self.strength > 0, f"strength: expected > 0, found {self.strength}"),
            (self.rescale > 0, f"rescale: expected > 0, found {self.rescale}"),
            (self.cover_ratio >= 0, f"cover_ratio: expected >= 0, found {self.cover_ratio}"),
        )

    def sampling(self, height: int, width: int) -> torch.Tensor:
        """Return the sampling grid `T`, float32 (H, W, 2) in [-1, 1], the last axis being (column, row)."""
        field = _field(self.seed, self.grid, height, width)
        pixel = torch.tensor([self.strength / width, self.strength / height])
        return ((_identity(height, width) + field * pixel) * self.rescale).clamp(-1, 1)

    def trigger_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Warp by the fixed field."""
        sampling = self.sampling(*images.shape[2:]).to(images.device)
        return _warped(images, sampling.expand(len(images), -1, -1, -1))

    def cover_batch(self, images: torch.Tensor, partners: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        """Warp by the field plus uniform noise of up to `1 / H`, drawn per image and pixel."""
        height, width = images.shape[2:]
        noise = torch.rand((len(images), height, width, 2), generator=stream) * 2 - 1
        sampling = self.sampling(height, width) + noise / torch.tensor([width, height])
        return _warped(images, sampling.clamp(-1, 1).to(images.device))


@functools.lru_cache(maxsize=8)
def _field(seed: int, grid: int, height: int, width: int) -> torch.Tensor:
    """Draw the field `g`, float32 (H, W, 2): uniform control points over their mean size, upsampled bicubically."""
    points = torch.from_numpy(np.random.default_rng((seed, 6)).uniform(-1, 1, (1, 2, grid, grid))).float()
    points = points / points.abs().mean()
    return F.interpolate(points, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def _identity(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)


def _warped(images: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
    warped = F.grid_sample(images, sampling, mode="bilinear", padding_mode="zeros", align_corners=True)
    return warped.clamp(0, 1)  # interpolation may leave the range by a rounding error
