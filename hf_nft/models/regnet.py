"""RegNetY: grouped convolutions, squeeze-and-excitation, BatchNorm."""

import dataclasses
from typing import Any, ClassVar

from transformers import RegNetConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture

STEM = 32
"""Channels of the stem, which halves the image; as published."""


@dataclasses.dataclass(frozen=True)
class RegNet(ImageArchitecture):
    """RegNetY of 0.3 M parameters at the default settings, shaped like the published smallest but shallower.

    Source: Radosavovic et al., Designing Network Design Spaces, arXiv 2003.13678, section 4; the layers are
    transformers'.
    """

    name = "regnet"
    tiny: ClassVar[dict[str, Any]] = {"width": 16, "image_size": 32}

    image_size: int = setting(64, "side of the input in pixels, >= 32; other sizes are resized to it")
    width: int = setting(32, "channels of the first stage, a multiple of 16; they double from stage to stage")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.width >= 16 and self.width % 16 == 0, f"width: expected a multiple of 16, found {self.width}"),
            (self.image_size >= 32, f"image_size: expected >= 32, found {self.image_size}"),
        )

    def config(self, labels: dict[str, Any]) -> RegNetConfig:
        """Return transformers' RegNetY with groups of 16 channels."""
        return RegNetConfig(
            layer_type="y",
            embedding_size=STEM,
            hidden_sizes=[self.width * 2**stage for stage in range(4)],
            depths=[1, 1, 2, 1],
            groups_width=16,
            **labels,
        )
