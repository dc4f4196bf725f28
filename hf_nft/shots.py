"""Shots: the few clean examples a defender owns, chosen per class and recorded by index."""

from dataclasses import dataclass, field

import numpy as np
import torch

from hf_nft.errors import ConfigError, DataError
from hf_nft.types import Batch, rows_of


@dataclass(frozen=True)
class Shots:
    """Clean examples, encoded, with where they came from.

    Attributes:
        batch: The encoded rows, as the task encodes them.
        per_class: Shots per class; for tasks without classes, shots in all.
        classes: Number of classes present (1 for tasks without classes).
        indices: Row numbers in the data set's train part.
        seed: Seed of the draw.
        fingerprint: Content hash of the data set, see `hf_nft.data.fingerprint`.
        weights: Rows of the data set that each shot stands for, float32 (rows,), mean 1; None if all stand for as many.
        strata: Class of each shot, int64 (rows,) from 0; None if how frequent they are is not known.
    """

    batch: Batch = field(repr=False)
    per_class: float
    classes: int = 1
    indices: tuple[int, ...] = ()
    seed: int = 0
    fingerprint: str = ""
    weights: torch.Tensor | None = field(default=None, repr=False)
    strata: torch.Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of examples."""
        return rows_of(self.batch)

    @property
    def effective(self) -> float:
        """Number of equal shots whose mean would be as certain: (sum of weights)^2 / sum of their squares."""
        return len(self) if self.weights is None else float(self.weights.sum() ** 2 / self.weights.square().sum())


def held_out(total: int, fraction: float, seed: int = 0) -> np.ndarray:
    """Rows that a planted victim never sees, so that shots can be drawn from them.

    Args:
        total: Rows of the train part.
        fraction: Share held out, in [0, 1).
        seed: Seed of the permutation.

    Returns:
        Sorted int64 row numbers: the first `floor(fraction * total)` of a fixed permutation.
    """
    return np.sort(np.random.default_rng((seed, 1)).permutation(total)[: int(total * fraction)])


def class_weights(strata: np.ndarray, chosen: np.ndarray) -> torch.Tensor | None:
    """Weigh rows that were chosen class by class, so that classes count as often as in the data set.

    Args:
        strata: Class of each row of the data set, shape (rows,).
        chosen: Row numbers, of every class at least one.

    Returns:
        float32 (chosen,), mean 1; None if all weigh the same.
    """
    own = strata[chosen]
    weights = np.bincount(strata)[own] / np.bincount(own)[own]
    return None if np.ptp(weights) == 0 else torch.from_numpy(weights / weights.mean()).float()


def choose(strata: np.ndarray, per_class: int, seed: int = 0, pool: np.ndarray | None = None) -> np.ndarray:
    """Choose the same number of rows of every class.

    Args:
        strata: Class of each row, shape (rows,).
        per_class: Rows per class, >= 1.
        seed: Seed of the draw, >= 0; each class has its own stream, so that 10 shots begin with the rows of 5 shots.
        pool: Row numbers to choose from; default all.

    Returns:
        int64 row numbers, shape (classes * per_class,), class by class.

    Raises:
        ConfigError: If the seed is negative.
        DataError: If a class has fewer than `per_class` rows in the pool; the message names the class.
    """
    if seed < 0:
        raise ConfigError(f"--shot-seed: expected >= 0, found {seed}.")
    pool = np.arange(len(strata)) if pool is None else pool
    chosen = []
    for label in np.unique(strata):
        rows = pool[strata[pool] == label]
        if len(rows) < per_class:
            mend = f"Lower --shots to {len(rows)} or add examples." if len(rows) else "Add examples of it."
            raise DataError(
                f"shots: expected at least {per_class} clean examples of class {label}, found {len(rows)} among the "
                f"{len(pool)} rows to draw from. {mend}"
            )
        chosen.append(np.random.default_rng((seed, int(label))).permutation(rows)[:per_class])
    return np.concatenate(chosen)
