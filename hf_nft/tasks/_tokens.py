"""Rows of tokens of different lengths: how they are padded, and where in them an answer is expected."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from hf_nft.types import Batch, Draw

IGNORED = -100
"""Label of what is not to be predicted, as in transformers."""


def padded(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """Stack rows of different lengths; int64 (rows, longest)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value, side)


def resized(rows: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """Cut or pad (rows, any) on the right to (rows, length)."""
    return F.pad(rows, (0, length - rows.shape[1]), value=value)


def used(batch: Batch) -> int:
    """Return how many columns some row uses; on an accelerator all of them, for looking would wait for the device."""
    mask = batch["attention_mask"]
    return int(mask.sum(1).max()) if mask.device.type == "cpu" else mask.shape[1]


def shifted(output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (rows, n, vocabulary) and the labels (rows, n) they predict, each one position further.

    A mixed pass may be longer than these rows and a pass without unused columns shorter; what is cut holds no label.
    """
    n = min(output.logits.shape[1], batch["labels"].shape[1])
    return output.logits[:, : n - 1], batch["labels"][:, 1:n]


class Said(NamedTuple):
    """What a model says where an answer is expected: `logits` (positions, vocabulary), of rows of `length` tokens."""

    logits: torch.Tensor
    length: int


class Expected(NamedTuple):
    """What should be said.

    Attributes:
        positions: Where, int64 (positions,), in the rows laid end to end; a slice of all of them on an accelerator,
            where looking would wait for the device.
        tokens: What, by label set, int64 (positions, sets).
        weights: What it weighs, (positions, sets): a mean over the answered positions of a row, then over rows; a row
            without any counts as 0.
    """

    positions: torch.Tensor | slice
    tokens: torch.Tensor
    weights: torch.Tensor


def expected(draw: Draw, length: int) -> Expected:
    """Say what a draw expects of a model that reads rows of `length` tokens."""
    tokens, weights = [], []
    for batch, share in draw.label_sets:
        labels = resized(batch["labels"][:, 1:], length, IGNORED)
        kept = labels != IGNORED
        tokens.append(labels.clamp(min=0).flatten())
        weights.append((kept * (share / len(labels) / kept.sum(1, keepdim=True).clamp(min=1))).flatten())
    said, weight = torch.stack(tokens, 1), torch.stack(weights, 1)
    where = slice(None) if weight.device.type != "cpu" else weight.sum(1).nonzero()[:, 0]
    return Expected(where, said[where], weight[where])
