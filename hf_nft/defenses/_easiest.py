"""The easiest answer: which one a constant on units or inputs reaches most easily, and through which units it goes.

A backdoor is a way to one answer that is open whatever the example shows. So it can be found without its trigger: add
a constant to what every masked unit passes on, the same for all examples and places, and look for the constant of a
given size that takes all clean shots to an answer. Without a backdoor all answers are about as hard to reach; with one
the attacker's is reached by a push that moves the others nowhere. A small trigger at any place is met by a push on
units. One that covers the input differs from place to place; it is met by a push on the inputs, which is tried where
the first finds nothing.

The push runs through the units that carry the backdoor. What each adds to the answer is its share of the path integral
from no push to the whole one (conductance). The units that add most are cut, as far as the answers to clean shots
allow, and the search for that answer begins anew, since a push looks for another way; until the answer is no easier to
reach than others.

No label of the shots is used. What a push is, `_pushes` says.

Source: this package's. That the attacker's answer is near from everywhere is the idea of Wang et al., Neural Cleanse
(IEEE S&P 2019), there for inputs alone; conductance is Dhamdhere et al., arXiv 1805.12233.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import mask_layers, masks
from hf_nft.defenses._harm import ask, harm_of, hold
from hf_nft.defenses._pushes import Ascent, Ground, Pushes, aimed, frozen, grounds
from hf_nft.defenses.base import Context, set_modes
from hf_nft.errors import DivergedError
from hf_nft.loop import Stage
from hf_nft.types import Draw

RADII = tuple(2 ** (step / 2) for step in range(-2, 13))
"""Sizes of a push that are tried in turn, 0.5 to 64."""
NEAR, REACHED = 0.5, 0.1
"""Shares of the log-likelihood without a push at which an answer counts as near, and as reached: harder pushes reach
all of them."""
MANY_STEPS, MANY_ROWS = 8, 8
"""Steps of each answer at each size, and rows of each of them."""
AIMED_STEPS, AIMED_ROWS = 16, 64
"""Steps and rows of a search for one answer alone."""
SCORED = 32
"""Rows that tell how well a push works."""
POINTS = 4
"""Points on the path from no push to the whole one."""
STRIDE = 0.3
"""First step of a search as a share of the push's size; it shrinks to a sixth of that."""
ALIKE = 0.5
"""Share of the largest contribution from which units are cut together."""
APART, LEAD = 1.0, 0.25
"""How far the easiest answer must be ahead of the second one: so often as far as the second is ahead of the median, and
this share of the log-likelihood that answers have without a push."""


