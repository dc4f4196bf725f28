"""One input perturbation shared by all rows, which the masks learn to withstand.

Source: the universal perturbation of I-BAU (arXiv 2110.03735) and AWM (arXiv 2207.04497), carried over from step to
step and moved by the backward pass that the masks need anyway, as in free adversarial training (arXiv 1904.12843).
"""

import torch
from torch import nn

from hf_nft.defenses.base import Context
from hf_nft.types import Draw, take

STEP = 0.2
"""Length of one step of the perturbation, as a share of its radius."""


class Perturbation:
    """A perturbation within an L2 ball, of the shape of one row's input; starts at 0."""

    def __init__(self, context: Context, model: nn.Module, radius: float) -> None:
        """Start with none.

        Args:
            context: What the defense sees.
            model: The suspect.
            radius: Largest L2 norm, > 0.
        """
        self.context, self.model, self.radius = context, model, radius
        first = take(context.data, slice(0, 1))
        with torch.no_grad():
            self.delta = context.task.perturb(self._mixed(Draw(first)), None)[1].detach()
        self.delta.requires_grad_(True)

    def _mixed(self, draw: Draw) -> dict[str, object]:
        partner = draw.partner if draw.partner is not None else draw.batch
        return self.context.task.mix(self.model, draw.batch, partner, draw.lam)

    def loss(self, network: nn.Module, draw: Draw) -> torch.Tensor:
        """Cross-entropy of a draw with the perturbation added to every row, a scalar."""
        task = self.context.task
        return task.loss(network(**task.perturb(self._mixed(draw), self.delta)[0]), draw)

    def ascend(self) -> None:
        """Go one step up the loss whose backward pass has run, and back into the ball."""
        assert self.delta.grad is not None
        slope = self.context.loop.accelerator.reduce(self.delta.grad, reduction="mean")
        with torch.no_grad():
            # a gradient that overflowed under fp16 moves nothing
            self.delta += STEP * self.radius * (slope / slope.norm().clamp(min=1e-12)).nan_to_num(0.0)
            self.delta *= (self.radius / self.delta.norm().clamp(min=1e-12)).clamp(max=1.0)
        self.delta.grad = None
