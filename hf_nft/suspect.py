"""Load a model that nobody should trust: safetensors only, no remote code, every weight accounted for."""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from hf_nft import registry
from hf_nft.errors import HFNFTError, NetworkError, SuspectError, UnsafeModelError
from hf_nft.tasks.base import Task

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
PLAIN_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


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
    """

    model: nn.Module = field(repr=False)
    task: Task
    name: str
    revision: str | None
    folder: Path
    record: dict[str, Any] | None

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
        return {
            "name": self.name,
            "revision": self.revision,
            "architecture": type(self.model).__name__,
            "task": self.task.name,
            "pipeline_tag": self.task.pipeline_tag,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def load_suspect(
    reference: str, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Suspect:
    """Load a model from a folder or the Hub.

    Args:
        reference: A folder in transformers' layout, or a Hub id.
        revision: Branch, tag or commit on the Hub; default the main branch. It is resolved to a commit and recorded.
        allow_pickle: Whether weights may come from a pickle file (loaded with restricted unpickling).
        trust_remote_code: Whether code in the repository may run.

    Returns:
        The suspect.

    Raises:
        SuspectError: If it does not exist, is no model, or a weight is missing, of another shape, or corrupt.
        UnsafeModelError: If it would need a pickle file or remote code and that was not allowed.
        NetworkError: If the Hub cannot be reached.
    """
    folder, commit = _locate(reference, revision, allow_pickle, trust_remote_code)
    config = read_config(folder)
    for name in registry.names("models"):
        registry.get("models", name)  # registers our own architectures with transformers
    _refuse_remote_code(reference, config, trust_remote_code)
    _refuse_pickle(reference, folder, allow_pickle)
    task_class = task_of(config, reference)
    model = _load_weights(folder, task_class, reference, allow_pickle, trust_remote_code)
    processor = task_class.load_processor(str(folder))
    model.eval()
    return Suspect(model, task_class(processor), reference, commit, folder, _own_record(folder))


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


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json.

    Args:
        folder: The model's folder.

    Returns:
        The JSON object.

    Raises:
        SuspectError: If there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise SuspectError(f"{folder}: expected a model folder with config.json, found none.") from error
    except (OSError, ValueError) as error:
        raise SuspectError(f"{folder}/config.json: expected JSON, found {str(error)[:100]}.") from error
    if not isinstance(config, dict):
        raise SuspectError(f"{folder}/config.json: expected an object, found {type(config).__name__}.")
    return config


def _locate(reference: str, revision: str | None, allow_pickle: bool, remote_code: bool) -> tuple[Path, str | None]:
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder, None
    if not HUB_ID.match(reference) or reference.startswith(("runs/", "./", "../")):
        raise SuspectError(
            f"model '{reference}': expected a folder or a Hub id (org/name), found neither. Check the path."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = PLAIN_FILES + (list(PICKLES[:1]) if allow_pickle else []) + (["*.py"] if remote_code else [])
    try:
        local = Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SuspectError(
            f"model '{reference}': expected a folder or a Hub id, found no such folder here and no such repository or "
            f"revision there. Check the name, or log in with `hf auth login` if it is private."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        raise _offline(reference, error) from error
    except Exception as error:
        if type(error).__module__.startswith("httpx"):  # transport errors of the client, no OSError
            raise _offline(reference, error) from error
        raise
    return local, local.name


def _offline(reference: str, error: BaseException) -> HFNFTError:
    return NetworkError(
        f"model '{reference}': expected a folder, or a Hub that can be reached, found neither "
        f"({str(error).splitlines()[0][:120]}). Check the path or the network."
    )


def _refuse_remote_code(reference: str, config: dict[str, Any], trusted: bool) -> None:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind in CONFIG_MAPPING or (trusted and config.get("auto_map")):
        return
    if config.get("auto_map"):
        raise UnsafeModelError(
            f"{reference}: expected an architecture that transformers knows, found '{kind}', which brings its own "
            f"code. Read that code; then pass --trust-remote-code to run it."
        )
    raise SuspectError(f"{reference}: expected a model type that transformers knows, found {kind!r} in config.json.")


def _refuse_pickle(reference: str, folder: Path, allowed: bool) -> None:
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names, not this one
        raise SuspectError(f"{reference}: expected a whole model, found an adapter. Merge it into its base model.")
    weights = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json") if not allowed else ():
        others = {name for name in _files_of(index) if not name.endswith(".safetensors")}
        if others:
            raise UnsafeModelError(
                f"{index}: expected it to name safetensors files, found {sorted(others)[0]}. Download the model again."
            )
    for file in weights:
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise SuspectError(
                f"{file}: expected a safetensors file, found one that does not open ({error}). Download it again."
            ) from error
    if weights:
        return
    pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
    if pickles and not allowed:
        raise UnsafeModelError(
            f"{reference}: expected weights in safetensors, found {pickles[0]}, a pickle file, which can run code when "
            f"it is loaded. Convert it elsewhere, or pass --allow-pickle to load it with restricted unpickling."
        )
    if not pickles:
        raise SuspectError(f"{reference}: expected model weights (*.safetensors), found none in {folder}.")


def _files_of(index: Path) -> list[str]:
    """Weight files that an index names."""
    try:
        return [str(name) for name in json.loads(index.read_text())["weight_map"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuspectError(f"{index}: expected an index of weight files, found {str(error)[:100]}.") from error


def _load_weights(
    folder: Path, task: type[Task], reference: str, allow_pickle: bool, trust_remote_code: bool
) -> nn.Module:
    import transformers

    loader = getattr(transformers, task.auto_class)
    try:
        model, report = loader.from_pretrained(
            str(folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with names and shapes
            use_safetensors=None if allow_pickle else True,  # or a pickle would be loaded beside a decoy
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except pickle.UnpicklingError as error:
        raise UnsafeModelError(
            f"{reference}: expected a pickle file that holds tensors only, found one that would run code when loaded. "
            f"Do not load it."
        ) from error
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SuspectError(f"{reference}: expected a model that {task.auto_class} loads, found: {line}") from error
    problems = [
        f"{kind}: {sorted(map(str, report[kind]))[:3]}" for kind in ("missing_keys", "mismatched_keys") if report[kind]
    ]
    if problems:
        raise SuspectError(
            f"{reference}: expected every weight of {type(model).__name__} in the files, found {'; '.join(problems)}. "
            f"A half-initialised model cannot be judged."
        )
    loaded: nn.Module = model
    return loaded


def _own_record(folder: Path) -> dict[str, Any] | None:
    """The record of a model that this package wrote: beside the weights (victim) or one folder up (purified)."""
    for file in (folder / "record.json", folder.parent / "record.json"):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        ours = isinstance(record, dict) and "schema_version" in record
        whole = ours and all(isinstance(record.get(part) or {}, dict) for part in ("attack", "data", "shots"))
        if whole and (file.parent == folder or folder.name == "model"):
            found: dict[str, Any] = record
            return found
    return None
