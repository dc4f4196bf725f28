"""How much work and memory a purification is expected to take: orders of magnitude, from counted operations.

Source: scale of the work as multiples of one forward pass F: a step on all weights costs 3F, a step on masks 2F
(frozen weights need no gradient), a teacher 1F more.
"""

import dataclasses
import math
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_nft import registry
from hf_nft.defenses import _adversary, _shift
from hf_nft.defenses._composites import MEETINGS, TRIED, can_compose
from hf_nft.defenses._easiest import usual_work
from hf_nft.defenses._harm import TRIES
from hf_nft.defenses._norms import remembers
from hf_nft.defenses._statistics import ENOUGH
from hf_nft.tasks.base import Task

CPU_RATE = 0.12e12
"""FLOP/s of one CPU core in fp32, as measured on a ResNet."""
GPU_RATE = 0.45 * 790e12
"""FLOP/s of a large GPU (H200) in bf16: 45 % of a measured matrix product."""
EVALUATED_ROWS = 10_000
COPIES = 4
"""Of the weights, in fp32: themselves, what to return to, gradients, momentum."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a purification with the default preset is expected to take, in the order of magnitude.

    An unlearning, where there is one, is taken to run all its steps, which few do.

    Attributes:
        forward_flop: Operations of one forward pass of one row, counted.
        activation_bytes: What one row leaves for the backward pass, in the weights' type, counted.
        shots: Shots assumed.
        purify_flop: Operations of the defense.
        evaluate_flop: Operations of measuring clean test rows before and after.
        memory_bytes: Weights, their copies, and the activations of one batch.
        cpu_seconds: On one CPU core.
        gpu_seconds: On a large GPU.
        assumes: What was assumed, in words.
    """

    forward_flop: float
    activation_bytes: int
    shots: int
    purify_flop: float
    evaluate_flop: float
    memory_bytes: int
    cpu_seconds: float
    gpu_seconds: float
    assumes: str


def estimate(model: nn.Module, task: Task, per_class: int) -> Estimate:
    """Count one forward pass on the meta device and multiply.

    Args:
        model: The model without data.
        task: Its task, bound to its processor.
        per_class: Shots per class.

    Returns:
        The estimate.
    """
    flop, activations = count(model, task)
    nft: Any = registry.get("defenses", "nft").from_preset("default")
    classes = task.classes(model)
    shots = per_class * max(1, classes)
    statistics = keeps_statistics(model, nft.statistics_momentum)
    purify = flop * forwards(nft, task, statistics, shots, classes)
    evaluate = flop * 2 * EVALUATED_ROWS
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Estimate(
        forward_flop=flop,
        activation_bytes=activations,
        shots=shots,
        purify_flop=purify,
        evaluate_flop=evaluate,
        memory_bytes=COPIES * 4 * weights + nft.batch_size * activations,
        cpu_seconds=_two_digits((purify + evaluate) / CPU_RATE),
        gpu_seconds=_two_digits((purify + evaluate) / GPU_RATE),
        assumes=f"{per_class} shots per class, the default preset, {EVALUATED_ROWS} clean test rows measured twice, "
        f"{CPU_RATE / 1e12:.2g} TFLOP/s on one CPU core, {GPU_RATE / 1e12:.3g} on a large GPU; download not counted",
    )


def keeps_statistics(model: nn.Module, momentum: float) -> bool:
    """Whether the default preset will find what to cut in the model's running statistics.

    Args:
        model: Any model.
        momentum: Largest momentum of statistics that tell of the training data, in [0, 1].

    Returns:
        True if a layer of it keeps such.
    """
    return any(remembers(module, momentum) for module in model.modules())


def forwards(nft: Any, task: Task, statistics: bool, shots: int, classes: int = 0) -> int:
    """Count the work of a purification in forward passes of one row.

    Args:
        nft: The method's settings.
        task: The suspect's task.
        statistics: Whether the suspect keeps running statistics.
        shots: Number of clean rows.
        classes: Number of the suspect's classes; 0 for tasks without.

    Returns:
        The most that `sample_forwards` of a record can say, less where the cut or an exposure ends early; with pushes,
        what they usually take.
    """
    found, pushed = 0, nft.pushing(statistics and shots < ENOUGH, classes)
    if statistics:
        kinds = len({*task.augmentations, "none"}) - 1  # each with as many passes, and one without augmentation
        found = shots * (kinds * nft.statistics_passes + 1 + TRIES)
    if pushed:
        found += usual_work(classes, shots)
    elif not statistics:
        relearn = nft.relearn_passes * max(1, round(shots / nft.batch_size))
        found = nft.exposures * min(shots, nft.batch_size) * (3 * nft.unlearn_steps + 2 * relearn)
    rows, draws, asked = nft.batch_rows(task, shots), math.ceil(nft.steps / nft.echoes(task, shots)), 1
    if nft.pushed_rows(statistics) and pushed:
        found += _adversary.usual_work(shots, rows, draws, task.axes)
    if nft.composed and can_compose(task, classes):
        found, asked = found + TRIED + 2 * MEETINGS + shots, 2  # before and after; of a composed row each whole
    if nft.shifting(statistics, classes):
        found += _shift.usual_work(shots, rows, draws) + shots * (asked == 1)  # as they are, if not asked for already
    return found + rows * (2 * nft.steps + asked * draws)


def count(model: nn.Module, task: Task) -> tuple[float, int]:
    """Count what one forward pass of one row does and keeps.

    Args:
        model: The model without data.
        task: Its task, bound to its processor.

    Returns:
        Operations (a multiplication and an addition are two), and bytes that wait for the backward pass.
    """
    inputs = task.inputs(model, task.encode(datasets.Dataset.from_dict(task.blank)))
    # one row is whole, so it needs no mask; what has no data cannot be looked into, as ids are for padding without a
    # mask, and positions without a cache (hence the tensors alone)
    model.config.pad_token_id = None  # type: ignore[union-attr]
    shown = {k: v.to("meta") for k, v in inputs.items() if isinstance(v, torch.Tensor) and "mask" not in k}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.eval()(**shown)
    return float(counter.get_total_flops()), sum(storage.nbytes() for storage in kept.values())


def _two_digits(value: float) -> float:
    """An estimate claims no more."""
    return float(f"{value:.2g}") if math.isfinite(value) else value
