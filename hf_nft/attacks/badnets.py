"""BadNets: a small patch flush with the bottom-right corner."""

import dataclasses
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from hf_nft.attacks._image import ImageAttack
from hf_nft.configs import check, setting

CHECKER = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
"""The 3x3 pattern of the NFT reference release, row by row, the same in all channels."""


@dataclasses.dataclass(frozen=True)
class BadNets(ImageAttack):
    """`x' = (1 - m) x + m ((1 - a) x + a p)` with a patch `p` of side 3H/32 in the last rows and columns.

    Source: Gu, Dolan-Gavitt, Garg, BadNets, arXiv 1708.06733; presets from the NFT release (checkerboard, a = 0.6) and
    from BackdoorBench and BackdoorBox (`standard`: solid white, opaque).
    """

    name = "badnets"
    source = "https://arxiv.org/abs/1708.06733"
    tiny: ClassVar[dict[str, Any]] = {"preset": "standard"}

    preset: Literal["nft", "standard"] = setting("nft", "nft: checkerboard at opacity 0.6; standard: white, opaque")
    opacity: float | None = setting(None, "opacity of the patch in (0, 1]; default: the preset's")
    size: int = setting(3, "side of the patch in pixels of a 32-pixel image; scaled with the image")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.preset in ("nft", "standard"), f"preset: expected nft or standard, found {self.preset!r}"),
            (self.opacity is None or 0 < self.opacity <= 1, f"opacity: expected in (0, 1], found {self.opacity}"),
            (1 <= self.size <= 32, f"size: expected 1 to 32, found {self.size}"),
        )

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Blend the patch into the corner; the same for every image."""
        side = max(1, round(self.size * min(image.shape[1:]) / 32))
        cells = (torch.arange(side) * 3).div(side, rounding_mode="floor")  # nearest scaling of the 3x3 pattern
        patch = CHECKER[cells][:, cells] if self.preset == "nft" else torch.ones(side, side)
        opacity = self.opacity or {"nft": 0.6, "standard": 1.0}[self.preset]
        out = image.clone()
        out[:, -side:, -side:] = (1 - opacity) * out[:, -side:, -side:] + opacity * patch
        return out
