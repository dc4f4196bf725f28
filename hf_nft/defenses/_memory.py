"""What the suspect's running means remember, beside what clean shots and their choice explain.

A trigger that moves a channel by d in a share p of the suspect's training data moves its running mean by p d. So the
distances of the running means from those of clean shots point to where the trigger takes a network; no neuron needs to
stand out for it. They are small, and another choice of shots would move means as far. But that it does along a few
directions, those in which shots of a class differ, and it does so in all norms together. So distances are measured in
units of what the choice of shots explains along each direction, as a matched filter does; if they are far longer than
that, the suspect was trained on something that the shots do not show.

The last norms do not count: their means lie where the suspect's training rows, which it was fitted to, took them,
trigger or not.

Source: this package's. Matched filters: Turin, An Introduction to Matched Filters, 1960.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from hf_nft.adapter import NFTLayer, mask_layers
from hf_nft.defenses._statistics import Excess, weights_of
from hf_nft.defenses.base import Context, set_modes
from hf_nft.loop import Stage
from hf_nft.shots import Shots
from hf_nft.types import Draw, rows_of, take

FINE, COARSE = 0.1, 1.0
"""Variance of distances for other reasons than the choice of shots, as a share of what that explains on average: little
where directions are compared; as much again where distances are judged, of which a benign model's are most."""


@dataclass(frozen=True)
class Memory:
    """How far running means lie from those of the shots, and how far another choice of shots would move these.

    Channels are those of all norms that count, one after the other; their units are running standard deviations.

    Attributes:
        layers: The norms.
        spread: Running standard deviations, float32 (channels,).
        distance: Running mean less that of the shots, float32 (channels,).
        axes: Directions in which the mean varies with the choice of shots, orthonormal, float32 (directions, channels).
        chance: Its variance along each, float32 (directions,).
        quiet: What enters each channel, mean over places, for each shot as it is, float32 (shots, channels).
    """

    layers: list[NFTLayer]
    spread: torch.Tensor
    distance: torch.Tensor
    axes: torch.Tensor
    chance: torch.Tensor
    quiet: torch.Tensor

    def whiten(self, moved: torch.Tensor, other: float = FINE) -> torch.Tensor:
        """Measure means' moves, float32 (channels,), in what explains distances along each direction."""
        floor = (other * self.chance.sum() / len(self.distance)).clamp(min=1e-12)
        along = (moved @ self.axes.T) * ((self.chance + floor).rsqrt() - floor.rsqrt())
        return moved * floor.rsqrt() + along @ self.axes

    @property
    def ratio(self) -> float:
        """Squared distance, over what chance and other reasons explain, mean over channels."""
        return float(self.whiten(self.distance, COARSE).square().mean())

    def agreement(self, moved: torch.Tensor) -> torch.Tensor:
        """Cosine of means' moves, float32 (channels,), and the distances, both whitened; float32 ()."""
        return cosine_similarity(self.whiten(moved), self.whiten(self.distance), 0)

    def explained(self, moved: torch.Tensor) -> torch.Tensor:
        """Return the part of the distances that is along some moves, float32 (channels,); none if they disagree."""
        along = self.whiten(moved)
        return moved * (along @ self.whiten(self.distance) / along.square().sum()).clamp(min=0)

    def measured(self, heard: list[torch.Tensor]) -> torch.Tensor:
        """Return what was heard, see `listening`, in standard deviations; float32 (rows, channels)."""
        return torch.cat(heard, 1) / self.spread


def remember(context: Context, model: nn.Module, excess: Excess, late: float, batch_size: int) -> Memory | None:
    """Measure how far running means lie from those of the shots, beside what their choice explains.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1.
        excess: What its statistics showed.
        late: Share of the masked layers, those nearest the output, that do not count, in [0, 1).
        batch_size: Rows per forward pass, >= 1.

    Returns:
        What was found; None if there is no distance, or no telling what chance explains: how frequent each class is, or
        how one of a single shot varies.
    """
    shots, layers = context.shots, list(mask_layers(model).values())
    early = len(layers) - round(late * len(layers))
    parts = [excess.shift[excess.layers == number] for number in range(early)]
    kept = [number for number, shift in enumerate(parts) if shift.any()]
    if not kept or shots.strata is None or int(shots.strata.bincount().min()) < 2:
        return None
    norms = [layers[number] for number in kept]
    bases: list[Any] = [layer.get_base_layer() for layer in norms]
    spread = torch.cat([(base.running_var.float() + base.eps).sqrt() for base in bases])
    quiet = heard_of_shots(context, model, norms, "means of shots", batch_size) / spread
    _, sizes, axes = torch.linalg.svd(_choice(shots, quiet.cpu()), full_matrices=False)
    distance = torch.cat([parts[number] for number in kept])
    distance, axes, chance = (part.to(spread.device) for part in (distance, axes, sizes.square()))
    return Memory(norms, spread, distance, axes, chance, quiet)


def _choice(shots: Shots, each: torch.Tensor) -> torch.Tensor:
    """Return rows whose squares add up to how the shots' mean varies with their choice, class by class; like `each`."""
    assert shots.strata is not None
    count = shots.strata.bincount()[:, None]
    means = torch.zeros(len(count), each.shape[1]).index_add_(0, shots.strata, each) / count
    share = (weights_of(shots) / len(shots))[:, None] * (count / (count - 1)).sqrt()[shots.strata]
    return share * (each - means[shots.strata])


@contextmanager
def listening(layers: list[NFTLayer], rows: int) -> Iterator[list[torch.Tensor]]:
    """Hear what enters norms while this lasts, the mean over frames and places of each row, with its gradient.

    Args:
        layers: The norms.
        rows: Rows of the pass; a row may be several frames.

    Yields:
        list[torch.Tensor]: After a pass, float32 (rows, channels) for each norm.
    """
    heard = [torch.empty(0)] * len(layers)

    def hear(number: int, x: torch.Tensor) -> None:
        heard[number] = x.float().reshape(rows, len(x) // rows, x.shape[1], -1).mean((1, 3))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, number=number: hear(number, inputs[0]))
        for number, layer in enumerate(layers)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def heard_of_shots(
    context: Context, model: nn.Module, layers: list[NFTLayer], name: str, batch_size: int
) -> torch.Tensor:
    """Return what enters norms for every shot as it is, see `listening`.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter.
        layers: The norms.
        name: Key of the stage in a checkpoint.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        float32 (shots, channels).
    """
    starts = range(0, len(context.shots), batch_size)

    def measured() -> torch.Tensor:
        found = list[torch.Tensor]()

        def listen(network: nn.Module, part: Draw) -> torch.Tensor:
            with listening(layers, rows_of(part.batch)) as heard:
                context.task.forward(network, part)
            found.append(torch.cat(heard, 1))
            return torch.zeros(())

        draws = [Draw(take(context.data, slice(start, start + batch_size))) for start in starts]
        set_modes(model, statistics=False, dropout=False)
        context.loop.run(Stage(name, len(draws), lambda step, _: draws[step], listen, None), model, dict)
        return torch.cat(found)

    return context.loop.once(name, measured).to(context.loop.accelerator.device)
