"""The one training loop: every method and the planting of victims run on it, for every modality.

All examples lie on the device as one `Batch`. Each step's randomness comes from a generator seeded by (seed, stage,
step) and nothing else, so what a step draws does not depend on the number of processes, on gradient accumulation or on
an interruption: processes and micro-batches take slices of the same global batch, and a resumed run draws what the
uninterrupted one would have. The loop knows no method and no modality; a `Stage` brings the objective.
"""

import math
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, tqdm
from torch import nn

from hf_nft.acceleration import check_trainable, own_noise, quick_attention
from hf_nft.checkpoint import Checkpoint
from hf_nft.errors import ConfigError, DivergedError
from hf_nft.types import Draw, rows_of


@dataclass(frozen=True)
class Stage:
    """One phase of training.

    Attributes:
        name: Names the random stream and the checkpoint.
        steps: Number of optimizer steps.
        draw: Makes a global batch from the number of its first step and that step's generator.
        objective: Loss of a part of it, a scalar mean over rows.
        optimizer: None when nothing is learnt and only forward passes count (statistics).
        lr: Learning rate at a step, counted from 0.
        after_step: Called after each optimizer step (projection).
        stop: Asked every `look_every` steps whether to stop early.
        look_every: Steps between two looks at the losses; each look waits for the device once.
        clip: Largest norm of the gradient; None leaves it as it is.
        passes: What a step costs a row, in forward passes: 3 where weights get gradients, 2 where only masks do.
        reuse: Steps taken on one draw before the next is made (data echoing, arXiv 1907.05550).
        prepare: Completes each part of a fresh draw with forward passes, without gradients, whose result stays the
            same while the draw is reused: a teacher's answers.
    """

    name: str
    steps: int
    draw: Callable[[int, torch.Generator], Draw]
    objective: Callable[[nn.Module, Draw], torch.Tensor]
    optimizer: torch.optim.Optimizer | None
    lr: Callable[[int], float] = lambda step: 0.0
    after_step: Callable[[], None] = lambda: None
    stop: Callable[[], bool] = lambda: False
    look_every: int = 20
    clip: float | None = None
    passes: int = 3
    reuse: int = 1
    prepare: Callable[[Draw], Draw] | None = None


NOT_TRAINED: dict[str, Any] = {"stage": None, "step": 0, "live": {}, "optimizer": None}
"""What a checkpoint says of the stage that learns where none has begun."""


