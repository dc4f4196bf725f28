"""A model as its config describes it, built without memory for any weight, and never larger than its files can fill.

A hostile config can ask for a billion layers. Numbers that become loops or lists are bounded before transformers sees
them; while the model is built on the meta device, its parameters are counted and building stops as soon as there are
more than the files' headers can explain; at last its size is held against theirs.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from hf_nft.errors import SuspectError
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


def check_counts(name: str, config: dict[str, Any]) -> None:
    """Refuse absurd numbers before anything is built.

    Args:
        name: What the user called the model.
        config: Its config.json.

    Raises:
        SuspectError: If a number that is looped over exceeds `LARGEST_COUNT`.
    """
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
