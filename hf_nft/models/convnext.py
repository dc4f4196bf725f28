"""A small ConvNeXt, trained from scratch: depthwise convolutions, LayerNorm, no BatchNorm anywhere."""

import dataclasses
from typing import Any, ClassVar

from transformers import ConvNextConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


@dataclasses.dataclass(frozen=True)
class SmallConvNext(ImageArchitecture):
    """ConvNeXt of 1.0 M parameters at the default settings; patches of 2 for 32x32 images, no stochastic depth.

    Trained with optimizer=adamw, like the ViT.

    Source: Liu et al., A ConvNet for the 2020s, arXiv 2201.03545, section 2; the layers are transformers'.
    """

    name = "convnext"
    tiny: ClassVar[dict[str, Any]] = {"width": 8, "image_size": 16}

    patch_size: int = setting(2, "side of a patch in pixels, >= 1; three more stages each halve the picture")
    width: int = setting(32, "channels of the first stage, >= 8; they double from stage to stage")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        smallest = 8 * self.patch_size
        check(
            self,
            (self.patch_size >= 1, f"patch_size: expected >= 1, found {self.patch_size}"),
            (self.width >= 8, f"width: expected >= 8, found {self.width}"),
            (self.image_size >= smallest, f"image_size: expected >= {smallest}, found {self.image_size}"),
        )

    def config(self, labels: dict[str, Any]) -> ConvNextConfig:
        """Return transformers' ConvNeXt."""
        return ConvNextConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_sizes=[self.width * 2**stage for stage in range(4)],
            depths=[1, 1, 2, 1],
            **labels,
        )
