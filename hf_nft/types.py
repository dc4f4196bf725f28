"""Names shared by every room.

`Batch` is a dict of tensors with one common first dimension: the encoded examples of a task, kept whole on the device.
What the keys are is the task's affair; nothing outside `hf_nft/tasks` reads them.
"""

from collections.abc import Mapping
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
"""Encoded examples; every tensor has shape (rows, ...)."""

Inputs = dict[str, Any]
"""Keyword arguments of one forward pass of a model."""


def take(batch: Mapping[str, torch.Tensor], rows: torch.Tensor | slice) -> Batch:
    """Select rows of a batch.

    Args:
        batch: Encoded examples.
        rows: int64 indices of shape (n,), or a slice.

    Returns:
        A batch of the selected rows, in their order.
    """
    return {key: tensor[rows] for key, tensor in batch.items()}


def rows_of(batch: Mapping[str, torch.Tensor]) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(batch.values())))


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> Batch:
    """Move a batch to a device."""
    return {key: tensor.to(device) for key, tensor in batch.items()}
