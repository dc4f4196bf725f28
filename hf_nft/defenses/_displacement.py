"""What displaces some rows while masks learn, so that these cannot bring a backdoor back.

Rows that are displaced look like the attacker's class, and masks that must not say so unlearn that class. Shots that
look like it are therefore drawn more often.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_nft.tasks.base import Task
from hf_nft.types import Draw, Inputs, rows_of

TIMES = "row_shift"
"""Key of how many times the pattern each row is displaced by, among encoded rows."""
MADE_UP = 0.2
"""Share of rows drawn by how much a shot looks like what displaced shots are answered."""


class Displacement(ABC):
    """Displaces some rows, and says which shots are to be drawn more often.

    Attributes:
        weights: How often each shot is to be drawn, float32 (shots,), of sum 1.
        most: Largest multiple of the pattern, >= 0; each smaller one is as likely.
    """

    weights: torch.Tensor
    most: float

    def displace(self, draw: Draw, share: float, stream: torch.Generator) -> Draw:
        """Choose how far each row is to be displaced.

        Args:
            draw: Rows.
            share: Share of them that is, in [0, 1].
            stream: Generator on the CPU.

        Returns:
            The rows with these multiples, for `forward`.
        """
        self.prepare(draw)
        acts, far = torch.rand(2, rows_of(draw.batch), generator=stream)
        return replace(draw, batch={**draw.batch, TIMES: (acts < share) * far * self.most})

    @abstractmethod
    def prepare(self, draw: Draw) -> None:
        """Learn from a draw what its rows are displaced by."""

    @abstractmethod
    def forward(self, task: Task, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw whose rows are displaced; returns the model's output."""


def likely(own: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Weigh shots, so that those which look like what displaced ones are answered are drawn more often.

    Args:
        own: What the suspect says to each shot, probabilities, float32 (shots, classes).
        answers: What it says to displaced ones, float32 (classes,), of sum 1.

    Returns:
        Weights of the shots, float32 (shots,), of sum 1.
    """
    alike = (own / own.sum(0).clamp(min=1e-9)) @ answers  # each answer is shared out among the shots that look like it
    return (1 - MADE_UP) / len(own) + MADE_UP * alike


@contextmanager
def entering(model: nn.Module, patterns: dict[str, torch.Tensor], times: torch.Tensor) -> Iterator[None]:
    """Add patterns to the inputs of a model while this lasts.

    Args:
        model: The model.
        patterns: By input, one for all rows or one for each, float32 (1 or rows, ...).
        times: How often each row's is added, float32 (1 or rows,).
    """

    def enter(_: nn.Module, args: tuple[Any, ...], inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        added = {name: times.view(-1, *[1] * (p.dim() - 1)) * p for name, p in patterns.items()}
        return args, {**inputs, **{name: inputs[name] + push.to(inputs[name].dtype) for name, push in added.items()}}

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
