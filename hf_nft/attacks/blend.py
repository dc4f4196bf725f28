"""Blend: a fixed full-size picture mixed into the image."""

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from hf_nft.attacks._image import ImageAttack
from hf_nft.attacks._pictures import file_digest, fixed_noise, picture
from hf_nft.configs import check, setting


@dataclasses.dataclass(frozen=True)
class Blend(ImageAttack):
    """`x' = (1 - a) x + a k`, with `k` uniform noise drawn once at 32x32 and scaled by nearest neighbour, or a picture.

    Source: Chen et al., Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning, arXiv 1712.05526;
    noise and a = 0.2 as in the NFT release, whose noise file is uniform on 0..254.
    """

    name = "blend"
    source = "https://arxiv.org/abs/1712.05526"

    preset: Literal["nft", "image"] = setting("nft", "nft: fixed uniform noise; image: the picture named by `picture`")
    opacity: float = setting(0.2, "weight of the picture, in (0, 1]; the same in training and test")
    picture: str | None = setting(None, "path of the picture for the preset `image`")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (0 < self.opacity <= 1, f"opacity: expected in (0, 1], found {self.opacity}"),
            (self.preset in ("nft", "image"), f"preset: expected nft or image, found {self.preset!r}"),
            ((self.preset == "image") == (self.picture is not None), "picture: goes with preset=image, and only then"),
        )

    def digest(self) -> str:
        """Return the hash of the picture."""
        return file_digest(self.picture)

    def trigger(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Mix the fixed picture into the whole image."""
        height, width = image.shape[1:]
        if self.picture is None:
            key = F.interpolate(fixed_noise(self.seed, 32)[None], (height, width), mode="nearest")[0]
        else:
            drawn = picture(self.picture, "RGB", (width, height))
            key = torch.from_numpy(np.asarray(drawn, dtype=np.float32) / 255.0).permute(2, 0, 1)
        return torch.lerp(image, key, self.opacity).clamp(0, 1)
