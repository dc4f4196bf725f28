"""Names shared by every room.

`Batch` is a dict of tensors with one common first dimension: the encoded examples of a task, kept whole on the device.
What the keys are is the task's affair; nothing outside `hf_nft/tasks` reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Draw:
    """What one step works on: an augmented batch, and a partner to mix it with or to put it together with.

    Attributes:
        batch: Augmented rows.
        partner: Rows it is mixed or put together with, one for each; None without either.
        lam: Weight of `batch` in [0, 1].
        seam: Axis of an input across which the first `lam` of a row stands beside the rest of its partner; None where
            rows are mixed.
        answers: What a teacher says to these (mixed) rows or to `wholes`, by `Task.answers`; None without a teacher.
    """

    batch: Batch
    partner: Batch | None = None
    lam: float = 1.0
    seam: int | None = None
    answers: Batch | None = None

    @property
    def label_sets(self) -> tuple[tuple[Batch, float], ...]:
        """The rows whose answers count, each with its weight: one set, or two of a mixed batch."""
        if self.partner is None:
            return ((self.batch, 1.0),)
        return (self.batch, self.lam), (self.partner, 1.0 - self.lam)

    @property
    def wholes(self) -> tuple["Draw", ...]:
        """What a teacher is asked: the rows as they are (mixed), or those that were put together, each whole."""
        return (self,) if self.seam is None else tuple(Draw(batch) for batch, _ in self.label_sets)

    def part(self, rows: slice) -> "Draw":
        """Return some of the rows, each with its own partner."""
        partner = None if self.partner is None else take(self.partner, rows)
        return replace(self, batch=take(self.batch, rows), partner=partner)
