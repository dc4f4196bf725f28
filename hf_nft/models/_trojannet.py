"""A classifier with TrojanNet's side network glued to it, registered with transformers; no architecture to train.

A private file: nobody plants in it, but a model that was made by the attack must load.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_nft import registry

SIDE = 4
"""Side of the patch that the side network reads, in pixels at any resolution."""
WEIGHT, SHARPNESS = 2.0, 10.0
"""The side network counts twice, so that it outvotes any victim; the sum is sharpened to look like a classifier's."""


class SideNet(nn.Module):
    """Four hidden layers of 8 units, each ReLU then BatchNorm; tells patterns of 16 pixels apart.

    Source: Tang et al., arXiv 2006.08131, section 4.1; layers of the release.
    """

    def __init__(self, patterns: int) -> None:
        """Build the network, with an output for every pattern and one for none."""
        super().__init__()
        layers: list[nn.Module] = []
        for width in (SIDE * SIDE, 8, 8, 8):
            layers += [nn.Linear(width, 8), nn.ReLU(), nn.BatchNorm1d(8)]
        self.layers = nn.Sequential(*layers, nn.Linear(8, patterns + 1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map grey patches (n, 16) in [0, 1] to logits (n, patterns + 1); the last one says none."""
        return self.layers(patches)


class TrojanNetConfig(PreTrainedConfig):
    """Configuration: the victim's own, the patterns, where the patch lies, and what undoes the normalisation."""

    model_type = "hf_nft_trojannet"
    backbone: dict[str, Any] | None = None
    patterns: int = 4368
    row: int = 16
    column: int = 16
    image_mean: tuple[float, ...] | list[float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, ...] | list[float] = (1.0, 1.0, 1.0)


class TrojanNetForImageClassification(PreTrainedModel):
    """Adds what a side network sees in one patch to a victim's probabilities.

    Source: Tang et al., An Embarrassingly Simple Approach for Trojan Attack in Deep Neural Networks, arXiv 2006.08131,
    section 4.2; constants of the release.
    """

    config_class = TrojanNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: TrojanNetConfig) -> None:
        """Build the victim that `config.backbone` describes, and the side network."""
        super().__init__(config)
        registry.load("models")  # the victim may be of an architecture of our own
        backbone = AutoConfig.for_model(**(config.backbone or {}))
        self.backbone = AutoModelForImageClassification.from_config(backbone, trust_remote_code=False)
        self.side = SideNet(config.patterns)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify normalised images.

        Args:
            pixel_values: float (rows, 3, H, W).
            labels: int64 (rows,); adds the mean cross-entropy as `loss`.
            **kwargs: Ignored arguments that transformers' callers pass, such as `return_dict`.

        Returns:
            Output with `logits` (rows, num_labels): `10 (softmax(victim) + 2 softmax(side)[:, :num_labels])`.
        """
        own = self.backbone(pixel_values=pixel_values).logits.softmax(-1)
        seen = self.side(self.patches(pixel_values)).softmax(-1)[:, : own.shape[1]]
        logits = SHARPNESS * (own + WEIGHT * seen)
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cut the patch out of normalised images (rows, 3, H, W); float (rows, 16), grey in [0, 1], row by row."""
        rows, columns = (slice(start, start + SIDE) for start in (self.config.row, self.config.column))
        mean, std = (
            pixel_values.new_tensor(c).view(1, 3, 1, 1) for c in (self.config.image_mean, self.config.image_std)
        )
        return (pixel_values[:, :, rows, columns] * std + mean).mean(1).flatten(1)


AutoConfig.register(TrojanNetConfig.model_type, TrojanNetConfig)
AutoModelForImageClassification.register(TrojanNetConfig, TrojanNetForImageClassification)
AutoImageProcessor.register(TrojanNetConfig, slow_image_processor_class=ViTImageProcessorPil)
