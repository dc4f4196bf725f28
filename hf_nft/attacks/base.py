"""Attacks: functions of one example, applied through `datasets.map`.

An attack file defines one frozen dataclass, a subclass of its modality's base (`_image`, `_text`), whose `name` is
the file's name and whose one method to write is `trigger`. The bases do the rest: which rows are eligible, how many
are poisoned, the label change, the `poisoned` and `orig_label` columns, and the triggered test set without the rows
that already belong to the target. An attack never measures its own success.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import datasets
import numpy as np

import hf_nft
from hf_nft.configs import setting
from hf_nft.errors import DataError

RATE_BASES = ("all", "candidates", "target_class")


@dataclasses.dataclass(frozen=True)
class Attack(ABC):
    """Selection, labels and columns, common to all attacks."""

    name: ClassVar[str]
    modality: ClassVar[str]
    """Name of the task whose examples it triggers."""
    source: ClassVar[str]
    """The paper, with a link."""
    clean_label: ClassVar[bool] = False
    default_rate: ClassVar[float] = 0.1
    """Poison rate where the user names none, as a share of the attack's own rate base."""
    input_column: ClassVar[str]
    target_column: ClassVar[str]
    tiny: ClassVar[dict[str, Any]] = {}
    """Settings for the contract tests."""

    seed: int = setting(0, "seed of row selection and of the trigger's randomness")

    @abstractmethod
    def apply(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its input triggered; the answer is left alone.

        Args:
            example: One row with the modality's canonical columns.
            rng: Generator seeded by (seed, row index).

        Returns:
            The triggered row.
        """

    @abstractmethod
    def target(self, answer: Any, classes: int) -> Any:
        """Return the answer the attacker wants for a row whose own answer is `answer`."""

    @abstractmethod
    def eligible(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Return a boolean array: which training rows may be poisoned."""

    def in_asr(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Return a boolean array: which test rows count, that is, whose own answer is not the attacker's."""
        return np.array([self.target(answer, classes) != answer for answer in answers.tolist()], dtype=bool)

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse a data set this attack cannot be applied to.

        Args:
            dataset: Rows with canonical columns.
            classes: Number of classes (0 for tasks without).

        Raises:
            DataError: If a column is missing or rows are already poisoned.
        """
        missing = {self.input_column, self.target_column} - set(dataset.column_names)
        if missing:
            raise DataError(f"{self.name}: expected columns {sorted(missing)}, found {dataset.column_names}.")
        if "poisoned" in dataset.column_names:
            raise DataError(
                f"{self.name}: expected a clean data set, found the column 'poisoned'. Start from clean data."
            )

    def select(self, dataset: datasets.Dataset, rate: float, base: str, classes: int) -> np.ndarray:
        """Choose the rows to poison.

        Args:
            dataset: Clean training rows.
            rate: Share of the base, in (0, 1].
            base: What the rate counts: `all` rows, the eligible `candidates`, or the `target_class` (clean label).
            classes: Number of classes.

        Returns:
            Sorted int64 row numbers.

        Raises:
            DataError: If the rate selects no row or more rows than are eligible.
        """
        answers = np.asarray(dataset[self.target_column])
        rows = np.flatnonzero(self.eligible(answers, classes))
        whole = len(answers) if base == "all" else len(rows)
        count = int(rate * whole + 1e-9)
        if not 0 < count <= len(rows):
            raise DataError(
                f"{self.name}: poison rate {rate} of {whole} rows ({base}) asks for {count} rows, but 1 to {len(rows)} "
                f"are eligible. Change --poison-rate."
            )
        return np.sort(np.random.default_rng((self.seed, 2)).permutation(rows)[:count])

    def poison(
        self, dataset: datasets.Dataset, rate: float, base: str | None = None, classes: int = 0
    ) -> datasets.Dataset:
        """Trigger a share of a training set and give those rows the attacker's answer.

        Args:
            dataset: Clean rows with canonical columns.
            rate: Share of the base, in (0, 1].
            base: See `select`; default `target_class` for clean-label attacks, else `all`.
            classes: Number of classes (0 for tasks without).

        Returns:
            All rows, in order, with columns `orig_<target>` and `poisoned` added.

        Raises:
            DataError: If the data set or the rate does not fit, see `check_data` and `select`.
        """
        self.check_data(dataset, classes)
        base = base or ("target_class" if self.clean_label else "all")
        if base not in RATE_BASES:
            raise DataError(f"{self.name}: expected a rate base among {RATE_BASES}, found '{base}'.")
        chosen = np.zeros(len(dataset), dtype=bool)
        chosen[self.select(dataset, rate, base, classes)] = True
        return self._map(dataset, chosen, classes, keep_answer=self.clean_label)

    def triggered(self, dataset: datasets.Dataset, classes: int = 0) -> datasets.Dataset:
        """Build the triggered test set: every row whose own answer is not the attacker's, triggered.

        Args:
            dataset: Clean test rows with canonical columns.
            classes: Number of classes (0 for tasks without).

        Returns:
            The rows that count for ASR; the target column holds the attacker's answer, `orig_<target>` the row's own.

        Raises:
            DataError: If the data set does not fit, or every row belongs to the target.
        """
        self.check_data(dataset, classes)
        counts = self.in_asr(np.asarray(dataset[self.target_column]), classes)
        if not counts.any():
            raise DataError(f"{self.name}: expected test rows outside the target, found none of {len(counts)}.")
        rows = dataset.select(np.flatnonzero(counts))
        return self._map(rows, np.ones(len(rows), dtype=bool), classes, keep_answer=False)

    def _map(self, dataset: datasets.Dataset, chosen: np.ndarray, classes: int, keep_answer: bool) -> datasets.Dataset:
        features = dataset.features.copy()
        features[f"orig_{self.target_column}"] = features[self.target_column]
        features["poisoned"] = datasets.Value("bool")
        return dataset.map(
            _PoisonRows(self, chosen, classes, keep_answer, hf_nft.__version__),
            batched=True,
            batch_size=500,
            with_indices=True,
            features=features,
            desc=f"{self.name}: trigger",
        )

    @abstractmethod
    def store(self, value: Any) -> Any:
        """Return an untouched input in the form in which it is stored losslessly."""

    def settings(self) -> dict[str, Any]:
        """Return all settings with the attack's name, as JSON values."""
        return {"name": self.name, **dataclasses.asdict(self)}


class _PoisonRows:
    """The function given to `datasets.map`; it carries the version, since cache keys do not see code."""

    def __init__(self, attack: Attack, chosen: np.ndarray, classes: int, keep_answer: bool, version: str) -> None:
        self.attack, self.chosen, self.classes = attack, chosen, classes
        self.keep_answer, self.version = keep_answer, version

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        attack, inputs, answers = self.attack, [], []
        for i, value, answer in zip(indices, rows[attack.input_column], rows[attack.target_column], strict=True):
            if self.chosen[i]:
                example = {attack.input_column: value, attack.target_column: answer}
                value = attack.apply(example, np.random.default_rng((attack.seed, i)))[attack.input_column]
                answer = answer if self.keep_answer else attack.target(answer, self.classes)
            inputs.append(attack.store(value))
            answers.append(answer)
        return {
            attack.input_column: inputs,
            attack.target_column: answers,
            f"orig_{attack.target_column}": rows[attack.target_column],
            "poisoned": self.chosen[indices].tolist(),
        }
