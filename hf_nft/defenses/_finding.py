"""What is known about a suspect before any mask is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_nft.defenses import _adversary, _composites, _easiest, _memory, _shift
from hf_nft.defenses._adversary import Adversary
from hf_nft.defenses._composites import Composites, can_compose
from hf_nft.defenses._exposure import Exposure, Ranking, rank
from hf_nft.defenses._harm import choose, harm_alone, hold
from hf_nft.defenses._pushes import pushable
from hf_nft.defenses._shift import Shifts
from hf_nft.defenses._statistics import ENOUGH, excess_variance
from hf_nft.defenses.base import Context
from hf_nft.types import Draw, take


@dataclasses.dataclass
class Finding:
    """What was found before any mask is trained.

    Attributes:
        augment: Augmentation to train under.
        cut: Units to cut, int64 (units,), in the masks' order.
        evidence: What they were chosen by, for the record.
        doubts: Reasons to distrust the choice, as (code, sentence).
        seen: Whether the suspect's statistics showed what to cut.
        composites: What composed shots are answered, where one answer to them stands out and nothing else did.
        shifts: What pushes inputs as running means remember, where the suspect keeps statistics and nothing stands out.
        adversary: What pushes inputs to the attacker's answer, where pushes found it and what they cut, if anything,
            left it easy to reach.
        open: Whether masks are to learn against it: not where the cut alone has closed its window.
    """

    augment: str
    cut: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    doubts: tuple[tuple[str, str], ...] = ()
    seen: bool = False
    composites: Composites | None = None
    shifts: Shifts | None = None
    adversary: Adversary | None = None
    open: bool = False

    def add(self, cuts: list[torch.Tensor], evidence: dict[str, Any]) -> None:
        """Take in what one way of looking found."""
        self.cut = torch.cat([self.cut, *cuts]).unique()
        self.evidence |= evidence

    def doubt(self, code: str, text: str) -> None:
        """Note a reason to distrust the choice."""
        self.doubts += ((code, text),)


def look(nft: Any, context: Context, model: nn.Module) -> Finding:
    """Choose the units to cut.

    The suspect's own statistics are asked first. Then, or where it keeps none of its training, pushes are tried, for
    what to cut where nothing was seen, and for an answer that masks are to learn against. They need three classes, a
    layer whose features lie on a known axis, and 50 shots beside statistics; else a suspect without statistics is
    exposed. Where what was tried shows nothing, shots are composed; where that shows nothing either, what running means
    remember is looked up.

    Args:
        nft: The settings of NFT.
        context: What the defense sees.
        model: The suspect with an NFT adapter; its masks are at 1, and are again in the end.

    Returns:
        What was found.
    """
    excess, looked = None, nft.excess > 0 or nft.outliers > 0
    weighed = context
    if looked:
        alike = dataclasses.replace(context, shots=dataclasses.replace(context.shots, weights=None, strata=None))
        weighed = context if nft.class_prior else alike
        excess = excess_variance(weighed, model, nft.batch_size, nft.statistics_passes, nft.statistics_momentum)
    found = Finding(nft.augment)
    if len(context.shots) < ENOUGH and (looked or nft.exposures):
        found.doubt("few-shots", f"{len(context.shots)} clean examples in all: chance hides what they show")
    if excess is not None:
        sure = (nft.excess, nft.outliers)
        cut, why, needed = choose(context, model, excess, sure, nft.needed, nft.outliers_most, nft.harm, nft.batch_size)
        found.add([cut], {**excess.evidence(), **why})
        found.doubts += excess.doubts() + needed
        if nft.augment == "default":  # better than the task's first: what the suspect was trained with
            found.augment = excess.augment
        found.seen = not excess.doubts() and (not needed or len(cut) > 0)  # needed ones are spared, outliers may go
    seen = found.seen
    classes = context.task.classes(context.model)
    few = excess is not None and len(context.shots) < ENOUGH  # pushes beside statistics are not measured with fewer
    push = bool(pushable(model)) and nft.pushing(few, classes)
    expose = nft.exposures > 0 and ((excess is None and not push) or nft.expose_always)
    blind = (looked or push) and not seen and not expose
    if excess is None and looked:
        instead = "pushes were tried" if push else "it was exposed" if expose else "nothing was cut"
        found.doubt("no-statistics", f"the suspect keeps no running statistics of its training: {instead} instead")
    if push:
        already, most = (found.cut[:0], 0.0) if seen else (found.cut, nft.pushed_most)
        pushed = _easiest.find(context, model, already, most, nft.harm, nft.batch_size)
        if not seen:
            found.doubts = tuple(d for d in found.doubts if d[0] != "nothing-stands-out") + pushed.doubts()
        blind = blind and bool(pushed.doubts())
        if nft.pushed_rows(seen) and not pushed.doubts() and not pushed.closed:
            found.adversary = _adversary.find(context, model, pushed, nft.windowed, not seen, nft.batch_size)
        kept = pushed.cut
        if found.adversary:
            hold(model, torch.cat([found.cut, pushed.cut]))
            left = found.adversary.left("the cut", nft.batch_size)
            hold(model, found.cut[:0])
            found.open = nft.adversarial_always or not found.adversary.closed(left)
            found.evidence |= {**found.adversary.evidence(), "adversary_before": left}
            if len(kept):
                harm = harm_alone(context, model, kept, nft.batch_size, "harm of the cut by pushes")
                kept = kept[:0] if nft.taken_back and not found.adversary.hindered(left, harm) else kept
                found.evidence["adversary_harm"] = round(harm, 4)
        found.add([kept], {**pushed.evidence(), "cut_by_push": len(kept)})
    if blind and nft.composed and can_compose(context.task, classes):
        composites = _composites.find(context, model, nft.batch_size, nft.seed)
        found.evidence |= composites.evidence()
        found.composites = composites if composites.stands_out else None
    if blind and found.composites is None and excess is not None and nft.shifting(True, classes):
        memory = _memory.remember(weighed, model, excess, nft.shifted_late, nft.batch_size)
        if memory:
            found.evidence["shift_ratio"] = round(memory.ratio, 3)
            least, most = nft.shifted_within  # a trigger too faint for variances moves means, if by little
            if least <= memory.ratio <= most:
                shifts = _shift.find(context, model, memory, nft.shifted_most, nft.shifted_guide, nft.batch_size)
                found.evidence |= shifts.evidence() if shifts else {}
                found.shifts = shifts if shifts and shifts.stands_out else None
    if expose:
        ranking = _ranking(nft, context, model, found.augment)
        found.add([ranking.lowest(nft.cut)], ranking.evidence())
        found.doubts += ranking.doubts()
    return found


def _ranking(nft: Any, context: Context, model: nn.Module, augment: str) -> Ranking:
    """Expose the suspect as the settings say."""
    chance = context.task.chance(context.model)
    per_pass = max(1, round(len(context.shots) / nft.batch_size))
    exposures = [
        Exposure(
            f"exposure {i + 1}/{nft.exposures}",
            nft.unlearn_lrs[i % len(nft.unlearn_lrs)],
            nft.unlearn_clip,
            nft.unlearn_steps,
            max(0.2, chance + 0.1 * (1 - chance)),
            nft.relearn_lr,
            nft.relearn_passes * per_pass,
        )
        for i in range(nft.exposures)
    ]
    return rank(context, model, exposures, _unmixed(nft, context, augment))


def _unmixed(nft: Any, context: Context, augment: str) -> Callable[[torch.Generator], Draw]:
    """Draw plain shots without repeats: an exposure sees every shot, or a batch of different ones."""
    task, device = context.task, context.loop.accelerator.device

    def sample(stream: torch.Generator) -> Draw:
        rows = torch.randperm(len(context.shots), generator=stream)[: nft.batch_size].to(device)
        return Draw(task.augment(take(context.data, rows), stream, augment))

    return sample
