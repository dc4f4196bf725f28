"""Exposure: make the units that carry a backdoor stand out, from clean shots alone.

Unlearning clean data destroys the clean function of a network first and leaves the backdoor, which clean data do not
touch. When masks then relearn the clean function on top of the unlearnt weights, they fall on the units that work
against it: those that still answer with the target. What counts is how early and how far a mask falls, so a unit's
score is its mask averaged over the relearning; final masks tie at 0. One exposure is not reliable; the minimum over
several is.

Source: Li et al., Reconstructive Neuron Pruning, ICML 2023, arXiv 2305.14876 (unlearn, then recover masks); used here
as a ranking of the suspect's own units, over several learning rates and seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import masks
from hf_nft.defenses.base import Context, label_loss, live_state, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw, rows_of

GAP = 0.5
"""Share of the median score that the lowest one stays below where a backdoor was exposed."""

Sample = Callable[[torch.Generator], Draw]
"""Draws a batch of shots."""


@dataclass(frozen=True)
class Exposure:
    """One exposure's settings.

    Attributes:
        name: Names its random streams.
        unlearn_lr: Learning rate of the ascent on clean cross-entropy (SGD, momentum 0.9, weight decay 5e-4).
        clip: Largest gradient norm of the ascent: a saturated model would overshoot and lose its backdoor as well.
        unlearn_steps: Most steps of the ascent.
        collapse: Accuracy on the shots at which the ascent stops, in [0, 1].
        relearn_lr: Learning rate of the masks (SGD, momentum 0.9).
        relearn_steps: Steps of the masks.
    """

    name: str
    unlearn_lr: float
    clip: float
    unlearn_steps: int
    collapse: float
    relearn_lr: float
    relearn_steps: int


@dataclass(frozen=True)
class Ranking:
    """What the exposures of one suspect found.

    Attributes:
        scores: Lowest score of each unit over all exposures, float32 (units,) in [0, 1], in the masks' order.
        accuracy: Lowest accuracy on the shots that each exposure's ascent reached, in [0, 1].
        collapse: Accuracy at which an ascent stops.
    """

    scores: torch.Tensor
    accuracy: list[float]
    collapse: float

    def lowest(self, share: float) -> torch.Tensor:
        """Return the indices of a share of the units, lowest score first; int64 (units,)."""
        return self.scores.argsort()[: round(share * self.scores.numel())]

    def evidence(self) -> dict[str, Any]:
        """Return what a record says about the scores: the lowest, and how far each ascent went; JSON values."""
        return {
            "ranking": [round(float(score), 4) for score in self.scores.sort().values[:200]],
            "collapsed_accuracy": [round(value, 4) for value in self.accuracy],
            "collapse_threshold": self.collapse,
        }

    def doubts(self) -> tuple[tuple[str, str], ...]:
        """Return a doubt if most exposures left the clean function standing, and one if no unit stands out."""
        found = []
        stuck, total = sum(value > self.collapse for value in self.accuracy), len(self.accuracy)
        if 2 * stuck > total:
            found.append(
                ("exposure-did-not-collapse", f"{stuck} of {total} exposures left clean accuracy above chance")
            )
        lowest, median = float(self.scores.min()), float(self.scores.median())
        if lowest > GAP * median:
            text = f"no unit stands out in {total} exposures: the lowest scores {lowest:.2f}, the median {median:.2f}"
            found.append(("nothing-stands-out", text))
        return tuple(found)


def rank(context: Context, model: nn.Module, exposures: list[Exposure], sample: Sample) -> Ranking:
    """Expose the suspect several times and keep each unit's lowest score: which exposure finds which unit varies.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1.
        exposures: Settings of each, with one collapse threshold.
        sample: Draws a batch of shots.

    Returns:
        The ranking.
    """
    rows = [context.loop.once(e.name, lambda e=e: expose(context, model, e, sample)) for e in exposures]  # type: ignore[misc]
    found = torch.stack(rows)
    return Ranking(found[:, :-1].amin(0), found[:, -1].tolist(), exposures[0].collapse)


def expose(context: Context, model: nn.Module, exposure: Exposure, sample: Sample) -> torch.Tensor:
    """Expose the suspect once; the model is left exactly as it was.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1.
        exposure: Settings.
        sample: Draws a batch of shots.

    Returns:
        float32 (units + 1,): the masks of all layers in registration order, averaged over the relearning, in [0, 1],
        and last the lowest clean accuracy that the ascent reached.
    """
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    learnt = masks(model)
    weights = [p for p in model.parameters() if not any(p is mask for mask in learnt.values())]
    set_modes(model, statistics=True, dropout=False)
    _train_only(weights, learnt.values())
    lowest = _unlearn(context, model, exposure, sample, weights)
    model.zero_grad(set_to_none=True)
    _train_only(learnt.values(), weights)
    scores = _relearn(context, model, exposure, sample)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(kept[name])
    return torch.cat([scores, lowest[None]])


def _train_only(trained: Iterable[nn.Parameter], frozen: Iterable[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.requires_grad_(True)
    for parameter in frozen:
        parameter.requires_grad_(False)


def _unlearn(
    context: Context, model: nn.Module, exposure: Exposure, sample: Sample, weights: list[nn.Parameter]
) -> torch.Tensor:
    """Climb the clean loss until clean accuracy has collapsed; returns the accuracy of the last batch."""
    task, accelerator = context.task, context.loop.accelerator
    accuracy = torch.zeros((), device=accelerator.device)
    batch_rows = 1

    def draw(step: int, stream: torch.Generator) -> Draw:
        nonlocal batch_rows
        drawn = sample(stream)
        accuracy.zero_()
        batch_rows = rows_of(drawn.batch)
        return drawn

    def reached() -> torch.Tensor:
        """Clean accuracy of the last step's batch, over all its parts."""
        return accelerator.reduce(accuracy.clone(), reduction="sum")

    def climb(network: nn.Module, part: Draw) -> torch.Tensor:
        output = task.forward(network, part)
        accuracy.add_(task.accuracy(output, part.batch).detach() * rows_of(part.batch) / batch_rows)
        return -task.loss(output, part)

    stage = Stage(
        f"{exposure.name}: unlearn",
        exposure.unlearn_steps,
        draw,
        climb,
        torch.optim.SGD(weights, lr=exposure.unlearn_lr, momentum=0.9, weight_decay=5e-4),
        lambda step: exposure.unlearn_lr,
        stop=lambda: bool(reached() <= exposure.collapse),
        look_every=1,
        clip=exposure.clip,
    )
    context.loop.run(stage, model, lambda: live_state(model))
    return reached()


def _relearn(context: Context, model: nn.Module, exposure: Exposure, sample: Sample) -> torch.Tensor:
    """Win the clean function back with masks alone; returns every mask averaged over the way, float32 (units,)."""
    learnt = masks(model)
    total = {name: torch.zeros_like(mask) for name, mask in learnt.items()}

    @torch.no_grad()
    def project() -> None:
        for name, mask in learnt.items():
            mask.clamp_(min=0.0, max=1.0)
            total[name] += mask / exposure.relearn_steps

    stage = Stage(
        f"{exposure.name}: relearn",
        exposure.relearn_steps,
        lambda step, stream: sample(stream),
        lambda network, part: label_loss(network, context.task, part),
        torch.optim.SGD(list(learnt.values()), lr=exposure.relearn_lr, momentum=0.9),
        lambda step: exposure.relearn_lr,
        project,
        passes=2,
    )
    context.loop.run(stage, model, lambda: live_state(model))
    return torch.cat(list(total.values()))
