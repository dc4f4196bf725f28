"""Load a model that nobody should trust: safetensors only, no remote code, every weight accounted for."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_nft import registry
from hf_nft.adapter_intake import base_source, check_fit, fold
from hf_nft.blueprint import check_counts, draw, read_config, refuse_remote_code
from hf_nft.configs import build
from hf_nft.errors import ConfigError, SuspectError, UnsafeModelError
from hf_nft.hub import first_line
from hf_nft.intake import ADAPTER_WEIGHTS, Source, locate, read_object
from hf_nft.tasks.base import Task
from hf_nft.weights import stored_tensors, weight_files


@dataclass(frozen=True)
class Suspect:
    """A loaded model with its task and where it came from.

    Attributes:
        model: The model in evaluation mode, on the CPU.
        task: Its task, bound to its processor.
        name: Hub id, or the folder as the user wrote it.
        revision: Commit on the Hub; None for a folder.
        folder: Where its files lie.
        record: Its `record.json`, if it is one of ours: the settings of a planted attack, the rows held out.
        base: If it came as an adapter, the model that this was merged into.
    """

    model: nn.Module = field(repr=False)
    task: Task
    name: str
    revision: str | None
    folder: Path
    record: dict[str, Any] | None
    base: Source | None = None

    @property
    def is_hub_id(self) -> bool:
        """Whether the name is a Hub id."""
        return self.revision is not None

    @property
    def labels(self) -> int:
        """Number of classes; 0 for tasks without."""
        return self.task.classes(self.model)

    def provenance(self) -> dict[str, Any]:
        """Return what a record says about the model."""
        base = {} if self.base is None else {"base": {"name": self.base.name, "revision": self.base.revision}}
        return {
            "name": self.name,
            "revision": self.revision,
            **base,
            "architecture": type(self.model).__name__,
            "task": self.task.name,
            "task_settings": self.task.settings(),
            "pipeline_tag": self.task.pipeline_tag,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def load_suspect(
    reference: str,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    task_args: Mapping[str, Any] | None = None,
) -> Suspect:
    """Load a model from a folder or the Hub; an adapter is merged into the base model that it names.

    Args:
        reference: A folder in transformers' layout, or a Hub id, which `@REVISION` may follow.
        revision: Branch, tag or commit on the Hub; default the main branch. It is resolved to a commit and recorded.
        base_revision: Of the base model of an adapter, which comes before the one that the adapter names.
        allow_pickle: Whether weights may come from a pickle file (loaded with restricted unpickling).
        trust_remote_code: Whether code in the repository may run.
        task_args: Settings of the task; the others are those that the record beside a local model names.

    Returns:
        The suspect.

    Raises:
        SuspectError: If it does not exist, is no model, or a weight is missing, of another shape, or corrupt.
        UnsafeModelError: If it would need a pickle file or remote code and that was not allowed.
        NetworkError: If the Hub refuses, cannot be reached, or sends other bytes than it lists.
    """
    given = locate(reference, revision)
    given = given.fetch(given.plain_files(trust_remote_code))
    if given.is_adapter and allow_pickle:
        raise ConfigError("--allow-pickle: expected a whole model beside it, found an adapter. Leave it out.")
    source = base_source(given, base_revision) if given.is_adapter else given
    config = read_config(source)
    register_architectures()
    refuse_remote_code(source, config, trust_remote_code)
    task_class = task_of(config, source.name)
    model = _load_weights(source, config, task_class, allow_pickle, trust_remote_code)
    if given.is_adapter:
        given = given.fetch([ADAPTER_WEIGHTS])
        check_fit(given, source, model)
        assert given.folder is not None
        model = fold(model, given.folder, given.name)
    check_finite(model, given.name)
    processor = task_class.load_processor(str(source.folder))
    model.eval()
    assert given.folder is not None
    record = _own_record(given.folder)
    # a stranger must not choose how long texts may be, nor what is put between question and answer
    recorded = ((record or {}).get("suspect") or {}).get("task_settings") or {} if given.revision is None else {}
    return Suspect(
        model,
        bind(task_class, processor, {**recorded, **(task_args or {})}),
        given.name,
        given.revision,
        given.folder,
        record,
        source if given.is_adapter else None,
    )


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that are no numbers: a model that answers NaN is taken for one that always says class 0.

    Args:
        model: The model.
        name: What the user called it.

    Raises:
        SuspectError: If a parameter is not finite.
    """
    for weight, value in model.named_parameters():
        if not value.isfinite().all():
            raise SuspectError(
                f"{name}: expected finite weights, found others in {weight}. Ask its author for whole ones."
            )


