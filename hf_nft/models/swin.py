"""A small Swin Transformer, trained from scratch: attention within windows, no BatchNorm."""

import dataclasses
from typing import Any, ClassVar

from transformers import SwinConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


@dataclasses.dataclass(frozen=True)
class SmallSwin(ImageArchitecture):
    """Swin Transformer of 0.7 M parameters at the default settings; patches of 2 for 32x32 images.

    Stochastic depth is off. Trained with optimizer=adamw, like the ViT.

    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, arXiv 2103.14030,
    section 3; the layers are transformers'.
    """

    name = "swin"
    tiny: ClassVar[dict[str, Any]] = {"width": 16, "image_size": 16, "window": 2}

    patch_size: int = setting(2, "side of a patch in pixels, >= 1; two more stages each halve the picture")
    width: int = setting(32, "channels of the first stage, a multiple of 16; they double from stage to stage")
    window: int = setting(4, "side of a window of attention in patches, >= 2; the last stage holds at least one")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        step = 4 * self.patch_size * self.window
        check(
            self,
            (self.patch_size >= 1, f"patch_size: expected >= 1, found {self.patch_size}"),
            (self.width >= 16 and self.width % 16 == 0, f"width: expected a multiple of 16, found {self.width}"),
            (self.window >= 2, f"window: expected >= 2, found {self.window}"),
            (
                self.patch_size >= 1 and self.window >= 2 and self.image_size % step == 0,
                f"image_size: expected a multiple of {step}, found {self.image_size}",
            ),
        )

    def config(self, labels: dict[str, Any]) -> SwinConfig:
        """Return transformers' Swin with two blocks a stage, one of them with shifted windows."""
        return SwinConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depths=[2, 2, 2],
            num_heads=[self.width // 16 * 2**stage for stage in range(3)],
            window_size=self.window,
            drop_path_rate=0.0,
            **labels,
        )
