"""A small Vision Transformer, trained from scratch: patches as tokens, LayerNorm, no BatchNorm anywhere."""

import dataclasses
from typing import Any, ClassVar

from transformers import ViTConfig

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


@dataclasses.dataclass(frozen=True)
class SmallViT(ImageArchitecture):
    """ViT with 2.7 M parameters at the default settings: half the depth of ViT-Tiny, patches of 4 for 32x32 images.

    A transformer is trained with optimizer=adamw and has no dropout here; see the recipes.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929; width and heads of ViT-Tiny in Touvron
    et al., arXiv 2012.12877; the layers are transformers'.
    """

    name = "vit"
    tiny: ClassVar[dict[str, Any]] = {"hidden_size": 16, "layers": 2, "heads": 2, "image_size": 16}

    patch_size: int = setting(
        4, "side of a patch in pixels, >= 1, divides image_size; the number of tokens is (image / patch)^2 + 1"
    )
    hidden_size: int = setting(192, "width of a token, a multiple of the heads, >= 1; the MLP is four times as wide")
    layers: int = setting(6, "transformer blocks, >= 1")
    heads: int = setting(3, "attention heads, >= 1")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.layers >= 1, f"layers: expected >= 1, found {self.layers}"),
            (
                self.heads >= 1 and self.hidden_size >= 1 and self.hidden_size % self.heads == 0,
                f"hidden_size: expected a multiple of {self.heads} heads, found {self.hidden_size}",
            ),
            (
                self.patch_size >= 1 and self.image_size % self.patch_size == 0,
                f"image_size: expected a multiple of patch_size={self.patch_size}, found {self.image_size}",
            ),
        )

    def config(self, labels: dict[str, Any]) -> ViTConfig:
        """Return transformers' ViT."""
        return ViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            **labels,
        )
