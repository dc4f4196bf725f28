"""How far a cut may go: until the suspect, cut so far, answers clean shots too differently from what it was.

Which units to cut first is known; how many carry the backdoor is not. What carries nothing but the backdoor can be cut
without clean shots noticing, so the cut goes on while they do not. No labels are needed for it.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import masks
from hf_nft.defenses._statistics import ENOUGH, Excess
from hf_nft.defenses.base import Context, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw, rows_of, take

SIZES = 20
"""Sizes of the cut that are tried along the line of candidates, evenly spaced."""
TRIES = SIZES + 4
"""Most passes over the shots: the suspect itself, twice, the largest units, what is cut in any case, and the sizes."""


def ceilings(model: nn.Module, cut: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the upper bound of every mask, by name: 0 for the units cut, 1 for the rest."""
    learnt = masks(model)
    ceiling = torch.ones(sum(mask.numel() for mask in learnt.values()))
    ceiling[cut] = 0.0
    parts = ceiling.split([mask.numel() for mask in learnt.values()])
    return {name: part.to(mask.device) for (name, mask), part in zip(learnt.items(), parts, strict=True)}


def choose(
    context: Context,
    model: nn.Module,
    excess: Excess,
    sure: tuple[float, float],
    needed: float,
    most: float,
    harm: float,
    batch_size: int,
) -> tuple[torch.Tensor, dict[str, Any], tuple[tuple[str, str], ...]]:
    """Choose units by their excess variance: those that are sure, then as many outliers as clean shots do not notice.

    Units that are large are sure only if clean shots can do without: where whole layers vary more than the shots show,
    other augmentation or other data explain it, and its outliers alone are cut. There, and where nothing stands out,
    nothing is sure: what clean shots notice is not cut, if there are enough of them to tell.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter; its masks are at 1 again in the end.
        excess: Scores of all units.
        sure: Largest shares of all units that are cut first, for their size and as outliers of their layer, in
            [0, 1); 0: none.
        needed: How far cutting the large ones may take the answers to clean shots, in nats; beyond it they are spared.
        most: Largest share of outliers where clean shots do not notice, in [0, 1).
        harm: How far the answers to clean shots may go from the suspect's where more is cut, in nats, see `harmless`.
            Few shots have no say.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        Units, int64 (units,), what a record says about their choice, and doubts about it.
    """
    large, outliers = excess.largest(sure[0]), excess.outliers(sure[1])
    doubts: tuple[tuple[str, str], ...] = ()
    if len(large) and (alone := harm_alone(context, model, large, batch_size, "harm of the largest")) > needed:
        text = f"the {len(large)} units that vary most are needed: cutting them moves clean answers by"
        doubts = (("needed-units", f"{text} {alone:.1f} nats"),)
        large = large[:0]
    cut, line = torch.cat([outliers, large]).unique(), excess.further(most if sure[1] and not doubts else 0.0)
    allowed = harm if excess.shots >= ENOUGH else math.inf
    if len(cut) and allowed < math.inf and (doubts or excess.doubts()):  # weak evidence, which clean shots may refute
        if harm_alone(context, model, cut, batch_size, "harm of what is in doubt") > allowed:
            large, outliers, cut = large[:0], outliers[:0], cut[:0]
    line = line[~torch.isin(line, cut)]
    kept, curve = harmless(context, model, cut, line, allowed, batch_size)
    counts = {"cut_by_size": len(large), "cut_as_outliers": len(outliers), "cut_further": kept}
    return torch.cat([cut, line[:kept]]), {**counts, "harm": curve}, doubts


def harm_alone(context: Context, model: nn.Module, cut: torch.Tensor, batch_size: int, name: str) -> float:
    """Harm of one cut; the masks are at 1 again in the end."""

    def measured() -> torch.Tensor:
        value = harm_of(context, model, ask(context, model, batch_size), cut)
        hold(model, cut[:0])
        return torch.tensor([value])

    set_modes(model, statistics=False, dropout=False)
    return float(context.loop.once(name, measured))


def harmless(
    context: Context, model: nn.Module, always: torch.Tensor, line: torch.Tensor, harm: float, batch_size: int
) -> tuple[int, dict[int, float]]:
    """Choose how many units of a line to cut, by what cutting them changes for clean shots.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter; its masks are at 1 again in the end.
        always: Units that are cut in any case, int64.
        line: Candidates, the first to be cut first, int64.
        harm: Largest Kullback-Leibler divergence of the answers from those of the suspect, mean over the shots, in
            nats.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        How many candidates to cut, none if `always` is too much already; and the curve: divergence by the numbers
        tried, up to the first that was too many; empty without candidates.
    """
    sizes = sorted({round(len(line) * step / SIZES) for step in range(SIZES + 1)})
    if len(sizes) == 1:
        return 0, {}

    def tried() -> torch.Tensor:
        asked, values = ask(context, model, batch_size), list[float]()
        for size in sizes:
            values.append(harm_of(context, model, asked, torch.cat([always, line[:size]])))
            if values[-1] > harm:
                break
        hold(model, line[:0])
        return torch.tensor(values, dtype=torch.float64)

    set_modes(model, statistics=False, dropout=False)
    curve = dict(zip(sizes, context.loop.once("harm", tried).tolist(), strict=False))
    return max((size for size, value in curve.items() if value <= harm), default=0), curve


def hold(model: nn.Module, cut: torch.Tensor) -> None:
    """Set every mask to its upper bound: 0 for the units cut, 1 for the rest."""
    bounds = ceilings(model, cut)
    with torch.no_grad():
        for name, mask in masks(model).items():
            mask.copy_(bounds[name])


def ask(context: Context, model: nn.Module, batch_size: int) -> list[Draw]:
    """Let the suspect answer all shots, as they are, so many at a time."""
    task, asked = context.task, list[Draw]()
    starts = range(0, len(context.shots), batch_size)

    def answer(network: nn.Module, part: Draw) -> torch.Tensor:
        asked.append(dataclasses.replace(part, answers=task.answers(task.forward(network, part), 1.0)))
        return torch.zeros(())

    draws = [Draw(take(context.data, slice(start, start + batch_size))) for start in starts]
    context.loop.run(Stage("harm", len(draws), lambda step, _: draws[step], answer, None), model, dict)
    return asked


def harm_of(context: Context, model: nn.Module, asked: list[Draw], cut: torch.Tensor) -> float:
    """Cut units, and return the mean divergence of the answers from those that were given before, in nats.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter; its masks stay so.
        asked: What `ask` returned.
        cut: Units, int64.

    Returns:
        Kullback-Leibler divergence, mean over the shots.
    """
    hold(model, cut)

    def differ(network: nn.Module, part: Draw) -> torch.Tensor:
        return context.task.divergence(context.task.forward(network, part), part, 1.0)

    stage = Stage("harm", len(asked), lambda step, _: asked[step], differ, None)
    rows = [rows_of(part.batch) for part in asked]
    return sum(n * value for n, value in zip(rows, context.loop.run(stage, model, dict), strict=True)) / sum(rows)
