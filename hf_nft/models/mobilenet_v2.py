"""MobileNetV2: inverted residuals, depthwise convolutions, BatchNorm that remembers its last batch alone."""

import dataclasses
from typing import Any, ClassVar

from transformers import MobileNetV2Config

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


@dataclasses.dataclass(frozen=True)
class SmallMobileNetV2(ImageArchitecture):
    """MobileNetV2 of transformers; at most 8x smaller than the image inside, dropout is off.

    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381, section 4; the
    layers are transformers'.
    """

    name = "mobilenet_v2"
    tiny: ClassVar[dict[str, Any]] = {"width": 0.1, "image_size": 16}

    width: float = setting(0.35, "factor on the published channels, in (0, 1.4]")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(self, (0 < self.width <= 1.4, f"width: expected in (0, 1.4], found {self.width}"))

    def config(self, labels: dict[str, Any]) -> MobileNetV2Config:
        """Return transformers' MobileNetV2 with an output stride of 8."""
        return MobileNetV2Config(
            image_size=self.image_size,
            depth_multiplier=self.width,
            output_stride=8,
            finegrained_output=False,
            tf_padding=False,
            classifier_dropout_prob=0.0,
            **labels,
        )
