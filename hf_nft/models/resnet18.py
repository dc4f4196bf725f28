"""The stock ResNet-18 of transformers: a stem that quarters the image, basic blocks, BatchNorm."""

import dataclasses
from typing import Any, ClassVar

from transformers import ResNetConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


@dataclasses.dataclass(frozen=True)
class ResNet18(ImageArchitecture):
    """ResNet-18 with 11.2 M parameters; at 64x64 it takes as much work as PreAct-ResNet-18 of width 32 at 32x32.

    Source: He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, table 1; the layers are
    transformers'.
    """

    name = "resnet18"
    tiny: ClassVar[dict[str, Any]] = {"width": 16, "image_size": 32}

    image_size: int = setting(64, "side of the input in pixels, >= 32; other sizes are resized to it")
    width: int = setting(64, "channels of the stem and of the first stage, >= 16; 64 is the published network")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            # below it oneDNN writes past its buffer in the gradient of a strided 1x1 convolution (CPU, channels last)
            (self.width >= 16, f"width: expected >= 16, found {self.width}"),
            # below it the last stage sees one pixel, and its bf16 gradient is not always finite on CPUs
            (self.image_size >= 32, f"image_size: expected >= 32, found {self.image_size}"),
        )

    def config(self, labels: dict[str, Any]) -> ResNetConfig:
        """Return transformers' ResNet with basic blocks."""
        return ResNetConfig(
            layer_type="basic",
            depths=[2, 2, 2, 2],
            embedding_size=self.width,
            hidden_sizes=[self.width * 2**stage for stage in range(4)],
            **labels,
        )
