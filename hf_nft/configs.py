"""Settings: frozen dataclasses whose fields carry help, read from strings and files with all problems in one error."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from hf_nft.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def setting(default: Any, help: str) -> Any:
    """Declare a dataclass field with its help text, which `--help`, `hf-nft ls` and the documentation show."""
    return dataclasses.field(default=default, metadata={"help": help})


def check(owner: object, *rules: tuple[bool, str]) -> None:
    """Raise one error that lists every broken rule.

    Args:
        owner: The config whose class is named in the message.
        *rules: Pairs of (holds, message when it does not).

    Raises:
        ConfigError: If any rule does not hold.
    """
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ConfigError(f"{type(owner).__name__}: " + "; ".join(broken))


def _convert(value: Any, kind: Any) -> Any:
    """Return a value, or what its text means, as one type.

    Args:
        value: The value or its text.
        kind: The type, as an annotation spells it.

    Returns:
        The value as that type.

    Raises:
        ValueError, KeyError or TypeError: If it does not fit.
    """
    origin = typing.get_origin(kind) or kind
    if origin is typing.Any:
        return value
    if origin is typing.Literal:
        return {choice: choice for choice in typing.get_args(kind)}[value]
    if origin is bool and isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
    if isinstance(value, str) and origin in (tuple, list, dict):
        value = json.loads(value)
    if origin in (int, float) and isinstance(value, (str, int, origin)) and not isinstance(value, bool):
        number = origin(value)
        if isinstance(number, float) and not math.isfinite(number):  # no record could hold it
            raise ValueError
        return number
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, typing.get_args(kind)[0]) for item in value)
    if not isinstance(value, origin) or (origin is int and isinstance(value, bool)):
        raise TypeError
    return value


def _read(owner: type, name: str, value: Any, kind: Any) -> Any:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if union else (kind,)
    if type(None) in options and isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    for option in options:
        try:
            return _convert(value, option)
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    choices = [repr(c) for o in options if typing.get_origin(o) is typing.Literal for c in typing.get_args(o)]
    plain = [o for o in options if typing.get_origin(o) is not typing.Literal]
    named = ["none" if o is type(None) else str(o) if typing.get_args(o) else o.__name__ for o in plain]
    raise ConfigError(f"{owner.__name__}.{name}: expected {' or '.join(choices + named)}, found {value!r}")


def build(cls: type[T], values: Mapping[str, Any], hint: str = "") -> T:
    """Make a config from named values, converting strings to each field's type.

    Args:
        cls: The dataclass.
        values: Field name to value or to its text.
        hint: Appended to the message when a field is not known.

    Returns:
        The checked config.

    Raises:
        UnknownNameError: If a name is no field of `cls`.
        ConfigError: If a value has the wrong type or breaks a rule of the config.
    """
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UnknownNameError(f"setting of {cls.__name__}", name, fields, hint)
    read, problems = {}, []
    for name, value in values.items():
        try:
            read[name] = _read(cls, name, value, hints[name])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return cls(**read)


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Split `key=value` arguments of the command line.

    Args:
        arguments: Texts of the form `key=value`.

    Returns:
        The values by key.

    Raises:
        ConfigError: If a text has no `=`.
    """
    split = [argument.partition("=") for argument in arguments]
    for argument, (_, equals, _) in zip(arguments, split, strict=True):
        if not equals:
            raise ConfigError(f"expected key=value, found {argument!r}")
    return {key.strip(): value for key, _, value in split}
