"""Inspect: what a model is, what of it would be refused, and what curing it takes, without loading a weight."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from torch import nn

from hf_nft.adapter import NFTConfig, resolve_targets
from hf_nft.adapter_intake import base_source, check_fit
from hf_nft.blueprint import draw, read_config, refuse_remote_code
from hf_nft.configs import setting
from hf_nft.errors import ConfigError, DataError, SuspectError, UnsafeModelError
from hf_nft.hub import first_line
from hf_nft.intake import Source, locate
from hf_nft.suspect import bind, register_architectures, task_of
from hf_nft.tasks.base import Task
from hf_nft.weights import Stored, stored_tensors, weight_files
from hf_nft.workflows.estimate import Estimate, estimate
from hf_nft.workflows.job import dataset_of_card

PLACEMENTS = ("bn", "norm", "units", "channels")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is known about a model from its listing, its small files and the headers of its weights.

    Attributes:
        name: Hub id or folder.
        revision: Commit on the Hub; None for a folder.
        base: Name and commit of the base model, if this is an adapter.
        files: Name -> bytes.
        formats: Ending of file names -> bytes.
        size: Bytes of all files.
        architecture: Class that its config names.
        task: Task of this package that it belongs to.
        stored: Type of the stored numbers -> how many there are.
        parameters: Of the model that the config describes.
        units: Placement -> number of masks, 0 where it has no place.
        dataset: Data set that its card names.
        refused: Why a purification would refuse it, one sentence each; empty if it would not.
        notes: What else could not be told.
        estimate: What a purification is expected to take.
    """

    name: str
    revision: str | None
    base: dict[str, str | None] | None
    files: dict[str, int]
    formats: dict[str, int]
    size: int
    architecture: str | None
    task: str | None
    stored: dict[str, int]
    parameters: int | None
    units: dict[str, int]
    dataset: str | None
    refused: list[str]
    notes: list[str]
    estimate: Estimate | None


@dataclasses.dataclass(frozen=True)
class InspectJob:
    """Look at a model without loading it."""

    model: str = setting("", "Hub id or folder")
    revision: str | None = setting(None, "revision on the Hub")
    shots: int = setting(10, "clean examples per class, for the estimate")

    def run(self) -> Inspection:
        """Ask for the listing, small files and headers, and build the model without data.

        Returns:
            What was found. Whatever would be refused is told, not raised.

        Raises:
            SuspectError: If there is no such model.
            NetworkError: If the Hub refuses or cannot be reached.
        """
        given = locate(self.model, self.revision)
        given = given.fetch(given.plain_files(remote_code=False))
        told = _Told([], [])
        source = told.attempt(base_source, given) if given.is_adapter else given
        config = told.attempt(read_config, source) if source is not None else None
        task = tensors = model = None
        if source is not None and config is not None:
            register_architectures()
            told.attempt(refuse_remote_code, source, config, False)
            task = told.attempt(task_of, config, source.name)
            tensors = told.attempt(_tensors, source)
            if task is not None and tensors is not None and not told.refused:
                model = told.attempt(draw, source, task, config, tensors)
        if given.is_adapter and source is not None:
            told.attempt(check_fit, given, source, model if model is not None else nn.Module())
        stored: Counter[str] = Counter()
        for tensor in (tensors or {}).values():
            stored[tensor.dtype] += tensor.elements
        formats: Counter[str] = Counter()
        for name, size in given.files.items():
            formats[PurePosixPath(name).suffix or PurePosixPath(name).name] += size
        named = (config or {}).get("architectures")
        bound = told.attempt(_bound, source, task) if source is not None and task is not None else None
        return Inspection(
            name=given.name,
            revision=given.revision,
            base={"name": source.name, "revision": source.revision} if given.is_adapter and source else None,
            files=dict(sorted(given.files.items())),
            formats=dict(formats.most_common()),
            size=sum(given.files.values()),
            architecture=str(named[0]) if isinstance(named, list) and named else None,
            task=task.name if task is not None else None,
            stored=dict(stored),
            parameters=sum(p.numel() for p in model.parameters()) if model is not None else None,
            units={placement: _units(model, placement) for placement in PLACEMENTS} if model is not None else {},
            dataset=told.note(_dataset, given),
            refused=told.refused,
            notes=told.notes,
            estimate=told.note(self._estimate, bound, model) if bound is not None and model is not None else None,
        )

    def _estimate(self, task: Task, model: nn.Module) -> Estimate:
        try:
            return estimate(model, task, self.shots)
        except Exception as error:  # an architecture that looks into its data cannot run without any
            raise DataError(f"estimate: expected a forward pass without data, found: {first_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Told:
    """Collects what would be refused, so that one fault does not hide the others."""

    refused: list[str]
    notes: list[str]

    def attempt(self, step: Callable[..., T], *arguments: Any) -> T | None:
        return _collect(self.refused, step, *arguments)

    def note(self, step: Callable[..., T], *arguments: Any) -> T | None:
        return _collect(self.notes, step, *arguments)


def _collect(into: list[str], step: Callable[..., T], *arguments: Any) -> T | None:
    try:
        return step(*arguments)
    except (SuspectError, UnsafeModelError, DataError, ConfigError) as error:
        if str(error) not in into:
            into.append(str(error))
        return None


def _bound(source: Source, task: type[Task]) -> Task:
    return bind(task, task.load_processor(str(source.folder)), {})


def _tensors(source: Source) -> dict[str, Stored]:
    return stored_tensors(source, weight_files(source))


def _dataset(given: Source) -> str:
    if given.folder is None:
        raise DataError(f"card of {given.name}: expected one, found none.")
    return dataset_of_card(given.name, given.folder, given.revision is not None)


def _units(model: nn.Module, placement: str) -> int:
    """Number of masks of one placement."""
    try:
        targets = resolve_targets(model, NFTConfig(placement=placement))
    except SuspectError:
        return 0
    return sum(target.units for target in targets.values())
