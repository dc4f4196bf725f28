"""plant(): train a backdoored model from a poisoned data set, so that cures can be measured on known victims."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.checkpoint import Checkpoint
from hf_nft.configs import check, setting
from hf_nft.hook import Hook
from hf_nft.loop import Loop, Stage
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, Draw, rows_of, to_device


@dataclasses.dataclass(frozen=True)
class PlantConfig:
    """How a victim is trained. Defaults: SGD with one cycle, right for 10 epochs of a small residual network."""

    epochs: int = setting(10, "passes over the poisoned training rows, >= 1")
    batch_size: int = setting(
        64, "rows per step, >= 1; small, because 10 epochs are short of steps rather than of rows"
    )
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "sgd (Nesterov momentum 0.9) for CNNs, adamw for transformers")
    lr: float = setting(0.05, "highest learning rate, > 0")
    clip: float = setting(
        2.0, "largest norm of the gradient, > 0; without it one run in a few diverges at the peak rate"
    )
    weight_decay: float = setting(5e-4, "weight decay, >= 0")
    warmup: float = setting(0.2, "share of the steps over which the rate rises, in [0, 1); it falls to 0 as a cosine")
    augment: str = setting("default", "augmentation after the trigger: default, none, or one the task offers")
    holdout: float = setting(0.1, "share of training rows kept from the victim for the defender's shots, in [0, 1)")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting("auto", "auto: bf16 where the hardware has it")
    gradient_accumulation_steps: int = setting(1, "micro-batches per step, >= 1")
    seed: int = setting(0, "seed of weights, order and augmentation, in [0, 2^43)")
    max_steps: int | None = setting(None, "stop after this many steps, >= 1; for trials")

    def __post_init__(self) -> None:
        """Check the settings."""
        check(
            self,
            (self.epochs >= 1, f"epochs: expected >= 1, found {self.epochs}"),
            (self.batch_size >= 1, f"batch_size: expected >= 1, found {self.batch_size}"),
            (self.lr > 0, f"lr: expected > 0, found {self.lr}"),
            (self.clip > 0, f"clip: expected > 0, found {self.clip}"),
            (self.optimizer in ("sgd", "adamw"), f"optimizer: expected sgd or adamw, found {self.optimizer!r}"),
            (self.weight_decay >= 0, f"weight_decay: expected >= 0, found {self.weight_decay}"),
            (0 <= self.warmup < 1, f"warmup: expected in [0, 1), found {self.warmup}"),
            (0 <= self.holdout < 1, f"holdout: expected in [0, 1), found {self.holdout}"),
            (self.gradient_accumulation_steps >= 1, "gradient_accumulation_steps: expected >= 1"),
            (0 <= self.seed < 2**43, f"seed: expected in [0, 2^43), found {self.seed}"),
            (self.max_steps is None or self.max_steps >= 1, f"max_steps: expected >= 1, found {self.max_steps}"),
        )


@dataclasses.dataclass(frozen=True)
class PlantResult:
    """What training a victim yields.

    Attributes:
        losses: Training loss of every step.
        seconds: Wall time of the training alone.
        sample_forwards: Work in forward passes of one row: a step costs 3.
        mixed_precision: The precision that was used.
    """

    losses: list[float]
    seconds: float
    sample_forwards: int
    mixed_precision: str


def one_cycle(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: linear rise to `peak`, then half a cosine down to 0.

    Args:
        step: Step, counted from 0.
        steps: Number of steps.
        peak: Highest learning rate.
        warmup: Share of the steps that rise.

    Returns:
        The learning rate.

    Source: Smith and Topin, Super-Convergence, arXiv 1708.07120 (one cycle, without its last phase).
    """
    rise = max(1.0, warmup * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))


def shuffled(step: int, rows: int, batch_size: int, seed: int) -> torch.Tensor:
    """Return the rows of a step when every epoch goes once through a fresh permutation; int64 (batch_size,).

    Args:
        step: Step, counted from 0.
        rows: Number of rows.
        batch_size: Rows per step; the last rows of a permutation that do not fill a step are left out.
        seed: Seed of the permutations.

    Returns:
        Row numbers.
    """
    per_epoch = max(1, rows // batch_size)
    stream = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
    start = (step % per_epoch) * batch_size
    return torch.randperm(rows, generator=stream)[start : start + batch_size]


def plant(
    model: nn.Module,
    task: Task,
    batch: Batch,
    config: PlantConfig,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = False,
    hook: Hook | None = None,
) -> PlantResult:
    """Train all weights of a model on (poisoned) rows, in place.

    Args:
        model: A freshly initialised model.
        task: Its task.
        batch: Encoded training rows, already poisoned; clean ones if a hook poisons them.
        config: Settings.
        checkpoint: File for the state of an interruptible run.
        resume: Whether to go on from that file.
        progress: Whether to show a bar.
        hook: The attacker's part in the training: what it makes of each batch, and the loss.

    Returns:
        Losses and work; `model` is trained and in evaluation mode.

    Raises:
        DivergedError: If the loss is not finite.
    """
    accelerator = make_accelerator(config.mixed_precision, config.gradient_accumulation_steps)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    rows = rows_of(batch)
    batch_size = min(config.batch_size, rows)
    per_epoch = max(1, rows // batch_size)
    steps, part = config.epochs * per_epoch, hook or Hook()
    model.to(accelerator.device)
    data = to_device(batch, accelerator.device)

    def draw(step: int, stream: torch.Generator) -> Draw:
        if step % per_epoch == 0:
            part.epoch(model, data, stream)
        chosen = shuffled(step, rows, batch_size, config.seed).to(accelerator.device)
        return Draw(part.batch(data, chosen, lambda found: task.augment(found, stream, config.augment), stream))

    def objective(network: nn.Module, drawn: Draw) -> torch.Tensor:
        return part.loss(network, task, drawn.batch)

    loop = Loop(
        accelerator,
        config.seed,
        Checkpoint(checkpoint, every=500, resume=resume, facts=dataclasses.asdict(config)),
        progress,
    )
    stage = Stage(
        "plant",
        steps if config.max_steps is None else min(steps, config.max_steps),
        draw,
        objective,
        optimizer,
        lambda step: one_cycle(step, steps, config.lr, config.warmup),
        clip=config.clip,
    )
    start = time.perf_counter()
    losses = loop.run(stage, model, lambda: {**model.state_dict(keep_vars=True), **part.state()})
    model.eval()
    return PlantResult(losses, time.perf_counter() - start, loop.sample_forwards, accelerator.mixed_precision)
