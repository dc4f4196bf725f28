"""BatchNorm statistics: what they can tell of, measured afresh after training, or made to agree between processes."""

import math
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import NFTLayer
from hf_nft.adapter.layer import owns_statistics
from hf_nft.defenses.base import Context, set_modes
from hf_nft.types import rows_of, take


def remembers(module: nn.Module, momentum: float) -> bool:
    """Whether a layer's running statistics are of many training batches, not of the last alone.

    With a momentum m they weigh batches like an even average over `(2 - m) / m` of them: 19 at torch's 0.1, 3 at 0.5.
    At the 0.997 and 0.99 that transformers gives MobileNet and EfficientNet they are those of the last batch.

    Args:
        module: A base layer.
        momentum: Largest m at which they are believed, in [0, 1].

    Returns:
        True for layers that track statistics with such a momentum, or with None: an even average over all batches.
    """
    norm: Any = module
    return owns_statistics(norm) and (norm.momentum is None or norm.momentum <= momentum)


def recalibrate(context: Context, model: nn.Module, batch_size: int) -> None:
    """Measure BatchNorm statistics afresh: averages over un-mixed, un-augmented shots, batches weighted by rows."""
    set_modes(model, statistics=True, dropout=False)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    old = [norm.momentum for norm in norms]
    for module in model.modules():
        if isinstance(module, NFTLayer) and module.get_base_layer() in norms:
            module.reset_running_stats()  # the adapter's own, never the suspect's
    seen = 0
    with torch.no_grad(), context.loop.accelerator.autocast():
        parts = math.ceil(len(context.shots) / batch_size)
        for chosen in torch.arange(len(context.shots)).tensor_split(parts):  # even: no batch of a single row
            rows = take(context.data, chosen.to(context.loop.accelerator.device))
            seen += rows_of(rows)
            for norm in norms:
                norm.momentum = rows_of(rows) / seen
            model(**context.task.inputs(model, rows))
    for norm, momentum in zip(norms, old, strict=True):
        norm.momentum = momentum


def average_statistics(context: Context, model: nn.Module) -> None:
    """Make running statistics agree between processes, each of which saw its own part of every batch."""
    accelerator = context.loop.accelerator
    if accelerator.num_processes > 1:
        for name, buffer in model.named_buffers():
            if "running_mean" in name or "running_var" in name:
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))