class Loop:
    """Runs stages on one Accelerate setup; see the module's text for what it guarantees."""

    def __init__(
        self,
        accelerator: Accelerator,
        seed: int,
        checkpoint: Checkpoint | None = None,
        progress: bool = False,
        report: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Prepare.

        Args:
            accelerator: Device, precision, processes and accumulation.
            seed: Seed of every random stream.
            checkpoint: Where to keep state; default nowhere.
            progress: Whether to show a bar, on the main process, on stderr.
            report: Extra numbers for the bar, such as the mean mask.
        """
        self.accelerator, self.seed = accelerator, seed
        self.checkpoint = checkpoint or Checkpoint()
        self.progress, self.report = progress, report
        self.sample_forwards = self.steps = 0  # the first counts work in forward passes of one row
        self.losses: dict[str, list[float]] = {}
        self._results: dict[str, torch.Tensor] = {}
        self._parts: list[Draw] = []
        self._rows = 0
        self._saved = self.checkpoint.read()
        self._trained = NOT_TRAINED
        if self._saved is not None:
            self._trained = {key: self._saved[key] for key in NOT_TRAINED}
            self.losses, self._results = self._saved["losses"], self._saved["results"]
            self.sample_forwards, self.steps = self._saved["sample_forwards"], self._saved["steps"]

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a tensor, or take it from the interrupted run: for stages whose only product is that tensor.

        Args:
            name: Key in the checkpoint.
            compute: Runs the stages and returns the product.

        Returns:
            The product, on the CPU; the main process's in all of them.
        """
        if name not in self._results:
            before, self.checkpoint = (self.checkpoint, self._trained), Checkpoint()
            try:
                (self._results[name],) = broadcast_object_list([compute().cpu()])  # or they decide apart at thresholds
            finally:
                self.checkpoint, self._trained = before
            self._save()
        return self._results[name]

    def run(self, stage: Stage, model: nn.Module, state: Callable[[], dict[str, torch.Tensor]]) -> list[float]:
        """Run one stage to its end.

        Args:
            stage: What to do.
            model: The bare model. Gradients are averaged over processes here: masks are a few kilobytes, and a
                wrapper would not allow what is trained to change between stages.
            state: Returns the live tensors that the stage changes; they are saved and restored in place.

        Returns:
            The loss of every step that was run, one number each.

        Raises:
            DivergedError: If a loss is not finite; the tensors of `state` then hold their last good values.
        """
        live, start = state(), 0
        losses = self.losses.setdefault(stage.name, []) if stage.optimizer is not None else []  # nothing is learnt
        if self._saved is not None and self._saved["stage"] == stage.name:
            start = self._saved["step"]
            _restore(live, self._saved["live"])
            if stage.optimizer is not None:
                stage.optimizer.load_state_dict(self._saved["optimizer"])
            self._saved = None
        optimizer = None
        if stage.optimizer is not None:
            check_trainable(self.accelerator, stage.optimizer)
            self.accelerator.free_memory()  # else gradients are unscaled for the optimizers of earlier stages too
            optimizer = self.accelerator.prepare(stage.optimizer)
        good, self._parts = _copy(live), []
        bar = tqdm(total=stage.steps, initial=start, desc=stage.name, disable=not self.progress, leave=False)
        pending: list[torch.Tensor] = []
        with bar, _interrupts() as interrupted, own_noise(where := self.accelerator.device), quick_attention(where):
            for step in range(start, stage.steps):
                if step > start and not pending and stage.stop():
                    break
                pending.append(self._step(stage, optimizer, model, step))
                due = (step + 1) % self.checkpoint.every == 0
                if len(pending) == stage.look_every or step + 1 == stage.steps or due or interrupted:
                    values = torch.stack(pending).tolist()
                    kept = due or interrupted or step + 1 == stage.steps
                    if not all(map(math.isfinite, values)) or (kept and not _all_finite(live)):
                        _restore(live, good)
                        raise DivergedError(
                            f"{stage.name}: expected finite losses and weights, found losses "
                            f"{[float(f'{v:.4g}') for v in values[-3:]]} up to step {step + 1}. "
                            f"Lower the learning rate or use --mixed-precision no; the last good state was kept."
                        )
                    bar.update(len(values))
                    bar.set_postfix({"loss": f"{values[-1]:.4f}", **{k: f"{v:.4f}" for k, v in self.report().items()}})
                    losses += values
                    pending = []
                if due or interrupted or step + 1 == stage.steps:
                    good = _copy(live)
                    if good:  # forward passes that change nothing leave nothing to go on from
                        moments = stage.optimizer.state_dict() if stage.optimizer is not None else None
                        self._trained = {"stage": stage.name, "step": step + 1, "live": good, "optimizer": moments}
                    self._save()
                if interrupted:
                    raise KeyboardInterrupt
        return losses

    def _step(self, stage: Stage, optimizer: AcceleratedOptimizer | None, model: nn.Module, step: int) -> torch.Tensor:
        stream = generator(self.seed, stage.name, step)
        torch.manual_seed(stream.initial_seed() ^ self.accelerator.process_index)  # dropout; see own_noise
        self.steps += 1
        if optimizer is None:
            draw = stage.draw(step, stream)
            self.sample_forwards += rows_of(draw.batch)
            with torch.no_grad(), self.accelerator.autocast():
                return stage.objective(model, draw).detach()
        if not self._parts or step % stage.reuse == 0:
            first = step - step % stage.reuse  # not this step, if an interrupted run goes on within a draw
            draw = stage.draw(first, generator(self.seed, stage.name, first))
            self._rows = rows_of(draw.batch)
            self._parts = [draw.part(rows) for rows in self._slices(self._rows)]
            if stage.prepare is not None:
                self.sample_forwards += self._rows * len(draw.wholes)
                with torch.no_grad(), self.accelerator.autocast():
                    self._parts = [stage.prepare(part) for part in self._parts]
        self.sample_forwards += self._rows * stage.passes
        for group in optimizer.param_groups:
            group["lr"] = stage.lr(step)
        parts, total = self._parts, torch.zeros((), device=self.accelerator.device)
        for part in parts:
            with self.accelerator.accumulate(model):
                with self.accelerator.autocast():
                    # Accelerate divides by the number of parts, and processes are averaged: parts may be uneven
                    weight = rows_of(part.batch) * len(parts) * self.accelerator.num_processes / self._rows
                    loss = stage.objective(model, part) * weight
                self.accelerator.backward(loss)
                total += loss.detach() / len(parts)
                if self.accelerator.sync_gradients:
                    self._average_gradients(optimizer)
                    if stage.clip is not None:
                        parameters = [p for group in optimizer.param_groups for p in group["params"]]
                        self.accelerator.clip_grad_norm_(parameters, stage.clip)
                optimizer.step()
                optimizer.zero_grad()
        stage.after_step()
        return self.accelerator.reduce(total, reduction="mean") if self.accelerator.num_processes > 1 else total

    def _average_gradients(self, optimizer: AcceleratedOptimizer) -> None:
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _slices(self, rows: int) -> Iterator[slice]:
        """This process's micro-batches: contiguous slices of the global batch."""
        world, count = self.accelerator.num_processes, self.accelerator.gradient_accumulation_steps
        if rows < world * count:
            raise ConfigError(
                f"batch_size: expected at least a row for each of {world} processes x {count} micro-batches, "
                f"found {rows} rows. Raise batch_size or lower gradient_accumulation_steps."
            )
        edges = [round(i * rows / (world * count)) for i in range(world * count + 1)]
        first = self.accelerator.process_index * count
        for i in range(first, first + count):
            yield slice(edges[i], edges[i + 1])

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            work = {"sample_forwards": self.sample_forwards, "steps": self.steps}
            self.checkpoint.write({**self._trained, "losses": self.losses, "results": self._results, **work})


def generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the random stream of one step.

    Args:
        seed: Seed of the run.
        stage: Name of the stage.
        step: Number of the step.

    Returns:
        A CPU generator; the same three values always give the same stream.
    """
    mixed = zlib.crc32(f"{seed}/{stage}/{step}".encode()) ^ (seed << 32)
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


def _all_finite(live: dict[str, torch.Tensor]) -> bool:
    """Whether what is trained is finite; a buffer may hold an infinity by design, such as an attention mask."""
    return all(bool(tensor.isfinite().all()) for tensor in live.values() if tensor.requires_grad)


def _copy(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in live.items()}


def _restore(live: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into a flag that is read between two steps, so that the state saved is whole."""
    received: list[int] = []
    try:
        old = {
            number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not the main thread: the caller handles signals
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if received:  # after the last look at the flag
        raise KeyboardInterrupt
