"""An adversary: what pushes inputs to the attacker's answer is learnt anew for every draw, and masks learn beside it.

Where the units that a push goes through are the attacker's class's own, as in a convolutional network without running
statistics, cutting them cures nothing. What the trigger has that the class has not lies on the way from the inputs. So
once pushes have found the attacker's answer, and cutting has left it easy to reach, the inputs of some rows are pushed
to it, by a faint and a strong pattern in turn, and these rows are to be answered as the suspect answers them without.
The next draw's patterns are the best against the masks as they are by then. A cut that hardly hinders strong patterns
is taken back, since it does harm alone.

A pattern that may cover the whole input takes other ways to the answer than a small trigger does, and a trigger that it
does not meet stays. So windows are laid over the input; where a push within one of them reaches the answer, the strong
pattern keeps to the window that does so most easily. A small trigger lies there, if it takes no more of a push than
anywhere does; else the trigger may as well be elsewhere, and a third pattern is strong and anywhere. If a push from the
window reaches the answer no longer, past the cut or past what masks have learnt, a small trigger is gone.

Source: this package's. That a backdoor is unlearnt by a universal pattern learnt anew is Zeng et al., Adversarial
Unlearning of Backdoors via Implicit Hypergradient (I-BAU, ICLR 2022), arXiv 2110.03735; there of weights, from labels.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_nft.defenses._displacement import TIMES, Displacement, entering, likely
from hf_nft.defenses._easiest import (
    AIMED_STEPS,
    MANY_ROWS,
    MANY_STEPS,
    RADII,
    SCORED,
    STRIDE,
    Pushed,
    scored,
    search,
)
from hf_nft.defenses._pushes import ALONG, WHICH, Ascent, Pushes, frozen, grounds
from hf_nft.defenses._reach import MANY_JUDGES, easiest_window, reach
from hf_nft.defenses.base import Context, answers_to_shots, set_modes
from hf_nft.errors import DivergedError
from hf_nft.tasks.base import Task
from hf_nft.types import Draw, rows_of, take

SHUT = math.log(1 / 4)
"""Log-likelihood of the answer below which a strong pattern does not lead there."""
WORTH = 3.0
"""How many nats a cut must take from a strong pattern for each that it moves the answers to clean shots."""
STEPS = 6
"""Steps in which each draw's pattern is learnt, from none, on rows of the draw."""
LEARNT = 12
"""Rows that patterns are learnt on at most."""
FAINT, STRONG = 3.0, 6.0
"""Sizes of patterns, in sizes of the smallest that reaches the answer from where they may be."""
NARROWER = (1.0, 2.0)
"""Sizes that are tried in windows, in sizes of the smallest that reaches the answer from anywhere; beside statistics
the last alone, since a window is not needed there to tell whether the answer is still reached."""
MOST = 1.5
"""By how many times the pattern rows are pushed at most; each smaller one is as likely."""
FAR = 1 / 4
"""Share of an input's own length that this comes to at least, where statistics told nothing. A faint trigger that
covers the input is as long, however small the pattern that reaches its answer; in them it would have shown."""