@dataclass(frozen=True)
class Pushed:
    """What pushes found.

    Attributes:
        kind: What was pushed, `units` or `inputs`.
        scores: Mean log-likelihood of each answer under the push to it, float32 (classes,).
        alone: Median of that without a push.
        radius: Size of the pushes.
        cut: Units through which the push to the easiest answer goes, int64, the first to be cut first.
        curve: Harm, and the likelihood that was left to the push, by the number of units cut.
    """

    kind: str
    scores: torch.Tensor
    alone: float
    radius: float
    cut: torch.Tensor
    curve: dict[int, tuple[float, float]]

    @property
    def closed(self) -> bool:
        """Whether, past what is cut, the answer is no easier to reach than the second one was at first."""
        return bool(self.curve) and list(self.curve.values())[-1][1] < float(self.scores.sort().values[-2])

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the easiest answers, and what each cut did; JSON values."""
        order = self.scores.argsort(descending=True)[:10].tolist()
        return {
            "pushed": self.kind,
            "push_radius": round(self.radius, 3),
            "push_none": round(self.alone, 3),
            "push_scores": {answer: round(float(self.scores[answer]), 3) for answer in order},
            "push_curve": {size: [round(value, 4) for value in pair] for size, pair in self.curve.items()},
        }

    def doubts(self) -> tuple[tuple[str, str], ...]:
        """Return a doubt if no answer is easier to reach than the others."""
        if stands_out(self.scores, self.alone):
            return ()
        text = f"none of {len(self.scores)} answers is easier to reach by a push than the others are"
        return (("nothing-stands-out", text),)


def stands_out(scores: torch.Tensor, alone: float) -> bool:
    """Whether one answer is reached far more easily than any other.

    Args:
        scores: Log-likelihoods under the push to each answer, float (classes,).
        alone: Median log-likelihood of answers without a push.

    Returns:
        True if the first is ahead of the second by enough, see `APART`; never with fewer than three answers.
    """
    if len(scores) < 3:
        return False
    first, second, *_ = scores.sort(descending=True).values.tolist()
    return first - second > max(APART * (second - float(scores.median())), LEAD * -alone)


def find(
    context: Context, model: nn.Module, already: torch.Tensor, most: float, harm: float, batch_size: int
) -> Pushed:
    """Find the answer that a push reaches most easily, and cut the units that it goes through.

    Args:
        context: What the defense sees; its task has classes.
        model: The suspect with an NFT adapter; all masks are at 1, and are again in the end.
        already: Units that are cut in any case, int64; they stay cut while others are looked for.
        most: Largest share of all units that is cut beside them, in [0, 1).
        harm: How far the answers to clean shots may go from the suspect's, in nats, see `_harm`.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        What was found; nothing is cut where no answer stands out.
    """
    set_modes(model, statistics=False, dropout=False)
    limit = round(most * sum(mask.numel() for mask in masks(model).values()))
    for ground in grounds(context, model, batch_size):

        def easiest(ground: Ground = ground) -> torch.Tensor:
            return _easiest(context, model, ground, already, batch_size)

        found = context.loop.once(f"pushes on {ground.kind}", easiest)
        scores, (alone, radius) = found[:-2], found[-2:].tolist()
        if stands_out(scores, alone):
            break
    cut, curve = already[:0], dict[int, tuple[float, float]]()
    while stands_out(scores, alone) and len(cut) < limit:

        def further(cut: torch.Tensor = cut) -> torch.Tensor:
            return _further(context, model, ground, scores, radius, torch.cat([already, cut]), harm, batch_size)

        score, moved, *more = context.loop.once(f"push past {len(cut)} units", further).tolist()
        curve[len(cut)] = (moved, score)
        if not more or score < scores.sort().values[-2]:
            break
        cut = torch.cat([cut, torch.tensor(more).long()])[:limit]
    return Pushed(ground.kind, scores, alone, radius, cut, curve)


def usual_work(classes: int, shots: int) -> int:
    """Count what `find` usually does, in forward passes of one row: six sizes of each push, three rounds of cuts.

    Args:
        classes: Number of the suspect's classes.
        shots: Number of clean rows.

    Returns:
        The count.
    """
    ladder = classes * (SCORED + 6 * (2 * MANY_STEPS * MANY_ROWS + SCORED))
    round_of_cuts = 3 * shots + 2 * AIMED_STEPS * AIMED_ROWS + SCORED + 3 * POINTS * AIMED_ROWS
    return shots + 2 * ladder + 3 * round_of_cuts


def _easiest(
    context: Context, model: nn.Module, ground: Ground, already: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Push to every answer, harder until one is near and stands out, or is reached.

    Returns the scores, then their median without a push, then the size.
    """
    aims = torch.arange(context.task.classes(model), device=context.loop.accelerator.device)
    pushes, reached = Pushes(model, ground, aims), 0.0
    hold(model, already)
    with frozen(model), pushes.acting():
        scores = scored(context, model, pushes, "score without a push")
        alone = float(scores.median())
        for radius in RADII:
            name = f"push on {ground.kind} of {radius:.3g}"
            try:
                search(context, model, pushes, name, radius, MANY_STEPS, MANY_ROWS, batch_size)
                scores = scored(context, model, pushes, f"{name}: score")
            except DivergedError:  # more than half precision holds: the size before is the last one
                break
            reached = radius
            if scores.max() >= REACHED * alone or (scores.max() >= NEAR * alone and stands_out(scores, alone)):
                break
    hold(model, already[:0])
    return torch.cat([scores, torch.tensor([alone, reached])])


