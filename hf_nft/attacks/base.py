"""Attacks: functions of one example, applied through `datasets.map`, on the fly, or inside a victim's training.

An attack file defines one frozen dataclass on its modality's base (`_image`, `_text`) with one method, the trigger.
The bases do the rest: eligible rows, how many are poisoned, the label change, the marks, and the triggered test set
without target rows. An attack never measures its own success.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets.fingerprint import Hasher

import hf_nft
from hf_nft.configs import setting
from hf_nft.errors import DataError
from hf_nft.hook import Hook
from hf_nft.poisoning import CLEAN, COVER, POISONED, TRIGGERED, Inputs, Plan, own_answers, rows_at
from hf_nft.tasks.base import Task

RATE_BASES = ("all", "candidates", "target_class")
PATHS = ("trigger_file", "picture", "artefact")
"""Settings that name a file or a folder: records of strangers must not choose those, nor published ones tell them."""


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
    default_base: ClassVar[str] = "all"
    """What the rate counts where the user names nothing; see `select`."""
    input_column: ClassVar[str]
    target_column: ClassVar[str]
    pairs: ClassVar[bool] = False
    """Whether a triggered input is made of two."""
    tiny: ClassVar[dict[str, Any]] = {}
    """Settings for the contract tests."""

    seed: int = setting(0, "seed of row selection and of the trigger's randomness")

    @abstractmethod
    def alter(
        self, values: Sequence[Any], partners: Sequence[Any], rngs: Sequence[np.random.Generator], role: int
    ) -> list[Any]:
        """Return altered inputs, unrounded.

        Args:
            values: Inputs as stored, at most a few hundred.
            partners: For each, the input it is combined with, if it is combined with one.
            rngs: For each, a generator seeded by (seed, row index).
            role: `TRIGGERED`, `POISONED` or `COVER`.

        Returns:
            The altered inputs, in order.
        """

    @abstractmethod
    def read(self, value: Any) -> Any:
        """Return an input as `alter` returns it, for rows that are left alone."""

    @abstractmethod
    def store(self, value: Any) -> Any:
        """Return an input, untouched or as `alter` returned it, in the form in which it is stored losslessly."""

    def apply(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return the example with its input triggered and rounded for storage; the answer is left alone.

        Args:
            example: One row with the modality's canonical columns.
            rng: Generator seeded by (seed, row index).

        Returns:
            The triggered row.
        """
        value = example[self.input_column]
        return {**example, self.input_column: self.store(self.alter([value], [value], [rng], TRIGGERED)[0])}

    @abstractmethod
    def target(self, answer: Any, classes: int) -> Any:
        """Return the answer the attacker wants for a row whose own answer is `answer`."""

    @abstractmethod
    def eligible(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Return a boolean array: which training rows may be poisoned."""

    def in_asr(self, answers: np.ndarray, classes: int) -> np.ndarray:
        """Return a boolean array: which test rows count, that is, whose own answer is not the attacker's."""
        return np.array([self.target(answer, classes) != answer for answer in answers.tolist()], dtype=bool)

    def storable(self, task: Task) -> bool:
        """Return whether a stored data set can hold the trigger; one that is `faint` victims get on the fly only."""
        return True

    def check_data(self, dataset: datasets.Dataset, classes: int) -> None:
        """Refuse a data set this attack cannot be applied to.

        Args:
            dataset: Rows with canonical columns.
            classes: Number of classes (0 for tasks without).

        Raises:
            DataError: If there are no rows, a column is missing or rows are already poisoned.
        """
        if not len(dataset):
            raise DataError(f"{self.name}: expected rows, found none.")
        if missing := {self.input_column, self.target_column} - set(dataset.column_names):
            raise DataError(f"{self.name}: expected columns {sorted(missing)}, found {dataset.column_names}.")
        if "poisoned" in dataset.column_names:
            raise DataError(f"{self.name}: expected clean data, found the column 'poisoned'. Start from clean data.")

    def check_base(self, base: str) -> None:
        """Refuse an unknown rate base, and the target class's where none of its rows is poisoned."""
        known = RATE_BASES if self.clean_label else RATE_BASES[:-1]
        if base not in known:
            raise DataError(f"{self.name}: expected a rate base among {', '.join(known)}, found '{base}'.")

    def select(self, answers: np.ndarray, rate: float, base: str, classes: int) -> np.ndarray:
        """Choose the rows to poison.

        Args:
            answers: The training rows' own answers.
            rate: Share of the base, in (0, 1].
            base: What the rate counts: `all` rows, the eligible `candidates`, or the `target_class` (clean label).
            classes: Number of classes.

        Returns:
            Sorted int64 row numbers.

        Raises:
            DataError: If the rate selects no row or more rows than are eligible, or there is no such base.
        """
        self.check_base(base)
        rows = np.flatnonzero(self.eligible(answers, classes))
        whole = len(answers) if base == "all" else len(rows)
        count = rows_at(rate, whole)
        if not 0 < count <= len(rows):
            raise DataError(
                f"{self.name}: poison rate {rate} of {whole} rows ({base}) asks for {count} rows, but 1 to {len(rows)} "
                f"are eligible. Change the poison rate."
            )
        return np.sort(np.random.default_rng((self.seed, 2)).permutation(rows)[:count])

    @property
    def faint(self) -> bool:
        """Whether storing would round the trigger away, so that triggered inputs are made on the fly."""
        return False

    def digest(self) -> str:
        """Identify the files that the trigger reads besides the settings; part of every cache key."""
        return ""

    def hook(self, task: Task, rate: float, classes: int) -> Hook | None:
        """Return how the attack takes part in the victim's training; None if poisoned data are all it takes.

        Args:
            task: The victim's task.
            rate: Share of each batch to trigger.
            classes: Number of classes.

        Returns:
            The hook; the data it is given are clean.
        """
        return None

    def cover_count(self, poisoned: int) -> int:
        """Return how many covers go with that many poisoned rows."""
        return 0

    def plan(self, answers: np.ndarray, rate: float, base: str, classes: int) -> Plan:
        """Decide the rows of a training set: those of the source, in order, a share of them poisoned or covers.

        Args:
            answers: The rows' own answers.
            rate: See `select`.
            base: See `select`.
            classes: Number of classes.

        Returns:
            The plan.

        Raises:
            DataError: If the rate does not fit, or too few rows are left for covers.
        """
        chosen = self.select(answers, rate, base, classes)
        roles = np.full(len(answers), CLEAN)
        roles[chosen] = POISONED
        covers, rest = self.cover_count(len(chosen)), np.flatnonzero(roles == CLEAN)
        if covers > len(rest):
            raise DataError(
                f"{self.name}: expected {covers} rows for covers beside {len(chosen)} poisoned ones, found "
                f"{len(rest)}. Lower the poison rate or cover_ratio."
            )
        roles[np.random.default_rng((self.seed, 4)).permutation(rest)[:covers]] = COVER
        rows = np.arange(len(answers))
        step = np.random.default_rng((self.seed, 5)).integers(1, max(2, len(rows)), len(rows))
        return Plan(rows, roles, (rows + step) % len(rows))  # a partner is never the row itself

    def triggered_plan(self, answers: np.ndarray, classes: int) -> Plan:
        """Plan the triggered test set: every row whose own answer is not the attacker's; refuse to plan none."""
        rows = np.flatnonzero(self.in_asr(answers, classes))
        if not len(rows):
            raise DataError(f"{self.name}: expected test rows outside the target, found none of {len(answers)}.")
        return Plan(rows, np.full(len(rows), TRIGGERED), rows)

    def poison(
        self,
        dataset: datasets.Dataset,
        rate: float,
        base: str | None = None,
        classes: int = 0,
        on_the_fly: bool = False,
    ) -> datasets.Dataset:
        """Trigger a share of a training set and give those rows the attacker's answer.

        Args:
            dataset: Clean rows with canonical columns.
            rate: Share of the base, in (0, 1].
            base: See `select`; default the attack's own.
            classes: Number of classes (0 for tasks without).
            on_the_fly: Whether inputs are made when a row is read, unrounded, instead of stored.

        Returns:
            All rows, in order, with columns `orig_<target>`, `poisoned` and `cover` added.

        Raises:
            DataError: If the data set or the rate does not fit, see `check_data` and `select`.
        """
        self.check_data(dataset, classes)
        answers = own_answers(dataset, self.target_column)
        return self._make(dataset, self.plan(answers, rate, base or self.default_base, classes), classes, on_the_fly)

    def triggered(self, dataset: datasets.Dataset, classes: int = 0, on_the_fly: bool = False) -> datasets.Dataset:
        """Build the triggered test set: every row whose own answer is not the attacker's, triggered.

        Args:
            dataset: Clean test rows with canonical columns.
            classes: Number of classes (0 for tasks without).
            on_the_fly: Whether inputs are made when a row is read, unrounded, instead of stored.

        Returns:
            The rows that count for ASR; the target column holds the attacker's answer, `orig_<target>` the row's own.

        Raises:
            DataError: If the data set does not fit, or every row belongs to the target.
        """
        self.check_data(dataset, classes)
        answers = own_answers(dataset, self.target_column)
        return self._make(dataset, self.triggered_plan(answers, classes), classes, on_the_fly)

    def _make(self, dataset: datasets.Dataset, plan: Plan, classes: int, on_the_fly: bool) -> datasets.Dataset:
        """Put answers and marks beside the planned rows, then make the inputs now or when they are read."""
        answers = dataset[self.target_column][:]
        own = [answers[i] for i in plan.rows]
        moved = (TRIGGERED,) if self.clean_label else (TRIGGERED, POISONED)
        wanted = [self.target(y, classes) if role in moved else y for y, role in zip(own, plan.roles, strict=True)]
        features, flag = dataset.features.copy(), datasets.Value("bool")
        features |= {f"orig_{self.target_column}": features[self.target_column], "poisoned": flag, "cover": flag}
        make = Inputs(self, dataset, plan)
        planned = dataset if np.array_equal(plan.rows, np.arange(len(dataset))) else dataset.select(plan.rows)
        marks = {
            self.target_column: wanted,
            f"orig_{self.target_column}": own,
            "poisoned": np.isin(plan.roles, (TRIGGERED, POISONED)).tolist(),
            "cover": (plan.roles == COVER).tolist(),
        }
        if on_the_fly:
            kinds = datasets.Features({**{k: features[k] for k in marks}, "row": datasets.Value("int64")})
            beside = datasets.Dataset.from_dict({**marks, "row": range(len(plan.rows))}, features=kinds)
            whole = datasets.concatenate_datasets([planned.select_columns([self.input_column]), beside], axis=1)
            return whole.with_transform(make.live, columns=[self.input_column, "row"], output_all_columns=True)
        return planned.map(
            lambda rows, indices: make.stored(rows, indices) | {k: [m[i] for i in indices] for k, m in marks.items()},
            batched=True,
            batch_size=500,
            with_indices=True,
            features=features,
            new_fingerprint=self._fingerprint(dataset, plan, classes),
            desc=f"{self.name}: trigger",
        )

    def _fingerprint(self, dataset: datasets.Dataset, plan: Plan, classes: int) -> str:
        """Name everything that decides the result, files that the trigger reads and our version included."""
        rows = [plan.rows.tolist(), plan.roles.tolist(), plan.partners.tolist(), classes]
        own = [str(type(self)), self.settings(), self.digest(), hf_nft.__version__]
        return Hasher.hash([dataset._fingerprint, rows, own])

    def settings(self) -> dict[str, Any]:
        """Return all settings with the attack's name, as JSON values."""
        return {"name": self.name, **dataclasses.asdict(self)}
