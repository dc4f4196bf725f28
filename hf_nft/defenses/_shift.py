"""Shifts: the pattern on the inputs that explains what the suspect's running means remember.

Where running means lie farther from those of the shots than their choice explains (see `_memory`), the pattern is
looked for, one for all shots, that moves the means most nearly as they are remembered. Norms pass on what it does to
them from one to the next, which is not so of noise. All norms are displaced by as much of its moves as the distances
hold, and as many times more as a trigger is rare; what shots are answered then is the attacker's answer, if it is said
to enough of them. The pattern is then led to that answer as well.

While masks learn, the inputs of some rows are pushed by it, after a few more steps of the same kind against the masks
as they are. These rows are to be answered as the suspect answers them without. A pattern that is not held to what is
remembered finds other ways to the answer, and the trigger stays.

Source: this package's. Inputs that are found by norm statistics: Yin et al., Dreaming to Distill (CVPR 2020), arXiv
1912.08795; there to replace data.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nft.defenses._displacement import TIMES, Displacement, entering, likely
from hf_nft.defenses._memory import Memory, heard_of_shots, listening
from hf_nft.defenses._pushes import WHICH, Pushes, frozen, grounds, shorten
from hf_nft.defenses.base import Context, answers_to_shots, set_modes
from hf_nft.loop import Stage
from hf_nft.tasks.base import Task
from hf_nft.types import Draw, rows_of, take

STEPS, AIMED_STEPS, ROWS = 60, 40, 48
"""Steps in which the pattern is found, and in which it is led to the answer; rows of each."""
FURTHER, FEW = 6, 24
"""Steps in which it is led on for each draw, and rows of the draw that it is led on with."""
PACE = 1 / 30
"""Step of a pattern, in root mean squares of the input."""
SIZE = 0.3
"""Length of a pattern that leads to the answer, as a share of an input's own, at most."""
MOST = 1.5
"""By how many times the pattern rows are pushed at most; each smaller one is as likely."""
TOLD = 1 / 4
"""Mean probability of an answer to displaced shots from which it is the attacker's."""
QUIET = "quiet_means"
"""Key of what enters the norms as rows are, among encoded rows."""


