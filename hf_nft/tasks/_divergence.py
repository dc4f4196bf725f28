"""How far a student's class distributions are from a teacher's; a vocabulary has thousands of classes."""

from typing import Any

import torch
from torch.nn import functional as F

from hf_nft.types import Batch

CHUNK = 2**20
"""Logits a loss is worked out for at once: few enough that what it makes on the way does not count."""


def soften(logits: torch.Tensor, temperature: float) -> Batch:
    """Return class distributions at a temperature, with their entropies, so that a student pays for neither.

    Args:
        logits: A teacher's, (n, classes), any floating dtype.
        temperature: Divides them, > 0.

    Returns:
        `probabilities` (n, classes) and `entropy` (n,) in nats, float32.
    """
    p = F.softmax(logits.float() / temperature, dim=-1)
    return {"probabilities": p, "entropy": torch.special.entr(p).sum(-1)}


def kl_to(answers: Batch, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the Kullback-Leibler divergence from a teacher's distributions to a student's, times the temperature^2.

    Source: Hinton et al., arXiv 1503.02531, section 2; the divergence is cross-entropy less the teacher's entropy.

    Args:
        answers: What `soften` gave.
        logits: The student's, (n, classes), any floating dtype.
        temperature: The one of `answers`, > 0.

    Returns:
        float32 (n,), in nats.
    """
    cross: torch.Tensor = _CrossEntropy.apply(logits, answers["probabilities"], temperature)
    return (cross - answers["entropy"]) * temperature**2


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of distributions that keeps one tensor of the logits' size: over a vocabulary these are the memory.

    PyTorch's own keeps or makes five at once. The gradient is softmax less the distribution, over the temperature; it
    is made together with the value, a few rows at a time, and scaled in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
        slope, cross = torch.empty_like(logits, dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)
        rows = max(1, CHUNK // logits.shape[1])
        with torch.autocast(logits.device.type, enabled=False):
            for part, taught, result, into in zip(
                *(tensor.split(rows) for tensor in (logits, probabilities, cross, slope)), strict=True
            ):
                said = F.log_softmax(part.float() / temperature, dim=-1)
                torch.neg(torch.linalg.vecdot(taught, said), out=result)
                torch.sub(said.exp_(), taught, out=into)
        ctx.save_for_backward(slope)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return cross

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_((grad / ctx.temperature)[:, None]).to(ctx.dtype), None, None
