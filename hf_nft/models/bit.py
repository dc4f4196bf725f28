"""A small BiT, trained from scratch: a pre-activation ResNet with GroupNorm and standardised weights, no BatchNorm."""

import dataclasses
from typing import Any, ClassVar

from transformers import BitConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture

GROUPS = 8


@dataclasses.dataclass(frozen=True)
class SmallBiT(ImageArchitecture):
    """BiT of 0.5 M parameters at the default settings: one bottleneck block a stage, narrower than published.

    Source: Kolesnikov et al., Big Transfer (BiT): General Visual Representation Learning, arXiv 1912.11370, section
    3.2; the layers are transformers'.
    """

    name = "bit"
    tiny: ClassVar[dict[str, Any]] = {"width": 16, "image_size": 32}

    image_size: int = setting(64, "side of the input in pixels, >= 32; other sizes are resized to it")
    width: int = setting(32, "channels of the stem, a multiple of 8; the first stage passes on twice as many")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (
                self.width >= GROUPS and self.width % GROUPS == 0,
                f"width: expected a multiple of {GROUPS}, found {self.width}",
            ),
            (self.image_size >= 32, f"image_size: expected >= 32, found {self.image_size}"),
        )

    def config(self, labels: dict[str, Any]) -> BitConfig:
        """Return transformers' BiT, its groups as many whatever the width."""
        return BitConfig(
            layer_type="preactivation",
            embedding_size=self.width,
            hidden_sizes=[2 * self.width * 2**stage for stage in range(4)],
            depths=[1, 1, 1, 1],
            num_groups=GROUPS,
            **labels,
        )