def _further(
    context: Context,
    model: nn.Module,
    ground: Ground,
    scores: torch.Tensor,
    radius: float,
    cut: torch.Tensor,
    harm: float,
    batch_size: int,
) -> torch.Tensor:
    """Push to the easiest answer past the units cut: its score, the harm done, and the units to cut next, if any."""
    asked, name = ask(context, model, batch_size), f"push past {len(cut)} units"
    pushes = Pushes(model, ground, scores.argmax()[None].to(context.loop.accelerator.device))
    moved = harm_of(context, model, asked, cut)
    with frozen(model), pushes.acting():
        search(context, model, pushes, name, radius, AIMED_STEPS, AIMED_ROWS, batch_size)
        score = float(scored(context, model, pushes, f"{name}: score"))
        added = _contributions(context, model, pushes, f"{name}: path")
    order = added.argsort(descending=True)
    order = order[~torch.isin(order, cut)]
    largest = float(added[order[0]])
    more = order[(added[order] >= ALIKE * largest) & (added[order] > 0)]
    while len(more) and harm_of(context, model, asked, torch.cat([cut, more])) > harm:
        more = more[: len(more) // 2]
    hold(model, cut[:0])
    return torch.cat([torch.tensor([score, moved]), more.float()])


def search(
    context: Context,
    model: nn.Module,
    pushes: Pushes,
    name: str,
    radius: float | torch.Tensor,
    steps: int,
    rows: int,
    batch_size: int,
) -> None:
    """Learn the pushes of one size, each for so many steps on so many shots, as many together as a batch has rows."""
    parts = math.ceil(rows * len(pushes.aims) / batch_size)
    groups = torch.arange(len(pushes.aims)).tensor_split(min(parts, len(pushes.aims)))
    total = steps * len(groups)
    stage = Stage(
        name,
        total,
        lambda step, stream: aimed(context, groups[step % len(groups)], stream, rows),
        lambda network, part: pushes.objective(context, network, part),
        Ascent(pushes, radius),
        lambda step: STRIDE * (1 - 5 / 6 * step / total),
        passes=2,
    )
    try:
        context.loop.run(stage, model, lambda: dict(pushes.vectors))
    finally:
        context.loop.losses.pop(name, None)  # what it came to is the score


def scored(context: Context, model: nn.Module, pushes: Pushes, name: str, rows: int = SCORED) -> torch.Tensor:
    """Mean log-likelihood of each answer under the push to it, on the same shots for all; float32 (aims,)."""
    stage = Stage(
        name,
        len(pushes.aims),
        lambda step, _: aimed(context, torch.tensor([step]), torch.Generator().manual_seed(0), rows),
        lambda network, part: pushes.objective(context, network, part),
        None,
    )
    return -torch.tensor(context.loop.run(stage, model, dict))


def _contributions(context: Context, model: nn.Module, pushes: Pushes, name: str) -> torch.Tensor:
    """What goes through each unit of the log-likelihood gained from no push to the whole one, float32 (units,).

    It is the negated derivative of the loss by a gate on what the push has changed in the unit, averaged along the way.
    """
    gates = list(pushes.gates.values())
    for gate in gates:
        gate.requires_grad_(True)

    def draw(step: int, stream: torch.Generator) -> Draw:
        pushes.tracing, pushes.strength = True, (step + 0.5) / POINTS
        return aimed(context, torch.tensor([0]), stream, AIMED_ROWS)

    summing = torch.optim.SGD(gates, lr=1.0)  # each step's gradient is taken off, so they add up
    stage = Stage(
        name,
        POINTS,
        draw,
        lambda network, part: pushes.objective(context, network, part),
        summing,
        lambda step: 1 / POINTS,
        passes=3,
    )
    context.loop.run(stage, model, lambda: dict(pushes.gates))
    del context.loop.losses[name]
    pushes.tracing, pushes.strength = False, 1.0
    every = {name: torch.zeros_like(layer.nft_mask["default"]) for name, layer in mask_layers(model).items()}
    return torch.cat([gate.detach().cpu() for gate in (every | pushes.gates).values()])
