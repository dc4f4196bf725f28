"""evaluate(): measure a model on clean and triggered rows. Nothing here is visible to a defense."""

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.attacks.base import Attack
from hf_nft.errors import DataError, HFNFTError, SuspectError
from hf_nft.evaluation import metrics as modules
from hf_nft.hub import first_line
from hf_nft.tasks.base import Task
from hf_nft.types import Batch, rows_of, take, to_device

DEFINITIONS = {
    "acc": "accuracy on clean test rows",
    "asr": "attack success rate: share of triggered test rows, target rows left out, that get the attacker's answer",
    "racc": "robust accuracy: share of the same triggered rows that get their own answer",
    "perplexity": "perplexity of the clean test answers",
}


@dataclass(frozen=True)
class Measured:
    """One metric of one model.

    Attributes:
        value: The number; None if there were no rows.
        low: Lower end of the 95 % Wilson interval, for proportions.
        high: Upper end of it.
        successes: Hits, for proportions.
        total: Rows (or tokens).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    successes: int | None = None
    total: int = 0


@dataclass(frozen=True)
class EvalSet:
    """Test rows, encoded once for every model that is measured on them.

    Attributes:
        task: Judges predictions.
        clean: Encoded clean rows, with the data set they came from.
        triggered: Encoded triggered rows carrying their own answers; None without an attack.
        wanted: The attacker's answer for each triggered row.
    """

    task: Task
    clean: Batch = field(repr=False)
    clean_rows: datasets.Dataset
    triggered: Batch | None = field(default=None, repr=False)
    triggered_rows: datasets.Dataset | None = None
    wanted: tuple[Any, ...] = ()

    @property
    def own(self) -> list[Any]:
        """The triggered rows' own answers; none without an attack."""
        return [] if self.triggered_rows is None else list(self.triggered_rows[self.task.target_column])


def make_eval_set(task: Task, test: datasets.Dataset, attack: Attack | None, classes: int) -> EvalSet:
    """Encode test rows, and their triggered copies if an attack is known.

    Args:
        task: The suspect's task.
        test: Clean test rows with canonical columns and labels as the model numbers them, as stored: they are brought
            to the model's size here, before the attack, so that no trigger is resampled or cropped.
        attack: The attack to measure, or None.
        classes: Number of classes (0 for tasks without).

    Returns:
        The evaluation set.

    Raises:
        DataError: If an input cannot be read, the attack does not fit the rows, or its answer cannot be given.
    """
    test = task.fit(test)
    clean = task.encode(test, fitted=True)
    if attack is None:
        return EvalSet(task, clean, test)
    column = task.target_column
    rows = attack.triggered(test, classes, on_the_fly=attack.faint)
    wanted = tuple(rows[column])
    for problem in filter(None, map(task.unsayable, set(wanted))):
        raise DataError(f"attack {attack.name}: {problem}")
    own = rows.remove_columns([column, "poisoned"]).rename_column(f"orig_{column}", column)
    return EvalSet(task, clean, test, task.encode(own, fitted=True), own, wanted)


@torch.no_grad()
def evaluate(
    model: nn.Module, data: EvalSet, batch_size: int | None = None, mixed_precision: str = "auto"
) -> dict[str, Measured]:
    """Measure every metric of the task.

    Args:
        model: Any model of the task; it is put into evaluation mode.
        data: Rows to measure on.
        batch_size: Rows per forward pass, >= 1; default the task's.
        mixed_precision: As in training.

    Returns:
        Metric name -> measurement; metrics on triggered rows are missing without an attack.

    Raises:
        SuspectError: If the model does not run on the rows.
    """
    task, results = data.task, {}
    batch_size = batch_size or task.eval_batch_size
    splits: dict[str, tuple[Batch, datasets.Dataset]] = {"clean": (data.clean, data.clean_rows)}
    if data.triggered is not None and data.triggered_rows is not None:
        splits["triggered"] = (data.triggered, data.triggered_rows)
    for split, (batch, rows) in splits.items():
        specs = [metric for metric in task.metrics if metric.split == split]
        predicted = _predict(model, task, batch, {m.prediction for m in specs}, batch_size, mixed_precision)
        for spec in specs:
            own = task.references(rows, batch, spec.prediction)
            references = list(data.wanted) if spec.reference == "attack" else own
            module = modules.load(spec.module, spec.config)
            found = module.compute(predictions=predicted[spec.prediction], references=references)
            value = found.pop(spec.module)
            results[spec.name] = Measured(value, **found)
    return results


def _predict(
    model: nn.Module, task: Task, batch: Batch, wanted: set[str], batch_size: int, mixed_precision: str
) -> dict[str, list[Any]]:
    accelerator = make_accelerator(mixed_precision, model=model)
    model.to(accelerator.device).eval()
    predicted: dict[str, list[Any]] = {kind: [] for kind in wanted}
    for start in range(0, rows_of(batch), batch_size):
        part = to_device(take(batch, slice(start, start + batch_size)), accelerator.device)
        try:
            with accelerator.autocast():
                found = task.predict(model, part, wanted)
        except (HFNFTError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a stranger's settings reach every line of a model's code
            raise SuspectError(
                f"{type(model).__name__}: expected a forward pass on these rows, found: {first_line(error)}. Model, "
                f"processor and data do not fit each other."
            ) from error
        for kind in wanted:
            predicted[kind] += found[kind]
    return predicted