@dataclass(frozen=True)
class Shifts(Displacement):
    """Pushes inputs by a pattern that moves means as the suspect's running means remember.

    Attributes:
        context: What the defense sees.
        model: The suspect with an NFT adapter.
        memory: What the running means remember.
        pushes: The pattern of the latest draw, on the inputs. It is no state of the run, see `_adversary`.
        start: The pattern against the suspect, from which each draw's begins; (1, ...) by input.
        moves: How far norms were displaced to see the answer, in standard deviations, float32 (channels,).
        answers: Mean probability of each class where norms are displaced so, float32 (classes,).
        weights: How often each shot is to be drawn, float32 (shots,), of sum 1.
        guide: Weight of the agreement with what is remembered beside the answer's log-likelihood, >= 0.
        most: By how many times the pattern rows are pushed at most.
    """

    context: Context
    model: nn.Module
    memory: Memory
    pushes: Pushes
    start: dict[str, torch.Tensor]
    moves: torch.Tensor
    answers: torch.Tensor
    weights: torch.Tensor
    guide: float
    most: float = MOST

    def prepare(self, draw: Draw) -> None:
        """Lead the pattern on to the answer, by rows of the draw and the masks as they are."""
        pushes, loop, vectors = self.pushes, self.context.loop, list(self.pushes.vectors.values())
        batch = take(draw.batch, slice(0, FEW))
        rows = rows_of(batch)
        part = Draw({**batch, WHICH: torch.zeros(rows, dtype=torch.int64, device=pushes.aims.device)})
        for name, vector in pushes.vectors.items():
            vector.detach().copy_(self.start[name])
        optimizer = torch.optim.Adam(vectors, lr=_pace(pushes))
        with frozen(self.model), loop.accelerator.autocast():
            with torch.no_grad(), listening(self.memory.layers, rows) as heard:
                self.context.task.forward(self.model, part)
            part.batch[QUIET] = self.memory.measured(heard)
            with pushes.acting():
                for _ in range(FURTHER):
                    loss = _missed(self.context, self.model, self.memory, pushes, part, self.guide)
                    for vector, gradient in zip(vectors, torch.autograd.grad(loss, vectors), strict=True):
                        vector.grad = gradient
                    optimizer.step()
                    _shorten(pushes)
        loop.sample_forwards += (2 * FURTHER + 1) * rows

    def forward(self, task: Task, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw whose rows are pushed; returns the model's output."""
        times = draw.batch[TIMES].to(self.pushes.aims.device)
        with entering(model, {name: vector.detach() for name, vector in self.pushes.vectors.items()}, times):
            return task.forward(model, draw)

    @property
    def stands_out(self) -> bool:
        """Whether displaced shots are given one answer often enough."""
        return float(self.answers.max()) >= TOLD

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the leading answers to displaced shots; JSON values."""
        leading = self.answers.argsort(descending=True)[:5].tolist()
        return {"shift_answers": {answer: round(float(self.answers[answer]), 4) for answer in leading}}


def find(
    context: Context, model: nn.Module, memory: Memory, most: float, guide: float, batch_size: int
) -> Shifts | None:
    """Find the pattern that explains what running means remember, and what shots are answered where norms see it.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, all masks at 1, of a task with classes.
        memory: What its running means remember.
        most: By how many times what they hold norms are displaced to see the answer, >= 0.
        guide: See `Shifts`.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        How rows are to be pushed and drawn; None if no input is of floating point numbers.
    """
    set_modes(model, statistics=False, dropout=False)
    ground = next((one for one in grounds(context, model, batch_size) if one.kind == "inputs"), None)
    if ground is None:
        return None
    device = context.loop.accelerator.device
    pushes = Pushes(model, ground, torch.zeros(1, dtype=torch.int64, device=device))

    def pattern(pushes: Pushes, name: str, steps: int, guide: float | None) -> dict[str, torch.Tensor]:
        found = context.loop.once(name, lambda: _search(context, model, memory, pushes, name, steps, guide))
        parts = found.to(device).split([shape.numel() for shape in ground.shapes.values()])
        return {name: part.view(1, *shape) for (name, shape), part in zip(ground.shapes.items(), parts, strict=True)}

    draws = torch.Generator().manual_seed(0)
    for name, vector in pushes.vectors.items():
        vector.detach().copy_(0.01 * ground.scales[name].cpu() * torch.randn(vector.shape, generator=draws))
    start = pattern(pushes, "pattern that moves means", STEPS, None)
    with entering(model, start, torch.ones(1, device=device)):
        pushed = heard_of_shots(context, model, memory.layers, "means of pushed shots", batch_size)
    moves = most * memory.explained((pushed / memory.spread - memory.quiet).mean(0))
    answers = _told(context, model, memory, moves, batch_size)
    pushes = Pushes(model, ground, answers.argmax()[None].to(device))
    for name, vector in pushes.vectors.items():
        vector.detach().copy_(start[name])
    start = pattern(pushes, "pattern that moves means to the answer", AIMED_STEPS, guide)
    only = torch.zeros_like(answers).index_fill(0, answers.argmax(), 1.0)
    weights = likely(answers_to_shots(context, model, batch_size), only)
    return Shifts(context, model, memory, pushes, start, moves, answers, weights, guide)


def usual_work(shots: int, rows: int, draws: int) -> int:
    """Count what shifts usually take, in forward passes of one row.

    Shots as they are, twice, pushed, and displaced; the search; and what each draw's pattern takes.

    Args:
        shots: Number of clean rows.
        rows: Rows of a draw.
        draws: Number of draws.

    Returns:
        The count.
    """
    return 4 * shots + 2 * (STEPS + AIMED_STEPS) * ROWS + (2 * FURTHER + 1) * min(rows, FEW) * draws


def _search(
    context: Context, model: nn.Module, memory: Memory, pushes: Pushes, name: str, steps: int, guide: float | None
) -> torch.Tensor:
    """Learn a pattern from the one that the pushes hold, see `_missed`; all inputs' parts in one, flat."""
    device = pushes.aims.device

    def draw(step: int, stream: torch.Generator) -> Draw:
        rows = torch.randint(len(context.shots), (ROWS,), generator=stream).to(device)
        return Draw({**take(context.data, rows), WHICH: torch.zeros_like(rows), QUIET: memory.quiet[rows]})

    stage = Stage(
        name,
        steps,
        draw,
        lambda network, part: _missed(context, network, memory, pushes, part, guide),
        torch.optim.Adam(list(pushes.vectors.values())),
        lambda step: _pace(pushes),
        (lambda: None) if guide is None else (lambda: _shorten(pushes)),
        passes=2,
    )
    with frozen(model), pushes.acting():
        context.loop.run(stage, model, lambda: dict(pushes.vectors))
    context.loop.losses.pop(name, None)
    return torch.cat([vector.detach().flatten().cpu() for vector in pushes.vectors.values()])


def _missed(
    context: Context, network: nn.Module, memory: Memory, pushes: Pushes, part: Draw, guide: float | None
) -> torch.Tensor:
    """Negative log-likelihood of the answer less the guide's weight times the agreement; without one, that alone."""
    with listening(memory.layers, rows_of(part.batch)) as heard:
        loss = pushes.objective(context, network, part)
    agreement = memory.agreement((memory.measured(heard) - part.batch[QUIET]).mean(0))
    return -agreement if guide is None else loss - guide * agreement


def _shorten(pushes: Pushes) -> None:
    vectors = list(pushes.vectors.values())
    longest = torch.tensor(SIZE * math.sqrt(sum(vector.numel() for vector in vectors)))
    shorten(vectors, [pushes.scales[name] for name in pushes.vectors], longest)


def _pace(pushes: Pushes) -> float:
    """Learning rate of patterns, in the input's units; of several inputs, those of the first."""
    return PACE * float(next(iter(pushes.scales.values())))


def _told(context: Context, model: nn.Module, memory: Memory, moves: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Displace what enters each norm, and return the mean probability of each class over all shots."""
    bases: list[Any] = [layer.get_base_layer() for layer in memory.layers]
    parts = (moves * memory.spread).split([len(norm.running_mean) for norm in bases])

    def move(shift: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = inputs
        return x + shift.to(x.dtype).view(-1, *[1] * (x.dim() - 2)), *others

    def displaced(network: nn.Module, draw: Draw) -> Any:
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, shift=shift: move(shift, inputs))
            for layer, shift in zip(memory.layers, parts, strict=True)
        ]
        try:
            return context.task.forward(network, draw)
        finally:
            for hook in hooks:
                hook.remove()

    set_modes(model, statistics=False, dropout=False)
    return answers_to_shots(context, model, batch_size, "answers to displaced shots", displaced).mean(0)
