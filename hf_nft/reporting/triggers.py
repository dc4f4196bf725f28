"""What a trigger looks like, and how much it changes: a picture of images before and after, and four numbers."""

import dataclasses
import math

import numpy as np
from PIL import Image

GAP, GAIN, SMALLEST = 2, 10, 128


@dataclasses.dataclass(frozen=True)
class Change:
    """How much a trigger changes an image of 8 bits, in grey levels of 255.

    Attributes:
        linf: Largest change of a value.
        l2: Root of the sum of squared changes.
        psnr: Peak signal-to-noise ratio in dB; infinite without a change.
        pixels: Share of pixels that change in any channel, in [0, 1].
    """

    linf: float
    l2: float
    psnr: float
    pixels: float


def change(before: np.ndarray, after: np.ndarray) -> Change:
    """Measure the change from one image to another.

    Args:
        before: uint8 (H, W, 3).
        after: uint8 (H, W, 3).

    Returns:
        The numbers.

    Source: PSNR as 10 log10(255^2 / MSE).
    """
    away = after.astype(np.float64) - before.astype(np.float64)
    mse = float(np.square(away).mean())
    return Change(
        linf=float(np.abs(away).max()),
        l2=float(np.sqrt(np.square(away).sum())),
        psnr=10 * math.log10(255**2 / mse) if mse else math.inf,
        pixels=float((away != 0).any(axis=-1).mean()),
    )


def mean_change(changes: list[Change]) -> Change:
    """Return the mean of every number; the largest of `linf`."""
    mean = {f.name: float(np.mean([getattr(c, f.name) for c in changes])) for f in dataclasses.fields(Change)}
    return Change(**{**mean, "linf": max(c.linf for c in changes)})


def grid(before: list[np.ndarray], after: list[np.ndarray]) -> Image.Image:
    """Draw images, the same images triggered, and ten times the difference around grey, one row each.

    Args:
        before: uint8 (H, W, 3) each, of one size.
        after: The same, triggered.

    Returns:
        The picture; images below 128 pixels are enlarged by whole factors.
    """
    rows = [before, after]
    away = [a.astype(int) - b.astype(int) for a, b in zip(after, before, strict=True)]
    rows.append([(128 + GAIN * d).clip(0, 255).astype(np.uint8) for d in away])
    height, width = before[0].shape[:2]
    factor = max(1, -(-SMALLEST // min(height, width)))
    height, width = factor * height, factor * width
    sheet = np.full((3 * (height + GAP) - GAP, len(before) * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            sheet[top : top + height, left : left + width] = image.repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(sheet)
