"""Excess variance: what the suspect's BatchNorm statistics remember, and clean shots do not show.

A norm's running variance was gathered on the suspect's training data, triggered rows included. A unit that answers a
trigger varies more there than on clean rows; its gain tells how much of that reaches the next layer. So the score of a
unit is the share of its output variance that clean shots leave unexplained,

    gain^2 * (running variance - variance on clean shots) / running variance.

Shots are drawn alike from every class, and the suspect was trained on classes as frequent as its data have them. So
shots count as often as their class does in the data set; else frequent and rare classes would look like excess.

Noise is as likely to lie below 0 as above, which shows how much of what lies above is chance. Two cuts follow. Units
with the largest scores of all carry the evidence for the attacker's answer; there are many, in the last layers, and
each is worth little to clean data. Units that stand out from their own layer sense the trigger, or pass on what senses
it. A few of both are cut for sure; how many more of these, clean shots say (see `_harm`).

Source: comparing norm statistics with clean data is BNP's idea (Zheng et al., Pre-activation Distributions Expose
Backdoor Neurons, NeurIPS 2022); the score and the cuts are this package's. Decoys: Barber and Candes, arXiv 1404.5609.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_nft.adapter import NFTLayer, mask_layers, masks
from hf_nft.defenses._norms import remembers
from hf_nft.defenses.base import Context, label_loss, set_modes
from hf_nft.loop import Stage
from hf_nft.shots import Shots
from hf_nft.types import Draw, take

OUTLIER, FURTHER = 3.0, 2.5
"""Robust z-score within a layer from which a unit stands out; the second where more are cut."""
CHANCE, LENIENT = 0.1, 0.5
"""Most units as far below 0 as those that are cut lie above, for each one cut; the second with fewer shots."""
ENOUGH = 50
"""Shots that tell a suspect whose units stand out by chance alone; with fewer, more is left to chance."""
LOPSIDED = 1.5
"""Outliers above the median for each one below it, from which they are not chance."""
FAINT = 0.01
"""Share of units whose scores exceed chance at least where the statistics remember a backdoor."""
WEIGHT = "shot_weight"
"""Key of the shots' weights among their encoded rows."""
EVEN = 1e-6
"""Spread of a layer's scores below which nothing in it can be told apart: most of its gains are 0."""


@dataclasses.dataclass(frozen=True)
class Excess:
    """Scores of all masked units.

    Attributes:
        scores: Share of each unit's output variance that clean shots leave unexplained, times its squared gain;
            float32 (units,), in the masks' order; 0 for units without running statistics, or that no row reaches.
        layers: Masked layer of each unit, int64 (units,).
        shots: Number of clean rows behind the scores.
        augment: How they were augmented.
        shift: How far each unit's running mean lies from that of the shots, in running standard deviations; float32
            (units,), 0 as above.
    """

    scores: torch.Tensor
    layers: torch.Tensor
    shots: int
    augment: str = "none"
    shift: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    @property
    def relative(self) -> torch.Tensor:
        """Robust z-score of each unit within its layer: distance from the median over 1.4826 median deviations.

        0 where more than half of a layer's units score the same, as those whose gain is 0 do.
        """
        result = torch.zeros_like(self.scores)
        for layer in self.layers.unique():
            own = self.layers == layer
            distance = self.scores[own] - self.scores[own].median()
            if (spread := 1.4826 * distance.abs().median()) > EVEN:
                result[own] = distance / spread
        return result

    def beyond_chance(self, most: int) -> int:
        """Return how many of the `most` units with the largest scores stand out from chance."""
        high = self.scores.sort(descending=True).values[:most]
        decoys = len(self.scores) - torch.searchsorted((-self.scores).sort().values, high)
        allowed = CHANCE if self.shots >= ENOUGH else LENIENT
        kept = ((decoys <= allowed * torch.arange(1, len(high) + 1)) & (high > 0)).nonzero()[:, 0]
        return int(kept[-1]) + 1 if len(kept) else 0

    def largest(self, share: float) -> torch.Tensor:
        """Return the units with the largest scores, the largest first, a share of all and no more than chance allows.

        Args:
            share: Share of all units, in [0, 1).

        Returns:
            Units, int64.
        """
        return self.scores.argsort(descending=True)[: self.beyond_chance(round(share * len(self.scores)))]

    def outliers(self, share: float, least: float = OUTLIER) -> torch.Tensor:
        """Return the units that stand out from their layer, at most a share of all, farthest first; int64.

        None is returned if enough shots show that nearly as many lie on the other side of their layer's median.

        Args:
            share: Share of all units, in [0, 1).
            least: Robust z-score from which a unit stands out, > 0.

        Returns:
            Units, int64.
        """
        far = self.relative.sort(descending=True)
        found, decoys = (int((far.values * side > least).sum()) for side in (1, -1))
        if self.shots >= ENOUGH and found < LOPSIDED * decoys:
            return far.indices[:0]
        return far.indices[: min(found, round(share * len(self.scores)))]

    def further(self, share: float) -> torch.Tensor:
        """Return units that may be cut as outliers where clean shots agree, the farthest first.

        Enough shots can judge any unit; fewer cannot, so these units stand out themselves, if a little less.

        Args:
            share: Largest share of all units, in [0, 1).

        Returns:
            Units, int64; none where nothing stands out.
        """
        if self.shots < ENOUGH:
            return self.outliers(share, FURTHER)
        if self.doubts() or not len(self.outliers(share, FURTHER)):
            return self.outliers(0.0)
        return self.relative.argsort(descending=True)[: round(share * len(self.scores))]

    def evidence(self) -> dict[str, Any]:
        """Return what a record says about the scores: those at both ends, and the largest z-scores; JSON values."""
        ends = self.scores.sort().values
        shown = {
            "excess": ends.flip(0)[:200],
            "chance": -ends[:50],
            "outliers": self.relative.sort().values.flip(0)[:50],
        }
        curves = {name: [round(float(v), 4) for v in values] for name, values in shown.items()}
        return {**curves, "statistics_augment": self.augment}

    def doubts(self) -> tuple[tuple[str, str], ...]:
        """Return a doubt if hardly any score is larger than chance explains: no backdoor shows in the statistics."""
        wanted = max(1, round(FAINT * len(self.scores)))
        if (found := self.beyond_chance(wanted)) >= wanted:
            return ()
        text = f"only {found} of {len(self.scores)} units vary more than clean examples and chance explain"
        return (("nothing-stands-out", text),)