def register_architectures() -> None:
    """Make transformers know our own architectures."""
    registry.load("models")


def task_of(config: dict[str, Any], reference: str) -> type[Task]:
    """Find the task that a model's architecture belongs to.

    Args:
        config: The model's config.json.
        reference: What the user called the model.

    Returns:
        The task's class.

    Raises:
        SuspectError: If no task of this package knows the architecture.
    """
    architectures = [str(a) for a in config.get("architectures") or []]
    tasks = [registry.get("tasks", name) for name in registry.names("tasks")]
    for task in tasks:
        if any(name.endswith(task.architectures) for name in architectures):
            found: type[Task] = task
            return found
    known = ", ".join(f"*{end}" for task in tasks for end in task.architectures)
    raise SuspectError(
        f"{reference}: expected an architecture named {known}, found {architectures or 'none in config.json'}. "
        f"List the tasks with: hf-nft ls tasks"
    )


def bind(task: type[Task], processor: Any, settings: Mapping[str, Any]) -> Task:
    """Bind a task to the processor of a model.

    Args:
        task: The task's class.
        processor: Image processor, tokenizer ...
        settings: The task's settings, or their texts.

    Returns:
        The task.

    Raises:
        UnknownNameError: If the task has no such setting.
        ConfigError: If a value does not fit.
    """
    return build(task, {**settings, "processor": processor}, f"List them with: hf-nft ls tasks {task.name}")


def _load_weights(
    source: Source, config: dict[str, Any], task: type[Task], allow_pickle: bool, trust_remote_code: bool
) -> nn.Module:
    names = weight_files(source, allow_pickle)
    if names[0].endswith(".safetensors"):
        source = source.fetch(names)
        tensors = stored_tensors(source, names)
        if not (trust_remote_code and config.get("auto_map")):  # code that is trusted says itself how large it is
            draw(source, task, config, tensors)
    else:
        check_counts(source.name, config)
        source = source.fetch(names)
    import transformers

    loader = getattr(transformers, task.auto_class)
    try:
        model, report = loader.from_pretrained(
            str(source.folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with names and shapes
            use_safetensors=None if allow_pickle else True,  # or a pickle would be loaded beside a decoy
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except pickle.UnpicklingError as error:
        raise UnsafeModelError(
            f"{source.name}: expected a pickle file that holds tensors only, found one that would run code when "
            f"loaded. Do not load it."
        ) from error
    except Exception as error:  # a stranger's files reach every line of a model's code
        raise SuspectError(
            f"{source.name}: expected a model that {task.auto_class} loads, found: {first_line(error, 200)}"
        ) from error
    problems = [
        f"{kind}: {sorted(map(str, report[kind]))[:3]}" for kind in ("missing_keys", "mismatched_keys") if report[kind]
    ]
    if problems:
        raise SuspectError(
            f"{source.name}: expected every weight of {type(model).__name__} in the files, found "
            f"{'; '.join(problems)}. A half-initialised model cannot be judged."
        )
    loaded: nn.Module = model
    return loaded


def _own_record(folder: Path) -> dict[str, Any] | None:
    """The record of a model that this package wrote: beside the weights (victim) or one folder up (purified)."""
    for file in (folder / "record.json", folder.parent / "record.json"):
        try:
            record = read_object(file)
        except SuspectError:
            continue
        if _whole(record) and (file.parent == folder or folder.name == "model"):
            return record
    return None


def are_rows(value: Any) -> bool:
    """Whether a value that was read is a list of row numbers."""
    return isinstance(value, list) and all(isinstance(row, int) and 0 <= row < 2**63 for row in value)


def _whole(record: dict[str, Any]) -> bool:
    """Whether what is read of a record is what it should be; a stranger may have written it."""
    parts = {part: record.get(part) or {} for part in ("attack", "data", "shots", "suspect")}
    if "schema_version" not in record or not all(isinstance(part, dict) for part in parts.values()):
        return False
    spared = parts["data"].get("holdout") or {"fraction": 0, "seed": 0}
    if not isinstance(spared, dict) or not isinstance(parts["suspect"].get("task_settings") or {}, dict):
        return False
    share, seed = spared.get("fraction"), spared.get("seed")
    if not are_rows(parts["shots"].get("indices") or []):
        return False
    return isinstance(share, int | float) and 0 <= share < 1 and isinstance(seed, int) and seed >= 0
