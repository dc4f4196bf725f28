"""FT: plain fine-tuning of all weights on the clean shots, the least that any cure has to beat."""

import dataclasses
import math

import torch
from torch import nn

from hf_nft.configs import check, setting
from hf_nft.defenses.base import Context, Defense, Outcome, label_loss, live_state, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw


@dataclasses.dataclass(frozen=True)
class FineTune(Defense):
    """SGD on all weights, cosine to 0, last iterate.

    Source: BackdoorBench's settings for CIFAR-10 (SGD lr 0.01, momentum 0.9, weight decay 5e-4, batch 256, 100 epochs).
    """

    name = "finetune"
    source = "https://arxiv.org/abs/2206.12654"

    batch_size: int = setting(256, "rows per step, >= 1, drawn with replacement")
    epochs: int = setting(100, "passes over the shots, >= 1")
    lr: float = setting(0.01, "learning rate at the start, > 0")
    momentum: float = setting(0.9, "SGD momentum, in [0, 1)")
    weight_decay: float = setting(5e-4, "weight decay, >= 0")
    mixup_alpha: float = setting(0.0, "MixUp parameter, >= 0; 1 gives the control 'weights instead of masks'")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.epochs >= 1, f"epochs: expected >= 1, found {self.epochs}"),
            (self.lr > 0, f"lr: expected > 0, found {self.lr}"),
            (0 <= self.momentum < 1, f"momentum: expected in [0, 1), found {self.momentum}"),
            (self.weight_decay >= 0, f"weight_decay: expected >= 0, found {self.weight_decay}"),
            (self.mixup_alpha >= 0, f"mixup_alpha: expected >= 0, found {self.mixup_alpha}"),
        )

    def run(self, context: Context) -> Outcome:
        """Fine-tune."""
        model, task, loop = context.model, context.task, context.loop
        model.requires_grad_(True)
        set_modes(model, statistics=True, dropout=True)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        steps = self.epochs * max(1, round(len(context.shots) / self.batch_size))

        def draw(step: int, stream: torch.Generator) -> Draw:
            return self.sample_mixed(context, stream, self.mixup_alpha)

        def objective(network: nn.Module, part: Draw) -> torch.Tensor:
            return label_loss(network, task, part)

        stage = Stage(
            "finetune",
            steps,
            draw,
            objective,
            optimizer,
            lambda step: self.lr * 0.5 * (1 + math.cos(math.pi * step / steps)),
        )
        loop.run(stage, model, lambda: live_state(model))
        return Outcome(model, {"steps": steps})