@dataclass(frozen=True)
class Adversary(Displacement):
    """Pushes inputs to one answer.

    Attributes:
        context: What the defense sees.
        model: The suspect with an NFT adapter.
        pushes: The patterns of the latest draw, on the inputs: a faint one that may be anywhere, and one or two strong
            ones, the first in a window if one leads to the answer. They are no state of the run: a run that was
            interrupted within a draw and goes on learns them anew, by the masks of that step.
        radii: Their sizes, see `_pushes`.
        far: Length up to which rows are pushed at least, in the same unit, >= 0.
        weights: How often each shot is to be drawn, float32 (shots,), of sum 1.
        most: By how many times the pattern rows are pushed at most, where that is far enough.
    """

    context: Context
    model: nn.Module
    pushes: Pushes
    radii: tuple[float, ...]
    far: float
    weights: torch.Tensor
    most: float = MOST

    def forward(self, task: Task, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw whose rows are pushed; returns the model's output."""
        which = draw.batch[WHICH]
        times = draw.batch[TIMES].to(which.device) * self._stretch[which]
        patterns = {name: vectors.detach()[which] for name, vectors in self.pushes.vectors.items()}
        with entering(model, patterns, times):
            return task.forward(model, draw)

    @property
    def window(self) -> list[list[int]]:
        """Begin and end, by axis, of the window that leads to the answer; empty if none does."""
        spans = self.pushes.within if self.pushes.within.dim() else ()
        narrow = [span.squeeze().nonzero().T for span in spans if not span.all()]
        return [[int(at.min()), int(at.max()) + 1] for axes in narrow for at in axes]

    @property
    def telling(self) -> bool:
        """Whether a window takes no more of a push than anywhere does, as one that holds a trigger; others may not."""
        return bool(self.window) and self.radii[1] / STRONG <= self.radii[0] / FAINT

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the patterns' sizes, and the window that leads to the answer; JSON values."""
        return {"adversary_radii": [round(radius, 3) for radius in self.radii], "adversary_window": self.window}

    def left(self, past: str, batch_size: int) -> list[float]:
        """Push inputs as far again: how likely each pattern makes the answer with the masks as they are.

        Args:
            past: What masks have gone through, for names.
            batch_size: Rows per forward pass, >= 1.

        Returns:
            Mean log-likelihoods of the answer under each pattern.
        """
        pushes, name = self.pushes, f"pushes past {past}"

        def pushed() -> torch.Tensor:
            set_modes(self.model, statistics=False, dropout=False)
            for vector in pushes.vectors.values():
                vector.detach().zero_()
            try:
                with frozen(self.model), pushes.acting():
                    search(self.context, self.model, pushes, name, self._sizes, AIMED_STEPS, SCORED, batch_size)
                    return scored(self.context, self.model, pushes, f"{name}: score")
            except DivergedError:  # more than half precision holds: nothing says that it is closed
                return torch.zeros(len(self.radii))

        return [round(value, 3) for value in self.context.loop.once(name, pushed).tolist()]

    def closed(self, left: list[float]) -> bool:
        """Whether the window no longer leads to the answer; a pattern anywhere finds some way whatever is left."""
        return self.telling and left[1] < SHUT

    @staticmethod
    def hindered(left: list[float], harm: float) -> bool:
        """Whether a cut hinders a strong pattern by so much more than it harms the answers to clean shots, in nats."""
        return -min(left[1:]) > WORTH * harm

    def doubts(self, left: list[float]) -> tuple[tuple[str, str], ...]:
        """Return a doubt, by what the learnt masks left to pushes: if the answer is reached, or there is no telling."""
        if self.closed(left):
            return ()
        answer, where = int(self.pushes.aims[0]), " x ".join(f"{begin} to {end}" for begin, end in self.window)
        text = f"cutting left answer {answer} easy to reach; masks learnt against that, and nothing tells how well"
        if self.telling:
            text = f"answer {answer} is still reached by a push within {where} of the input"
        return (("way-left-open", text),)

    @property
    def _sizes(self) -> torch.Tensor:
        return torch.tensor(self.radii, device=self.pushes.aims.device)

    @property
    def _stretch(self) -> torch.Tensor:
        """By how much more each pattern is multiplied, float32 (patterns,)."""
        return (self.far / (self.most * self._sizes)).clamp(min=1.0)

    def displace(self, draw: Draw, share: float, stream: torch.Generator) -> Draw:
        """Choose how far each row is pushed, and by which pattern: by turns, in the whole draw."""
        turns = torch.arange(rows_of(draw.batch), device=self.pushes.aims.device) % len(self.radii)
        return super().displace(replace(draw, batch={**draw.batch, WHICH: turns}), share, stream)

    def prepare(self, draw: Draw) -> None:
        """Learn the patterns: up the likelihood of the answer, by steps that shrink to a sixth, as a search does."""
        pushes, loop = self.pushes, self.context.loop
        ascent, vectors = Ascent(pushes, self._sizes), list(pushes.vectors.values())
        part = Draw(take(draw.batch, slice(0, LEARNT)))
        for vector in vectors:
            vector.detach().zero_()
        with frozen(self.model), pushes.acting(), loop.accelerator.autocast():
            for step in range(STEPS):
                loss = pushes.objective(self.context, self.model, part)
                for vector, gradient in zip(vectors, torch.autograd.grad(loss, vectors), strict=True):
                    vector.grad = gradient
                ascent.param_groups[0]["lr"] = STRIDE * (1 - 5 / 6 * step / STEPS)
                ascent.step()
        loop.sample_forwards += 2 * STEPS * rows_of(part.batch)


def find(
    context: Context, model: nn.Module, pushed: Pushed, windowed: bool, covering: bool, batch_size: int
) -> Adversary | None:
    """Find where, and how far, inputs must be pushed to the answer that pushes found.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter; all masks are at 1, and are again in the end.
        pushed: What pushes found, an answer that stands out.
        windowed: Whether rows are to be pushed within the window that leads to it, if one does.
        covering: Whether a trigger may be left that covers the input, so that rows are pushed as far, see `FAR`, and
            whether a window is to tell what is left.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        The adversary; None if no input is of floating point numbers.
    """
    set_modes(model, statistics=False, dropout=False)
    ground = next((one for one in grounds(context, model, batch_size) if one.kind == "inputs"), None)
    if ground is None:
        return None
    answer = pushed.scores.argmax().to(context.loop.accelerator.device)
    pushes = Pushes(model, ground, answer.expand(1))
    size, _, _ = reach(context, pushes, "anywhere", RADII, pushed.alone, batch_size)
    radii, within, window = [FAINT * size], None, None
    if windowed:
        sizes = [size * times for times in (NARROWER if covering else NARROWER[-1:])]
        window = easiest_window(context, model, ground, answer, sizes, pushed.alone, batch_size)
    if window is not None:
        radii.append(STRONG * window[0])
    if window is None or window[0] > size:
        radii.append(STRONG * size)
    if window is not None:
        within = torch.ones(len(radii), *window[1].shape)
        within[1] = window[1]
    pushes = Pushes(model, ground, answer.expand(len(radii)), within)
    own = answers_to_shots(context, model, batch_size)
    answers = torch.zeros(own.shape[1]).index_fill(0, answer.cpu(), 1.0)
    far = covering * FAR * math.sqrt(sum(shape.numel() for shape in ground.shapes.values()))
    return Adversary(context, model, pushes, tuple(radii), far, likely(own, answers))


def usual_work(shots: int, rows: int, draws: int, axes: int) -> int:
    """Count what an adversary usually does, in forward passes of one row.

    Six sizes of a push anywhere, two of pushes in each window, both once more in the end, and both for each draw.

    Args:
        shots: Number of clean rows.
        rows: Rows of a draw.
        draws: Number of draws.
        axes: Axes of the task's inputs that are places.

    Returns:
        The count.
    """
    alone = (6 + 2) * SCORED * (2 * AIMED_STEPS + 1)
    in_windows = len(NARROWER) * ALONG**axes * (2 * MANY_STEPS * MANY_ROWS + MANY_JUDGES) if axes else 0
    return shots + alone + in_windows + 2 * STEPS * min(rows, LEARNT) * draws