def excess_variance(
    context: Context, model: torch.nn.Module, batch_size: int, passes: int, momentum: float = 1.0
) -> Excess | None:
    """Compare the running statistics of every masked norm with those of clean shots.

    How the suspect's training data were augmented is not known and shows in its statistics. So the shots are passed
    under each augmentation that the task offers. That one counts under which the running mean of the median unit, which
    no trigger concerns, lies closest to that of the shots: means of few shots vary less than variances do.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1.
        batch_size: Rows per forward pass, >= 1.
        passes: How often to pass the shots under an augmentation, each time drawn afresh, >= 1.
        momentum: Largest momentum of statistics that tell of the training data, in [0, 1].

    Returns:
        The scores; None if no masked layer keeps such statistics.
    """
    layers = mask_layers(model)
    kept = {name: layer for name, layer in layers.items() if remembers(layer.get_base_layer(), momentum)}
    if not kept:
        return None
    sizes = [mask.numel() for mask in masks(model).values()]
    where = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def compare(augment: str) -> torch.Tensor:
        """Scores and distances; NaN where nothing is known: without statistics, or not reached, as other heads."""
        found = _measure(context, model, kept, batch_size, augment, 1 if augment == "none" else passes)
        parts = [
            _compare(layer, found[name], context.shots) if name in found else torch.full((2, size), math.nan)
            for (name, layer), size in zip(layers.items(), sizes, strict=True)
        ]
        return torch.cat([part.float().cpu() for part in parts], 1)

    def under(augment: str) -> tuple[float, Excess]:
        found = context.loop.once(f"statistics, {augment}", lambda: compare(augment))
        scores, shift = found.nan_to_num()
        return float(found[1].abs().nanmedian()), Excess(scores, where, len(context.shots), augment, shift)

    set_modes(model, statistics=False, dropout=False)
    return min(map(under, dict.fromkeys((*context.task.augmentations, "none"))), key=lambda found: found[0])[1]


def weights_of(shots: Shots) -> torch.Tensor:
    """Return how many rows of the data set each shot stands for, mean 1; float32 (shots,)."""
    return torch.ones(len(shots)) if shots.weights is None else shots.weights


def _measure(
    context: Context, model: torch.nn.Module, layers: dict[str, NFTLayer], batch_size: int, augment: str, passes: int
) -> dict[str, torch.Tensor]:
    """Pass the shots and return what entered each layer that was reached: what `_gathered` sums."""
    starts, device = range(0, len(context.shots), batch_size), context.loop.accelerator.device
    data = {**context.data, WEIGHT: weights_of(context.shots).to(device)}

    def draw(step: int, stream: torch.Generator) -> Draw:
        start = starts[step % len(starts)]
        return Draw(context.task.augment(take(data, slice(start, start + batch_size)), stream, augment))

    def objective(network: torch.nn.Module, part: Draw) -> torch.Tensor:
        with _gathered(layers, found, part.batch[WEIGHT]):
            return label_loss(network, context.task, part)

    found: dict[str, torch.Tensor] = {}
    context.loop.run(Stage(f"statistics, {augment}", passes * len(starts), draw, objective, None), model, dict)
    return found


@contextmanager
def _gathered(layers: dict[str, NFTLayer], found: dict[str, torch.Tensor], weights: torch.Tensor) -> Iterator[None]:
    """Sum what enters each layer: weighted, over rows, of 1, mean, mean square, squared mean; (4, channels)."""

    def gather(name: str, x: torch.Tensor) -> None:
        if len(x) % len(weights):  # regions, say: of which row is not known
            return
        rows = x.detach().float().reshape(len(weights), len(x) // len(weights), x.shape[1], -1)  # frames, places
        mean, square = rows.mean((1, 3)), rows.square().mean((1, 3))
        each = torch.stack([torch.ones_like(mean), mean, square, mean.square()])
        found[name] = (each * weights[:, None]).sum(1) + found.get(name, 0.0)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: gather(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(layer: NFTLayer, found: torch.Tensor, shots: Shots) -> torch.Tensor:
    """Compare running statistics with those of the rows; float32 (2, units).

    Squared gain times the share of the running variance that the rows do not show, and how far the running mean lies
    from theirs in running standard deviations.
    """
    base: Any = layer.get_base_layer()
    mean, square, squared_mean = found[1:] / found[0]
    # few shots: their own mean hides a share of what differs from shot to shot; drawn class by class, a little less
    variance = square - mean.square() + (squared_mean - mean.square()) / max(1, shots.effective - 1)
    gain, running = base.weight.detach().float(), base.running_var.float()
    score = gain.square() * (running - variance) / running.clamp(min=1e-12)
    return torch.stack([score, (base.running_mean.float() - mean) / (running + base.eps).sqrt()])
