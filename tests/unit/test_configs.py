"""Settings from strings and files: conversion, and errors that name everything that is wrong at once."""

import dataclasses
import re
from typing import Any, Literal

import pytest

from hf_nft.configs import build, check, pairs, setting
from hf_nft.errors import ConfigError, HFNFTError, UnknownNameError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every kind of field that the package uses."""

    steps: int = setting(1, "an int")
    lr: float = setting(0.1, "a float")
    name: str = setting("a", "a text")
    flag: bool = setting(False, "a switch")
    mode: Literal["fast", "slow"] = setting("fast", "a choice")
    limit: int | None = setting(None, "an int or nothing")
    rates: tuple[float, ...] = setting((0.1,), "several")
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        check(
            self,
            (self.steps >= 0, f"steps: expected >= 0, found {self.steps}"),
            (self.lr > 0, f"lr: expected > 0, found {self.lr}"),
        )


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "-0", 0),
        ("lr", "1e-3", 1e-3),
        ("lr", "3", 3.0),
        ("name", "12", "12"),
        ("name", "none", "none"),  # a text field keeps any text
        ("flag", "true", True),
        ("flag", "False", False),
        ("flag", "1", True),
        ("flag", "0", False),
        ("mode", "slow", "slow"),
        ("limit", "7", 7),
        ("limit", "none", None),
        ("limit", "NULL", None),
        ("rates", "[0.5, 1]", (0.5, 1)),
        ("columns", '{"image": "img"}', {"image": "img"}),
    ],
)
def test_texts_become_the_fields_type(field: str, text: str, value: object) -> None:
    found = getattr(build(Settings, {field: text}), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("steps", "1.5", "int"),
        ("steps", "", "int"),
        ("steps", "none", "int"),
        ("lr", "fast", "float"),
        ("lr", "inf", "float"),
        ("lr", "nan", "float"),
        ("flag", "yes", "bool"),
        ("mode", "medium", "'fast' or 'slow'"),
        ("limit", "x", "int or none"),
        ("rates", "0.5", "tuple[float, ...]"),
        ("rates", "[0.5", "tuple[float, ...]"),
        ("rates", '["a", 1]', "tuple[float, ...]"),
        ("columns", "image", "dict[str, str]"),
    ],
)
def test_texts_that_do_not_fit_are_refused(field: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Settings.{field}: expected {expected}, found {text!r}")):
        build(Settings, {field: text})


def test_values_of_the_right_type_are_taken_as_they_are() -> None:
    values = {"steps": 3, "lr": 0.5, "flag": True, "limit": None, "rates": (0.1, 0.2), "columns": {"a": "b"}}
    assert build(Settings, values) == Settings(**values)
    assert build(Settings, {"anything": [1, {"x": 2}]}).anything == [1, {"x": 2}]
    assert build(Settings, {}) == Settings()


def test_a_file_brings_lists_and_whole_numbers() -> None:
    found = build(Settings, {"rates": [0.5, 1.0], "lr": 2})
    assert found.rates == (0.5, 1.0)
    assert found.lr == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", None), ("steps", 1.5), ("steps", True), ("lr", [0.1]), ("flag", 2), ("rates", 0.5), ("mode", 3)],
)
def test_values_of_the_wrong_type_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Settings\.{field}: expected .*, found "):
        build(Settings, {field: value})


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"Settings: steps: expected >= 0, found -1; lr: expected > 0, found 0.0"):
        build(Settings, {"steps": "-1", "lr": "0"})


def test_all_texts_that_do_not_fit_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Settings, {"steps": "x", "lr": "y", "name": "z"})
    assert "steps" in str(caught.value)
    assert "lr" in str(caught.value)
    assert "name" not in str(caught.value)


def test_an_unknown_key_lists_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"setting of Settings 'step' is not known .* Closest: steps.* Try ls\."):
        build(Settings, {"step": 1}, "Try ls.")
    with pytest.raises(UnknownNameError, match="9 candidates"):
        build(Settings, {"": 1})


def test_pairs() -> None:
    assert pairs(["a=1", "b=x=y", "c=", " d =e"]) == {"a": "1", "b": "x=y", "c": "", "d": "e"}
    assert pairs([]) == {}
    with pytest.raises(ConfigError, match="expected key=value, found 'steps'"):
        pairs(["a=1", "steps"])


def test_errors_have_exit_codes_and_are_builtin_errors_too() -> None:
    from hf_nft import errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, HFNFTError)]
    assert {e.__name__: e.exit_code for e in kinds} == {
        "HFNFTError": 1,
        "ConfigError": 2,
        "UnknownNameError": 2,
        "DataError": 3,
        "SuspectError": 3,
        "UnsafeModelError": 4,
        "DivergedError": 5,
        "OutputError": 6,
        "NetworkError": 7,
        "MismatchError": 8,
    }
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnknownNameError, LookupError)
    assert "none" in str(UnknownNameError("attack", "x", []))
