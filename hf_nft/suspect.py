"""Load a model that nobody should trust: safetensors only, no remote code, every weight accounted for."""

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_nft import registry
from hf_nft.blueprint import check_counts, draw, refuse_remote_code
from hf_nft.errors import ConfigError, SuspectError, UnsafeModelError
from hf_nft.hub import first_line
from hf_nft.intake import ADAPTER_WEIGHTS, Source, base_of, locate, read_object
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
) -> Suspect:
    """Load a model from a folder or the Hub; an adapter is merged into the base model that it names.

    Args:
        reference: A folder in transformers' layout, or a Hub id, which `@REVISION` may follow.
        revision: Branch, tag or commit on the Hub; default the main branch. It is resolved to a commit and recorded.
        base_revision: Of the base model of an adapter, which comes before the one that the adapter names.
        allow_pickle: Whether weights may come from a pickle file (loaded with restricted unpickling).
        trust_remote_code: Whether code in the repository may run.

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
    config = source.read_json("config.json")
    register_architectures()
    refuse_remote_code(source, config, trust_remote_code)
    task_class = task_of(config, source.name)
    model = _load_weights(source, config, task_class, allow_pickle, trust_remote_code)
    if given.is_adapter:
        given = given.fetch([ADAPTER_WEIGHTS])
        check_fit(given, source, model)
        assert given.folder is not None
        model = fold(model, given.folder, given.name)
    processor = task_class.load_processor(str(source.folder))
    model.eval()
    assert given.folder is not None
    return Suspect(
        model,
        task_class(processor),
        given.name,
        given.revision,
        given.folder,
        _own_record(given.folder),
        source if given.is_adapter else None,
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


def base_source(adapter: Source, revision: str | None = None) -> Source:
    """Find the model that an adapter belongs to; safetensors only for both.

    Args:
        adapter: An adapter, its small files fetched.
        revision: Revision of the base; default the one that the adapter names, else the main branch.

    Returns:
        Its base model at a resolved revision, its small files fetched.

    Raises:
        SuspectError: If there is no such model, or it is an adapter itself.
        UnsafeModelError: If the adapter is a pickle or would import something.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    base, named = base_of(adapter)
    # an adapter from the Hub must not choose a folder on this machine
    found = locate(base, revision or named, on_hub=adapter.revision is not None)
    found = found.fetch(found.plain_files(remote_code=False))
    if found.is_adapter:
        raise SuspectError(f"{adapter.name}: expected a whole model as its base, found the adapter {base}. Merge it.")
    return found


def check_fit(adapter: Source, base: Source, model: nn.Module) -> None:
    """Refuse an adapter that replaces a layer of its base by one of another size, as for other labels.

    Args:
        adapter: An adapter; of its weights nothing is read but the header.
        base: The model it belongs to.
        model: That model; nothing of it is read but shapes.

    Raises:
        SuspectError: If a shape differs, or the header is not true.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, stored in stored_tensors(adapter, [ADAPTER_WEIGHTS]).items():
        own = name.removeprefix("base_model.model.")
        if shapes.get(own, stored.shape) != stored.shape:
            raise SuspectError(
                f"{adapter.name}: expected an adapter for {base.name}, whose {own} is {shapes[own]}, found one that "
                f"replaces it by {stored.shape}, as for other labels. Merge it into its base model elsewhere."
            )


def fold(model: nn.Module, adapter: Path, name: str) -> nn.Module:
    """Put an adapter onto its base and fold it in.

    Args:
        model: The base.
        adapter: Folder of the adapter, its weights in safetensors.
        name: What the user knows it by.

    Returns:
        The base's architecture with other weights.

    Raises:
        SuspectError: If it does not fit.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            # on the meta device until its weights come, so that an absurd rank takes no memory
            wrapped = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True)
            merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # a stranger's settings reach every line of PEFT
        raise SuspectError(
            f"{name}: expected an adapter that fits {type(model).__name__}, found: {first_line(error)}"
        ) from error
    return merged


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


def _whole(record: dict[str, Any]) -> bool:
    """Whether what is read of a record is what it should be; a stranger may have written it."""
    parts = [record.get(part) or {} for part in ("attack", "data", "shots")]
    if "schema_version" not in record or not all(isinstance(part, dict) for part in parts):
        return False
    spared = parts[1].get("holdout") or {"fraction": 0, "seed": 0}
    if not isinstance(spared, dict):
        return False
    share, seed = spared.get("fraction"), spared.get("seed")
    return isinstance(share, int | float) and 0 <= share < 1 and isinstance(seed, int) and seed >= 0
