"""purify(): from a suspect model and clean shots to a cured model."""

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hf_nft import registry
from hf_nft.acceleration import make_accelerator
from hf_nft.checkpoint import Checkpoint, checksum
from hf_nft.defenses.base import Context, Defense
from hf_nft.errors import DataError
from hf_nft.loop import Loop
from hf_nft.shots import Shots
from hf_nft.tasks.base import Task
from hf_nft.types import to_device


@dataclasses.dataclass(frozen=True)
class PurifyResult:
    """What a purification yields.

    Attributes:
        model: The cured model in evaluation mode; a `PeftModel` if the cure is an adapter (call `merged`).
        settings: All settings of the defense.
        losses: Stage name -> loss of every step.
        details: Facts that the defense reports.
        doubts: Reasons to distrust the cure that clean data showed, as (code, sentence).
        seconds: Wall time of the defense alone.
        steps: Optimizer steps and forward passes, all stages.
        sample_forwards: Work of all stages in forward passes of one row: a full step costs 3, a mask step 2.
        peak_memory_mb: Peak of GPU memory, or of the process's resident memory on a CPU, in MiB.
        mixed_precision: The precision that was used.
    """

    model: nn.Module
    settings: dict[str, Any]
    losses: dict[str, list[float]]
    details: dict[str, Any]
    doubts: tuple[tuple[str, str], ...]
    seconds: float
    steps: int
    sample_forwards: int
    peak_memory_mb: float
    mixed_precision: str

    def merged(self) -> nn.Module:
        """Return the plain architecture with the masks folded in; the adapter is gone from `model` afterwards."""
        if isinstance(self.model, PeftModel):
            merged: nn.Module = self.model.merge_and_unload(safe_merge=True)
            return merged
        return self.model


def purify(
    model: nn.Module,
    task: Task,
    shots: Shots,
    defense: Defense | None = None,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    progress: bool = False,
) -> PurifyResult:
    """Remove a backdoor, if there is one, with a few clean examples.

    There is no argument through which triggered or test data could enter.

    Args:
        model: The suspect; changed in place.
        task: Its task, bound to its processor.
        shots: Clean, encoded examples.
        defense: What to do; default NFT with the preset `default`.
        checkpoint: File for the state of an interruptible run; default none.
        checkpoint_every: Steps between two writes of it.
        resume: Whether to go on from that file.
        progress: Whether to show a bar with loss and mean mask.

    Returns:
        The cured model with everything a record needs.

    Raises:
        DataError: If there are no shots.
        SuspectError: If the model has nothing to mask.
        DivergedError: If a loss is not finite; the model then holds its last good state.
    """
    if len(shots) == 0:
        raise DataError("shots: expected at least one clean example, found none.")
    chosen: Defense = defense or registry.get("defenses", "nft").from_preset("default")
    accelerator = make_accelerator(chosen.mixed_precision, chosen.gradient_accumulation_steps, model)
    device = accelerator.device
    model.to(device)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    facts = {**chosen.settings(), "shots": list(shots.indices), "data": shots.fingerprint}
    if checkpoint is not None:
        facts["model"] = checksum(model)
    loop = Loop(accelerator, chosen.seed, Checkpoint(checkpoint, checkpoint_every, resume, facts), progress=progress)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    outcome = chosen.run(Context(model, task, shots, to_device(shots.batch, device), loop))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    outcome.model.eval()
    return PurifyResult(
        model=outcome.model,
        settings=chosen.settings(),
        losses=loop.losses,
        details=outcome.details,
        doubts=outcome.doubts,
        seconds=time.perf_counter() - start,
        steps=loop.steps,
        sample_forwards=loop.sample_forwards,
        peak_memory_mb=peak_memory_mb(device),
        mixed_precision=accelerator.mixed_precision,
    )


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far in MiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
