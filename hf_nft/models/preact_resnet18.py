"""Pre-activation ResNet-18 for 32x32 work, registered with transformers; saves and loads as an ordinary directory.

The stock transformers ResNet shrinks 32x32 inputs to 8x8 in its stem, which costs accuracy on CIFAR-size images.
"""

import dataclasses
from typing import Any, ClassVar

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

from hf_nft.configs import check, setting
from hf_nft.models.base import ImageArchitecture


class PreActResNetConfig(PreTrainedConfig):
    """Configuration: `width` of the first stage, blocks per stage, input side in pixels."""

    model_type = "hf_nft_preact_resnet"
    width: int = 64
    blocks: tuple[int, ...] | list[int] = (2, 2, 2, 2)
    image_size: int = 32


class PreActBlock(nn.Module):
    """Norm -> ReLU -> conv, twice, beside the identity (or a 1x1 convolution of the activated input)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        resized = stride != 1 or width_in != width_out
        self.stride = stride
        self.shortcut = nn.Conv2d(width_in, width_out, 1, bias=False) if resized else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (rows, width_in, H, W) to (rows, width_out, H / stride, W / stride)."""
        active = F.relu(self.bn1(hidden))
        # the pool is the stride: with it in the convolution, oneDNN writes past its buffer in the weight gradient of
        # fewer channels than a vector holds (torch 2.13 on a CPU, channels last)
        identity = hidden if self.shortcut is None else self.shortcut(F.avg_pool2d(active, 1, self.stride))
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + identity


class PreActResNetForImageClassification(PreTrainedModel):
    """PreAct-ResNet with an image-classification head: no stem norm and no final norm, as in BackdoorBench's victims.

    Source: He et al., Identity Mappings in Deep Residual Networks, arXiv 1603.05027, figure 1b.
    """

    config_class = PreActResNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: PreActResNetConfig) -> None:
        """Build `config.blocks` pre-activation blocks per stage; the width doubles from stage to stage."""
        super().__init__(config)
        self.stem = nn.Conv2d(3, config.width, 3, 1, 1, bias=False)
        stages, width_in = [], config.width
        for i, count in enumerate(config.blocks):
            width_out = config.width * 2**i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            stages.append(
                nn.Sequential(
                    *[PreActBlock(width_in if j == 0 else width_out, width_out, s) for j, s in enumerate(strides)]
                )
            )
            width_in = width_out
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(width_in, int(config.num_labels or 0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.reset_running_stats()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify normalised images.

        Args:
            pixel_values: float (rows, 3, H, W).
            labels: int64 (rows,); adds the mean cross-entropy as `loss`.
            **kwargs: Ignored arguments that transformers' callers pass, such as `return_dict`.

        Returns:
            Output with `logits` (rows, num_labels).
        """
        hidden = self.stem(pixel_values)
        for stage in self.stages:
            hidden = stage(hidden)
        logits = self.classifier(hidden.mean((2, 3)))
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(PreActResNetConfig.model_type, PreActResNetConfig)
AutoModelForImageClassification.register(PreActResNetConfig, PreActResNetForImageClassification)
AutoImageProcessor.register(PreActResNetConfig, slow_image_processor_class=ViTImageProcessorPil)


@dataclasses.dataclass(frozen=True)
class PreActResNet18(ImageArchitecture):
    """PreAct-ResNet-18; width 64 has 11.2 M parameters, width 32 has 2.8 M and trains on a CPU."""

    name = "preact_resnet18"
    tiny: ClassVar[dict[str, Any]] = {"width": 4, "image_size": 16}

    width: int = setting(32, "channels of the first stage, >= 1; 64 is the published network")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(self, (self.width >= 1, f"width: expected >= 1, found {self.width}"))

    def config(self, labels: dict[str, Any]) -> PreActResNetConfig:
        """Return the registered configuration."""
        return PreActResNetConfig(width=self.width, image_size=self.image_size, **labels)
