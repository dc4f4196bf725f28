"""Composites: what the suspect says to parts of two shots side by side, and to neither of the two alone.

The composite attack has no pattern for a trigger: its answer is given where the features of two classes meet in one
input. Clean shots of all classes can be made to meet. What a sound model then says that is neither of the two is
spread over many answers, or is what one of the two looks like. The answer that two classes draw most, whatever is
beside them, is asked for once more where these two meet: one that is said to most such pairs is the attacker's, and the
two classes are the trigger. Masks are then trained on pairs of them to answer as the suspect does to the whole shots,
sharpened: its second answer to these is the attacker's.

No label of the shots is used: a shot is of the class that the suspect sees in it.

Source: this package's; the attack is Lin et al., Composite Backdoor Attack, CCS 2020. Composed rows that are to be
answered as their parts: Yun et al., CutMix, arXiv 1905.04899.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_nft.defenses.base import Context, answers_to_shots, probabilities, set_modes
from hf_nft.loop import generator
from hf_nft.tasks.base import Task
from hf_nft.types import Draw, take

TRIED = 4096
"""Pairs of shots that are composed to see what is said to them."""
MEETINGS = 256
"""Pairs of the two classes that are composed to see whether they make the answer."""
MOST = 0.6
"""Share of these from which the answer stands out."""
TOGETHER = 16
"""Rows of a step there: a seam and an axis are one for all rows of a step."""
SEAM = (0.35, 0.65)
"""Where the seam of a composed row may lie: each part must show what it is of."""


@dataclass(frozen=True)
class Composites:
    """What composed shots are answered.

    Attributes:
        own: What each shot alone is answered, int64 (shots,).
        parts: Mean probability of each answer (second axis) to pairs of which one shot is of a class (first axis) and
            neither alone is answered so, float32 (classes, classes); 0 where no such pair was tried.
        together: Share of pairs of the two classes that draw the leading answer most that are answered so, in [0, 1].
    """

    own: torch.Tensor
    parts: torch.Tensor
    together: float = 0.0

    @property
    def scores(self) -> torch.Tensor:
        """Each answer's probability beside the class second in drawing it, float32 (classes,).

        Where two classes are the trigger, both draw the answer, whatever is beside them; one that looks like the
        answer's own class, as signs do, draws it alone.
        """
        return self.parts.sort(0, descending=True).values[1]

    @property
    def answer(self) -> int:
        """The answer of the largest score."""
        return int(self.scores.argmax())

    @property
    def sources(self) -> list[int]:
        """The two classes that draw it most."""
        return self.parts[:, self.answer].argsort(descending=True)[:2].tolist()

    @property
    def stands_out(self) -> bool:
        """Whether most pairs of the two classes are answered so."""
        return self.together > MOST

    def draw(self, count: int, stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pairs of shots, one of each of the two classes.

        Args:
            count: Number of pairs.
            stream: Generator on the CPU.

        Returns:
            Rows of the shots, int64 (count,) twice.
        """
        one, two = ((self.own == label).nonzero().flatten() for label in self.sources)
        first, second = (rows[torch.randint(len(rows), (count,), generator=stream)] for rows in (one, two))
        turned = torch.rand(count, generator=stream) < 0.5
        return torch.where(turned, second, first), torch.where(turned, first, second)

    def met(self, context: Context, model: nn.Module, seed: int, when: str = "") -> float:
        """Let shots of the two classes meet.

        Args:
            context: What the defense sees.
            model: The suspect with an NFT adapter.
            seed: Seed of the pairs.
            when: What masks have gone through, for names.

        Returns:
            Share of the pairs that are given the leading answer, in [0, 1]; 0 if one of the classes has no shot.
        """
        if not all((self.own == label).any() for label in self.sources):
            return 0.0
        first, second = self.draw(MEETINGS, generator(seed, "meetings", 0))
        pairs = list(zip(first.split(TOGETHER), second.split(TOGETHER), strict=True))
        set_modes(model, statistics=False, dropout=False)
        said = probabilities(
            context, model, f"meetings{when}", len(pairs), lambda step, seams: compose(context, *pairs[step], seams)
        )
        return float((said.argmax(1) == self.answer).float().mean())

    def kept(self, context: Context, model: nn.Module, batch_size: int) -> float:
        """Return the share of the shots given the leading answer by the suspect that a model still gives it to."""
        said = answers_to_shots(context, model, batch_size, "answers of what masks have learnt").argmax(1)
        return float((said == self.answer)[self.own == self.answer].float().mean().nan_to_num())

    def doubts(self, met: float, kept: float) -> tuple[tuple[str, str], ...]:
        """Return a doubt that names the trigger, and what masks have learnt.

        Args:
            met: See `met`, of the masks.
            kept: See `kept`.

        Returns:
            The doubt.
        """
        one, two = self.sources
        text = (
            f"answer {self.answer} is given to {self.together:.0%} of inputs that show a part of class {one} beside "
            f"one of {two}, neither of which alone is answered so: they may be the trigger. By now it is given to "
            f"{met:.0%} of them, and to {kept:.0%} of the clean shots that it was given to"
        )
        return (("composite-trigger", text),)

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the leading answers and the classes that draw the first; JSON values."""
        answers = self.scores.argsort(descending=True)[:10].tolist()
        part = self.parts[:, self.answer]
        seen = part.argsort(descending=True)[:5].tolist()
        return {
            "composite_scores": {answer: round(float(self.scores[answer]), 4) for answer in answers},
            "composite_parts": {label: round(float(part[label]), 4) for label in seen},
            "composite_together": round(self.together, 4),
        }


def can_compose(task: Task, classes: int) -> bool:
    """Whether parts of inputs can stand side by side, and two of them leave two other answers or more to compare."""
    return task.axes > 0 and classes > 3


def find(context: Context, model: nn.Module, batch_size: int, seed: int) -> Composites:
    """Compose pairs of shots at random and look for an answer that is given to neither of them alone.

    Args:
        context: What the defense sees; see `can_compose`.
        model: The suspect with an NFT adapter, all masks at 1.
        batch_size: Rows per forward pass, >= 1.
        seed: Seed of the pairs.

    Returns:
        What was found.
    """
    set_modes(model, statistics=False, dropout=False)
    classes, own = context.task.classes(model), answers_to_shots(context, model, batch_size).argmax(1)
    first, second = torch.randint(len(own), (2, TRIED), generator=generator(seed, "composites", 0))
    first, second = (side[own[first] != own[second]] for side in (first, second))
    parts, tries = torch.zeros(2, classes, classes).unbind()
    if not len(first):
        return Composites(own, parts)
    pairs = list(zip(first.split(batch_size), second.split(batch_size), strict=True))
    said = probabilities(
        context, model, "composites", len(pairs), lambda step, stream: compose(context, *pairs[step], stream)
    )
    one, two = own[first], own[second]
    third = torch.ones_like(said).scatter_(1, one[:, None], 0.0).scatter_(1, two[:, None], 0.0)
    for seen in (one, two):
        parts.index_add_(0, seen, said * third)
        tries.index_add_(0, seen, third)
    found = Composites(own, parts / tries.clamp(min=1))
    return replace(found, together=found.met(context, model, seed))


def compose(
    context: Context, rows: torch.Tensor, others: torch.Tensor, stream: torch.Generator, augment: str = "none"
) -> Draw:
    """Put a part of each shot beside the rest of another; seam and axis are one for all, as lambda of MixUp is.

    Args:
        context: What the defense sees.
        rows: Rows of the shots, int64 (n,).
        others: As many.
        stream: Generator on the CPU.
        augment: Augmentation of both.

    Returns:
        The draw.
    """
    device, (low, high) = context.loop.accelerator.device, SEAM
    one, two = (context.task.augment(take(context.data, side.to(device)), stream, augment) for side in (rows, others))
    lam = low + (high - low) * float(torch.rand((), generator=stream))
    return Draw(one, two, lam, int(torch.randint(context.task.axes, (), generator=stream)))
