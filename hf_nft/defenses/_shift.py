"""Shifts: what the suspect's running means remember of a trigger, shown to the masks while they learn.

A trigger that moves a channel by d in a share p of the suspect's training data moves its running mean by p d. So the
distances of the running means from those of clean shots point to where the trigger takes a network; no neuron needs to
stand out for it. While masks learn, the inputs of all masked norms are displaced along them in some of the rows, by
more or less, and they are to be answered as the suspect answers the same rows without: what brings accuracy back
cannot bring back the way from there to the attacker's answer. How far a norm's input is moved in all is not measured:
each adds its own distance to what earlier ones have moved. The last norms are left alone: their means lie where the
suspect's training rows, which it was fitted to, took them, trigger or not.

Rows that are displaced look like the attacker's class, and masks that must not say so unlearn that class. Shots that
look like what displaced shots are answered are therefore drawn more often.

Source: this package's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import NFTLayer, mask_layers
from hf_nft.defenses._statistics import Excess
from hf_nft.defenses.base import Context, answers_to_shots, set_modes
from hf_nft.tasks.base import Task
from hf_nft.types import Draw, rows_of

TIMES = "row_shift"
"""Key of how many times the distance each row is displaced, among encoded rows."""
MADE_UP = 0.2
"""Share of rows drawn by how much a shot looks like what displaced shots are answered."""


class Displacement(ABC):
    """What displaces some rows while masks learn, and says which shots are to be drawn more often.

    Attributes:
        weights: How often each shot is to be drawn, float32 (shots,), of sum 1.
        most: Largest multiple of the distance, >= 0; each smaller one is as likely.
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

    def prepare(self, draw: Draw) -> None:  # noqa: B027  most have nothing to learn
        """Learn from a draw what its rows are displaced by."""

    @abstractmethod
    def forward(self, task: Task, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw whose rows are displaced; returns the model's output."""


@dataclass(frozen=True)
class Shifts(Displacement):
    """How inputs of norms are displaced.

    Attributes:
        by: Masked norms whose running mean lies elsewhere than that of clean shots, each with the distance in its
            input's units, float32 (channels,).
        answers: Mean probability of each class where all shots are displaced, float32 (classes,).
        weights: How often each shot is to be drawn, float32 (shots,), of sum 1.
        most: Largest multiple of the distance, >= 0; each smaller one is as likely.
    """

    by: list[tuple[NFTLayer, torch.Tensor]]
    answers: torch.Tensor
    weights: torch.Tensor
    most: float

    def forward(self, task: Task, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw whose rows are displaced; returns the model's output."""
        return _run(self.by, task, model, draw, draw.batch[TIMES])

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the leading answers to displaced shots; JSON values."""
        leading = self.answers.argsort(descending=True)[:5].tolist()
        return {"shift_answers": {answer: round(float(self.answers[answer]), 4) for answer in leading}}


def early(excess: Excess, late: float) -> int:
    """Return how many layers are displaced.

    Args:
        excess: What the suspect's statistics showed.
        late: Share of the masked layers, those nearest the output, that are not, in [0, 1): means there tell mostly of
            rows that the suspect was fitted to, which shots are not.

    Returns:
        Number of layers from the input on.
    """
    count = int(excess.layers.max()) + 1
    return count - round(late * count)


def distance(excess: Excess, late: float) -> float:
    """Return how far running means lie from those of the shots there, in standard deviations, as a root mean square."""
    return float(excess.shift[excess.layers < early(excess, late)].square().mean().sqrt())


def find(context: Context, model: nn.Module, excess: Excess, late: float, most: float, batch_size: int) -> Shifts:
    """Displace all shots as far as any row will be, and see what they are answered.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1, of a task with classes.
        excess: What its statistics showed.
        late: Share of the layers that are left alone, see `early`.
        most: Largest multiple of the distance, >= 0.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        How rows are to be displaced and drawn.
    """
    set_modes(model, statistics=False, dropout=False)
    by = []
    for number, layer in enumerate(list(mask_layers(model).values())[: early(excess, late)]):
        base: Any = layer.get_base_layer()
        shift = excess.shift[excess.layers == number]
        if shift.any():
            by.append((layer, shift.to(base.running_var.device) * (base.running_var.float() + base.eps).sqrt()))

    def displaced(network: nn.Module, draw: Draw) -> Any:
        return _run(by, context.task, network, draw, torch.full((rows_of(draw.batch),), most))

    own = answers_to_shots(context, model, batch_size)
    answers = answers_to_shots(context, model, batch_size, "answers to displaced shots", displaced).mean(0)
    return Shifts(by, answers, likely(own, answers), most)


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


def _run(by: list[tuple[NFTLayer, torch.Tensor]], task: Task, model: nn.Module, draw: Draw, times: torch.Tensor) -> Any:
    """Run a model while what enters each norm is displaced, row by row, by so many times its distance."""
    times = times.to(next(iter(draw.batch.values())).device)

    def displaced(shift: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        each = times.repeat_interleave(len(x) // len(times))  # a row may be several frames
        return x + torch.outer(each, shift).to(x.dtype).view(*x.shape[:2], *[1] * (x.dim() - 2))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, shift=shift: (displaced(shift, inputs[0]), *inputs[1:]))
        for layer, shift in by
    ]
    try:
        return task.forward(model, draw)
    finally:
        for hook in hooks:
            hook.remove()
