"""How far a cut may go: until the suspect, cut so far, answers clean shots too differently from what it was.

Which units to cut first is known; how many carry the backdoor is not. What carries nothing but the backdoor can be cut
without clean shots noticing, so the cut goes on while they do not. No labels are needed for it.
"""

import dataclasses

import torch
from torch import nn

from hf_nft.adapter import masks
from hf_nft.defenses.base import Context, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw, rows_of, take

SIZES = 20
"""Sizes of the cut between the sure one and the largest, evenly spaced."""
TRIES = SIZES + 3
"""Most passes over the shots: the suspect itself, nothing but what is cut in any case, the sure cut, and the sizes."""


def ceilings(model: nn.Module, cut: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the upper bound of every mask, by name: 0 for the units cut, 1 for the rest."""
    learnt = masks(model)
    ceiling = torch.ones(sum(mask.numel() for mask in learnt.values()))
    ceiling[cut] = 0.0
    parts = ceiling.split([mask.numel() for mask in learnt.values()])
    return {name: part.to(mask.device) for (name, mask), part in zip(learnt.items(), parts, strict=True)}


def harmless(
    context: Context,
    model: nn.Module,
    units: tuple[torch.Tensor, torch.Tensor],
    sure: int,
    harm: float,
    batch_size: int,
) -> tuple[int, dict[int, float]]:
    """Choose how many units to cut, by what cutting them changes for clean shots.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter; its masks are at 1 again in the end.
        units: Those that are cut in any case, and the candidates, the first to be cut first; int64.
        sure: Number of candidates that are cut whatever the harm.
        harm: By how much cutting candidates may raise the Kullback-Leibler divergence of the answers from those of the
            suspect, mean over the shots, in nats.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        How many candidates to cut, and the curve: divergence by the numbers tried, up to the first that was too many;
        empty if all are sure.
    """
    always, ranked = units
    if len(ranked) == sure:
        return sure, {}
    sizes = [0, *sorted({sure + round((len(ranked) - sure) * step / SIZES) for step in range(SIZES + 1)} - {0})]

    def tried() -> torch.Tensor:
        asked, values = _asked(context, model, batch_size), list[float]()
        for size in sizes:
            _hold(model, torch.cat([always, ranked[:size]]))
            values.append(_divergence(context, model, asked))
            if size > sure and values[-1] - values[0] > harm:
                break
        _hold(model, ranked[:0])
        return torch.tensor(values, dtype=torch.float64)

    set_modes(model, statistics=False, dropout=False)
    curve = dict(zip(sizes, context.loop.once("harm", tried).tolist(), strict=False))
    return max(sure, *(size for size, value in curve.items() if value - curve[0] <= harm)), curve


def _hold(model: nn.Module, cut: torch.Tensor) -> None:
    """Set every mask to its upper bound."""
    bounds = ceilings(model, cut)
    with torch.no_grad():
        for name, mask in masks(model).items():
            mask.copy_(bounds[name])


def _asked(context: Context, model: nn.Module, batch_size: int) -> list[Draw]:
    """Let the suspect answer all shots, as they are."""
    task, asked = context.task, list[Draw]()
    starts = range(0, len(context.shots), batch_size)

    def ask(network: nn.Module, part: Draw) -> torch.Tensor:
        asked.append(dataclasses.replace(part, answers=task.answers(task.forward(network, part), part)))
        return torch.zeros(())

    draws = [Draw(take(context.data, slice(start, start + batch_size))) for start in starts]
    context.loop.run(Stage("harm", len(draws), lambda step, _: draws[step], ask, None), model, dict)
    return asked


def _divergence(context: Context, model: nn.Module, asked: list[Draw]) -> float:
    """Mean divergence of the model's answers from those that were given before."""

    def differ(network: nn.Module, part: Draw) -> torch.Tensor:
        return context.task.divergence(context.task.forward(network, part), part, 1.0)

    stage = Stage("harm", len(asked), lambda step, _: asked[step], differ, None)
    rows = [rows_of(part.batch) for part in asked]
    return sum(n * value for n, value in zip(rows, context.loop.run(stage, model, dict), strict=True)) / sum(rows)
