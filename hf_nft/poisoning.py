"""Poisoned data sets: which rows one has, and how their inputs are made, stored or on the fly."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import datasets
import numpy as np

from hf_nft.errors import DataError

CLEAN, TRIGGERED, POISONED, COVER = range(4)
"""Roles of a row. A triggered row is what the attacker shows a victim, a poisoned one what the victim learns from,
which differ in some clean-label attacks. A cover keeps its answer under an altered input, so that the trigger alone is
what is learnt."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of a poisoned data set.

    Attributes:
        rows: int64 (n,), the source row of each.
        roles: int64 (n,), `CLEAN`, `TRIGGERED`, `POISONED` or `COVER`.
        partners: int64 (n,), another source row, for inputs that are made of two.
    """

    rows: np.ndarray
    roles: np.ndarray
    partners: np.ndarray


class Alters(Protocol):
    """What is needed of an attack to make inputs."""

    input_column: ClassVar[str]
    pairs: ClassVar[bool]

    @property
    def seed(self) -> int:
        """Seed of the trigger's randomness."""

    def alter(
        self, values: Sequence[Any], partners: Sequence[Any], rngs: Sequence[np.random.Generator], role: int
    ) -> list[Any]:
        """Return altered inputs, unrounded."""

    def read(self, value: Any) -> Any:
        """Return an untouched input as `alter` would."""

    def store(self, value: Any) -> Any:
        """Return an input in the form in which it is stored losslessly."""


class Inputs:
    """Makes the inputs of planned rows."""

    def __init__(self, attack: Alters, source: datasets.Dataset, plan: Plan) -> None:
        """Bind.

        Args:
            attack: Alters inputs.
            source: The clean rows.
            plan: What becomes of them.
        """
        self.attack, self.source, self.plan = attack, source, plan

    def stored(self, rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """Return inputs as they are stored; for `map`.

        Args:
            rows: Columns of some planned rows.
            numbers: Their places in the plan.

        Returns:
            The input column.
        """
        values = rows[self.attack.input_column]
        made = self._made(values, numbers)
        return {self.attack.input_column: [self.attack.store(made.get(k, v)) for k, v in enumerate(values)]}

    def live(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return inputs unrounded; for `with_transform`.

        Args:
            rows: The input column and the places in the plan, `row`, of some rows.

        Returns:
            The same columns.
        """
        values, numbers = rows[self.attack.input_column], rows["row"]
        made = self._made(values, numbers)
        read = [made[k] if k in made else self.attack.read(v) for k, v in enumerate(values)]
        return {self.attack.input_column: read, "row": numbers}

    def _made(self, values: list[Any], numbers: list[int]) -> dict[int, Any]:
        """Return the altered inputs by place."""
        attack, found = self.attack, dict[int, Any]()
        for role in (TRIGGERED, POISONED, COVER):
            places = [place for place, i in enumerate(numbers) if self.plan.roles[i] == role]
            if places:
                rows, partners = [numbers[place] for place in places], [values[place] for place in places]
                if role == COVER or attack.pairs:
                    others = [int(self.plan.partners[i]) for i in rows]
                    partners = self.source[others][attack.input_column]
                rngs = [np.random.default_rng((attack.seed, i)) for i in rows]
                altered = attack.alter([values[place] for place in places], partners, rngs, role)
                found.update(zip(places, altered, strict=True))
        return found


def own_answers(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Return the rows' own answers.

    Args:
        dataset: The rows.
        column: Where their answers are.

    Returns:
        int64 (rows,); of texts, which NumPy would pad to the longest, objects.
    """
    own = dataset[column][:]
    return np.array(own, dtype=object if own and isinstance(own[0], str) else None)


def rows_at(rate: float, whole: int) -> int:
    """Return how many rows a rate selects.

    Args:
        rate: Share of the rows; may be anything a user wrote.
        whole: How many rows it counts, >= 0.

    Returns:
        The rows, rounded down; 0 if the rate is not finite.
    """
    return int(rate * whole + 1e-9) if math.isfinite(rate) else 0


def share_of(name: str, count: int, batch_size: int) -> float:
    """Return the share that poisoned rows are of a batch.

    Args:
        name: The attack's, for the message.
        count: Poisoned rows of a batch, >= 0.
        batch_size: Rows of a batch, >= 1.

    Returns:
        The share, in (0, 1] where the count fits into the batch.

    Raises:
        DataError: If the count is 0: the victim would be trained without a backdoor.
    """
    if count < 1:
        raise DataError(
            f"{name}: expected a rate that selects a row of every batch, found none of {batch_size}. "
            f"Raise the poison rate or the batch size."
        )
    return count / batch_size
