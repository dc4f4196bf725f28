"""Control: refresh BatchNorm statistics and change nothing else.

NFT in training mode overwrites the victim's statistics while it trains masks; this control runs the same forward
passes with all masks at 1, so that what the statistics do is not credited to the masks (or blamed on them).
"""

import dataclasses

import torch
from torch import nn

from hf_nft.configs import check, setting
from hf_nft.defenses.base import Context, Defense, Outcome, label_loss, live_state, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw


@dataclasses.dataclass(frozen=True)
class BNRefreshOnly(Defense):
    """The forward passes of NFT's `paper` preset, without a gradient."""

    name = "bn_refresh_only"
    source = "control"

    steps: int = setting(1000, "forward passes, >= 0")
    mixup_alpha: float = setting(1.0, "MixUp parameter of the batches, >= 0; 0 for plain batches")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.steps >= 0, f"steps: expected >= 0, found {self.steps}"),
            (self.mixup_alpha >= 0, f"mixup_alpha: expected >= 0, found {self.mixup_alpha}"),
        )

    def run(self, context: Context) -> Outcome:
        """Pass batches through the model in training mode."""
        model, task = context.model, context.task
        model.requires_grad_(False)
        set_modes(model, statistics=True, dropout=False)

        def objective(network: nn.Module, draw: Draw) -> torch.Tensor:
            return label_loss(network, task, draw)

        def draw(step: int, stream: torch.Generator) -> Draw:
            return self.sample_mixed(context, stream, self.mixup_alpha)

        context.loop.run(Stage("refresh", self.steps, draw, objective, None), model, lambda: live_state(model))
        return Outcome(model, {})
