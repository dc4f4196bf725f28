"""Reach: how hard inputs must be pushed before an answer is given, from anywhere and within a window."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_nft.defenses._easiest import AIMED_STEPS, MANY_ROWS, MANY_STEPS, REACHED, SCORED, scored, search
from hf_nft.defenses._pushes import Ground, Pushes, frozen, windows
from hf_nft.defenses.base import Context
from hf_nft.errors import DivergedError

MANY_JUDGES = 16
"""Rows that tell how well each of many pushes works."""


def easiest_window(
    context: Context,
    model: nn.Module,
    ground: Ground,
    answer: torch.Tensor,
    sizes: Sequence[float],
    alone: float,
    batch_size: int,
) -> tuple[float, torch.Tensor] | None:
    """Find the window of the input within which a push reaches the answer most easily.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter.
        ground: The inputs.
        answer: The answer, int64 ().
        sizes: Sizes that are tried in turn.
        alone: Median log-likelihood of answers without a push.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        Size of the push, and 1 within the window and 0 outside; None if there is no window, or none that does.
    """
    shape, *others = ground.shapes.values()
    places = None if others else windows(shape, context.task.axes)
    if places is None:
        return None
    many = Pushes(model, ground, answer.expand(len(places)), places)
    narrow, reached, best = reach(context, many, "in a window", sizes, alone, batch_size)
    return (narrow, places[best]) if reached else None


def reach(
    context: Context, pushes: Pushes, where: str, sizes: Sequence[float], alone: float, batch_size: int
) -> tuple[float, bool, int]:
    """Push inputs to an answer, harder until one of the pushes reaches it.

    Args:
        context: What the defense sees.
        pushes: The pushes, all to one answer.
        where: Where they are, for names.
        sizes: Sizes that are tried in turn.
        alone: Median log-likelihood of answers without a push.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        The size, the largest tried if none did; whether one reached it; the number of the push that does best.
    """
    model = pushes.model
    one = len(pushes.aims) == 1
    steps, rows, judges = (AIMED_STEPS, SCORED, SCORED) if one else (MANY_STEPS, MANY_ROWS, MANY_JUDGES)

    def smallest() -> torch.Tensor:
        found = torch.tensor([sizes[0], 0.0, 0.0])
        with frozen(model), pushes.acting():
            for radius in sizes:
                name = f"push of inputs {where} to the answer, of {radius:.3g}"
                try:
                    search(context, model, pushes, name, radius, steps, rows, batch_size)
                    scores = scored(context, model, pushes, f"{name}: score", judges)
                except DivergedError:  # more than half precision holds
                    break
                reached = bool(scores.max() >= REACHED * alone)
                found = torch.tensor([radius, reached, float(scores.argmax())])
                if reached:
                    break
        return found

    size, reached, best = context.loop.once(f"size that reaches the answer {where}", smallest).tolist()
    return size, bool(reached), int(best)
