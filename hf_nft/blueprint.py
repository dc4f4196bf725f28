"""A model as its config describes it, built without memory for any weight, and never larger than its files can fill.

A hostile config can ask for code, for other weights than those that were checked, or for a billion layers. The first
two are refused. Numbers that become loops or lists are bounded before transformers sees them; while the model is built
on the meta device, its parameters are counted and building stops as soon as there are more than the files' headers can
explain; at last its size is held against theirs.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from hf_nft.errors import SuspectError, UnsafeModelError
from hf_nft.hub import first_line
from hf_nft.intake import Source
from hf_nft.tasks.base import Task
from hf_nft.weights import Stored

LOOPED = re.compile(r"layer|depth|block|stage|label|expert|head", re.IGNORECASE)
"""Settings that transformers makes loops and lists of."""
LARGEST_COUNT = 100_000
"""Of anything that is looped over; the largest label sets of the Hub have some 22 000 classes."""
SPARE_PARAMETERS = 1000
"""A model may register so many more parameters than its files name, and ten times as many: fused and tied weights."""
SPARE_ELEMENTS = 10**8
"""Tables that no file holds, such as positions and attention masks, may take so many elements."""
TIMM = "timm_wrapper"
"""Model type under which transformers wraps timm's models."""
TIMM_FILES = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments of timm that lead to weights elsewhere."""


def read_config(source: Source) -> dict[str, Any]:
    """Read config.json; one in timm's own layout is told as the one that transformers makes of it.

    Args:
        source: Where the model is, its small files fetched.

    Returns:
        The config.

    Raises:
        SuspectError: If there is none, or it is no JSON object.
    """
    from transformers.utils.generic import is_timm_config_dict

    config = source.read_json("config.json")
    if "model_type" not in config and is_timm_config_dict(config):
        return {**config, "model_type": TIMM, "architectures": ["TimmWrapperForImageClassification"]}
    return config


def refuse_remote_code(source: Source, config: dict[str, Any], trusted: bool) -> None:
    """Refuse a model that brings its own code, unless the user trusts it; then only code of the same commit.

    Args:
        source: Where the model is.
        config: Its config.json.
        trusted: Whether its code may run.

    Raises:
        UnsafeModelError: If it needs code that was not trusted, or that another repository holds, or names other
            weights than those that are checked.
        SuspectError: If transformers does not know its type and it brings no code.
    """
    from transformers import CONFIG_MAPPING

    _refuse_detours(source, config)
    kind, code = config.get("model_type"), config.get("auto_map")
    if trusted and code:
        other = [str(value) for value in (code.values() if isinstance(code, dict) else [code]) if "--" in str(value)]
        if other:
            raise UnsafeModelError(
                f"{source.name}: expected its own code, pinned to this commit, found {other[0]!r} of another "
                f"repository, which may change any time. Copy that code into a folder of your own."
            )
        return
    if kind in CONFIG_MAPPING:
        return
    if code:
        raise UnsafeModelError(
            f"{source.name}: expected an architecture that transformers knows, found '{kind}', which brings its own "
            f"code. Read that code; then pass --trust-remote-code to run it."
        )
    raise SuspectError(f"{source.name}: expected a model type that transformers knows, found {kind!r} in config.json.")


def _refuse_detours(source: Source, config: dict[str, Any]) -> None:
    """Refuse settings that make transformers load other weights than those that were checked, or fetch code."""
    todo = [config]
    while todo:
        part = todo.pop()
        if part.get("model_type") == TIMM:
            _refuse_addresses(source, part)
        for key, value in part.items():
            if isinstance(value, dict):
                todo.append(value)
            elsewhere = key in ("transformers_weights", "configuration_files") and value is not None
            if elsewhere or (key.endswith("_implementation") and "/" in str(value)):  # kernels are code
                raise UnsafeModelError(
                    f"{source.name}/config.json: expected its own weights and the code of transformers, found "
                    f"{key} = {str(value)[:60]!r}. Do not load it."
                )


def _refuse_addresses(source: Source, config: dict[str, Any]) -> None:
    """Refuse a config of timm that names anything but an architecture: timm takes addresses of models as well."""
    arguments = config.get("model_args") or {}
    chosen = [key for key in arguments if key in TIMM_FILES] if isinstance(arguments, dict) else [arguments]
    if chosen or not str(config.get("architecture")).isidentifier():
        raise UnsafeModelError(
            f"{source.name}/config.json: expected the name of an architecture of timm, found "
            f"{str(chosen[0] if chosen else config.get('architecture'))[:60]!r}. Do not load it."
        )


def check_counts(name: str, config: dict[str, Any]) -> None:
    """Refuse absurd numbers, and labels without one, before anything is built.

    Args:
        name: What the user called the model.
        config: Its config.json.

    Raises:
        SuspectError: If a number that is looped over exceeds `LARGEST_COUNT`, or labels are not numbered from 0.
    """
    labels = config.get("id2label")
    if labels and (not isinstance(labels, dict) or {*labels} != {str(i) for i in range(len(labels))}):
        raise SuspectError(f"{name}: expected id2label in config.json to number the labels from 0, found other keys.")
    todo: list[tuple[str, Any]] = list(config.items())
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo.extend((str(inner), item) for inner, item in value.items())
        elif isinstance(value, list):
            todo.extend((key, item) for item in value)
        elif isinstance(value, int | float) and LOOPED.search(key) and abs(value) > LARGEST_COUNT:
            raise SuspectError(
                f"{name}: expected at most {LARGEST_COUNT} in config.json, found {key} = {value:.6g}. Do not load it."
            )


def draw(source: Source, task: type[Task], config: dict[str, Any], tensors: dict[str, Stored]) -> nn.Module:
    """Build a model on the meta device.

    Args:
        source: The model, its small files fetched.
        task: Its task.
        config: Its config.json.
        tensors: What the headers of its weight files say.

    Returns:
        The model without data.

    Raises:
        SuspectError: If the config is not valid, names another class than the one that is built, or asks for more
            than the files hold.
    """
    import transformers

    check_counts(source.name, config)
    try:
        settings = transformers.AutoConfig.from_pretrained(str(source.folder), local_files_only=True)
        with torch.device("meta"), _bounded(source.name, 10 * len(tensors) + SPARE_PARAMETERS):
            model: nn.Module = getattr(transformers, task.auto_class).from_config(settings)
    except SuspectError:
        raise
    except Exception as error:  # a stranger's numbers reach every line of a model's code
        raise SuspectError(
            f"{source.name}: expected a config that {task.auto_class} can build, found: {first_line(error)}"
        ) from error
    named = [str(name) for name in config.get("architectures") or []]
    built = type(model).__name__
    if built not in named:
        close = difflib.get_close_matches(built, named, n=1, cutoff=0.0)
        raise SuspectError(
            f"{source.name}: expected the class {built} of model type '{config.get('model_type')}' in config.json, "
            f"found {close[0] if close else 'none'!r}. Check the config."
        )
    check_size(source.name, model, config, tensors)
    return model


def check_size(name: str, model: nn.Module, config: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """Refuse a model that is much larger than its files.

    Args:
        name: What the user called the model.
        model: As the config describes it; nothing of it is read but shapes.
        config: Its config.json.
        tensors: What the headers of its weight files say.

    Raises:
        SuspectError: If it has more than twice the elements that the files hold, tables of its own aside.
    """
    stored = sum(tensor.elements for tensor in tensors.values())
    if config.get("quantization_config"):
        stored *= 8  # eight 4-bit codes in one I32
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if wanted > 2 * stored + SPARE_ELEMENTS:
        raise SuspectError(
            f"{name}: expected a config for the {stored:,} numbers in its files, found one for {wanted:,}. "
            f"Do not load it."
        )


@contextmanager
def _bounded(name: str, limit: int) -> Iterator[None]:
    """Stop whoever builds a model with more parameters than the limit."""
    count = 0

    def register(owner: nn.Module, key: str, value: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise SuspectError(
                f"{name}: expected a config for the weights in its files, found one for more than {limit} of them. "
                f"Do not load it."
            )

    handles = [hooks.register_module_parameter_registration_hook(register)]
    handles.append(hooks.register_module_buffer_registration_hook(register))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
