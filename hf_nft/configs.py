"""Settings: frozen dataclasses whose fields carry help, read from strings and files with all problems in one error."""

import dataclasses
import json
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


def _convert(owner: type, name: str, text: Any, kind: Any) -> Any:
    if not isinstance(text, str):
        return text
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        try:
            if origin is typing.Literal:
                if text in typing.get_args(option):
                    return text
            elif origin is bool:
                return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            elif origin in (int, float, str):
                return origin(text)
            elif origin in (tuple, list, dict):
                return origin(json.loads(text))
        except (ValueError, KeyError, TypeError):
            continue
    expected = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{owner.__name__}.{name}: expected {expected}, found {text!r}")


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
    return cls(**{name: _convert(cls, name, value, hints[name]) for name, value in values.items()})


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
