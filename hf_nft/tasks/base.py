"""What a modality must tell the rest of the package: one file per task.

A task is bound to the processor of one suspect. Everything else sees encoded examples as an opaque `Batch` and asks
the task to augment, mix, run and judge them. A task file defines one concrete subclass of `Task` whose `name` is the
file's name. It must not know any attack, and must not draw randomness from anywhere but the generator it is handed.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import nn

from hf_nft.errors import UnknownNameError
from hf_nft.types import Batch, Draw, Inputs


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation, as data: which predictions are compared with which references by which module.

    Attributes:
        name: Key in records: `acc`, `asr`, `racc`, `perplexity`.
        module: File in `hf_nft/evaluation/metrics`.
        split: `clean` or `triggered` test rows.
        prediction: Key of what `Task.predict` returns.
        reference: What it is compared with: `target` (the row's own answer) or `attack` (what the attacker wants).
        config: Configuration name of the metric module.
    """

    name: str
    module: str
    split: str
    prediction: str
    reference: str
    config: str | None = None


@dataclass(eq=False)
class Task(ABC):
    """Loader, encoding, augmentation, mixing, loss and judgement of one modality.

    Attributes:
        processor: What belongs to one suspect: image processor, tokenizer ... A task's further fields are its settings.
    """

    processor: Any = dataclasses.field(repr=False)

    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers Auto class that loads a model of this task."""
    pipeline_tag: ClassVar[str]
    """Hub task name, for cards."""
    architectures: ClassVar[tuple[str, ...]]
    """Endings of `config.architectures` entries that belong to this task."""
    input_column: ClassVar[str]
    target_column: ClassVar[str]
    blank: ClassVar[dict[str, list[Any]]]
    """One canonical row that says nothing, of a usual size, to count a forward pass on."""
    metrics: ClassVar[tuple[Metric, ...]]
    augmentations: ClassVar[tuple[str, ...]] = ("none",)
    """What `augment` can do, the default first; `none` is always there."""

    mixup_alpha: ClassVar[float] = 1.0
    """MixUp parameter with which suspects of this task are distilled; 0 mixes nothing."""

    axes: ClassVar[int] = 0
    """Axes of an input across which parts of two can stand side by side, see `compose`."""

    eval_batch_size: ClassVar[int] = 250
    """Rows per forward pass of an evaluation."""

    def settings(self) -> dict[str, Any]:
        """Return what the user may set, by name; it goes into records."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "processor"}

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: str) -> Any:
        """Load the processor that belongs to a model folder."""

    @classmethod
    @abstractmethod
    def standardize(cls, dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
        """Rename columns to `input_column` and `target_column` and drop the rest.

        Args:
            dataset: Rows as stored.
            columns: The user's overrides, canonical name to stored name.

        Returns:
            The data set with exactly the canonical columns.

        Raises:
            DataError: If a column is missing or ambiguous; the message lists those found.
        """

    def align(self, dataset: datasets.Dataset, model: nn.Module) -> datasets.Dataset:
        """Translate the data set's labels into the model's, by name, then by id with a warning."""
        return dataset

    def fit(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """Bring inputs to the size the model sees, so that a trigger applied afterwards is not resampled."""
        return dataset

    def classes(self, model: nn.Module) -> int:
        """Return the number of classes; 0 for tasks without."""
        return 0

    def told(self, batch: Batch, classes: torch.Tensor) -> Batch:
        """Return the rows with other answers than their own, for tasks with classes.

        Args:
            batch: Encoded rows.
            classes: Their answers, int64 (rows,).

        Returns:
            The rows, with these answers.
        """
        raise NotImplementedError

    def unsayable(self, answer: Any) -> str | None:
        """Return why no model can be seen to give an answer, and what to do; None if one can."""
        return None

    @abstractmethod
    def strata(self, dataset: datasets.Dataset) -> np.ndarray:
        """Return the class of each row, int64 of shape (rows,); zeros for tasks without classes."""

    @abstractmethod
    def encode(self, dataset: datasets.Dataset, fitted: bool = False) -> Batch:
        """Turn rows into tensors, without any randomness.

        Args:
            dataset: Rows with canonical columns.
            fitted: Whether the inputs come from `fit` and have the model's size: they are not resized again, which
                would move or cut away a trigger.

        Returns:
            The encoded rows.
        """

    def augment(self, batch: Batch, generator: torch.Generator, kind: str = "default") -> Batch:
        """Return randomly augmented rows (same keys and shapes).

        Args:
            batch: Encoded rows.
            generator: Where all randomness comes from.
            kind: `default`, `none`, or a name in `augmentations`.

        Returns:
            The augmented rows.

        Raises:
            UnknownNameError: If the task has no such augmentation.
        """
        kind = self.augmentation(kind)
        return batch if kind == "none" else self._augment(batch, generator, kind)

    def augmentation(self, kind: str) -> str:
        """Look up an augmentation.

        Args:
            kind: `default`, `none`, or a name in `augmentations`.

        Returns:
            Its name; of `default` that of the first.

        Raises:
            UnknownNameError: If the task has no such augmentation.
        """
        kind = self.augmentations[0] if kind == "default" else kind
        if kind != "none" and kind not in self.augmentations:
            raise UnknownNameError(f"augmentation of {self.name}", kind, ("none", *self.augmentations))
        return kind

    def _augment(self, batch: Batch, generator: torch.Generator, kind: str) -> Batch:
        """Do one of `augmentations`, other than `none`."""
        raise NotImplementedError

    @abstractmethod
    def inputs(self, model: nn.Module, batch: Batch) -> Inputs:
        """Return the keyword arguments of a forward pass on these rows."""

    @abstractmethod
    def mix(self, model: nn.Module, batch: Batch, partner: Batch, lam: float) -> Inputs:
        """Return the arguments of a forward pass on `lam * batch + (1 - lam) * partner`.

        Source: Zhang et al., mixup (ICLR 2018); per task see the file.
        """

    def compose(self, model: nn.Module, batch: Batch, partner: Batch, lam: float, axis: int) -> Inputs:
        """Return the arguments of a forward pass on parts of two rows side by side, for tasks that have `axes`.

        Args:
            model: The model that is run.
            batch: Encoded rows; the first `lam` of each along the axis is kept.
            partner: Rows of which the rest is taken, as many.
            lam: Share in [0, 1].
            axis: Number of the axis, in [0, axes).

        Returns:
            The arguments.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, draw: Draw) -> Any:
        """Run a model on a draw, mixed or put together with its partner if it has one; returns the model's output."""
        if draw.partner is None:
            return model(**self.inputs(model, draw.batch))
        if draw.seam is not None:
            return model(**self.compose(model, draw.batch, draw.partner, draw.lam, draw.seam))
        return model(**self.mix(model, draw.batch, draw.partner, draw.lam))

    @abstractmethod
    def loss(self, output: Any, draw: Draw) -> torch.Tensor:
        """Mean cross-entropy of a model's output against the answers of a draw, a scalar.

        Of a mixed draw: `lam * loss(batch) + (1 - lam) * loss(partner)`.
        """

    @abstractmethod
    def answers(self, output: Any, temperature: float) -> Batch:
        """Return what a teacher's output says at a temperature, by `soften`: what `divergence` compares with."""

    def probabilities(self, output: Any) -> torch.Tensor:
        """Return what a model's output says of each class, float32 (rows, classes), for tasks with classes."""
        raise NotImplementedError

    @abstractmethod
    def divergence(self, output: Any, draw: Draw, temperature: float) -> torch.Tensor:
        """Mean KL divergence from `draw.answers` to a model's output at their temperature, times its square; a scalar.

        Where answers stand at positions of a row, those of both label sets count, weighted as in `loss`.
        """

    @abstractmethod
    def accuracy(self, output: Any, batch: Batch) -> torch.Tensor:
        """Share of correct answers in [0, 1], a scalar, without moving data off the device."""

    @abstractmethod
    def chance(self, model: nn.Module) -> float:
        """Accuracy of guessing, in [0, 1]."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch, wanted: set[str]) -> dict[str, list[Any]]:
        """Predict these rows.

        Args:
            model: In evaluation mode.
            batch: Encoded rows, on the model's device.
            wanted: Which kinds of prediction to make, keys as in `metrics`.

        Returns:
            For each kind, as many predictions as the metric's references flatten to.
        """

    @abstractmethod
    def references(self, dataset: datasets.Dataset, batch: Batch, prediction: str) -> list[Any]:
        """Return what the predictions of one kind are compared with: the rows' own answers."""

    @abstractmethod
    def save_processor(self, folder: str) -> None:
        """Write the processor beside a model."""
