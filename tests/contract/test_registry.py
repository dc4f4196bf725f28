"""What every plug-in file must hold, found by looking in the folders."""

import ast
import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest

from hf_nft import registry
from hf_nft.attacks.base import Attack
from hf_nft.defenses.base import Defense
from hf_nft.errors import UnknownNameError
from hf_nft.models.base import Architecture
from hf_nft.tasks.base import Task

BASES = {"attacks": Attack, "tasks": Task, "defenses": Defense, "models": Architecture}
PLUGINS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
EVERY = pytest.mark.parametrize(("kind", "name"), PLUGINS)
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "numpy", "evaluate", "PIL", "matplotlib", "sklearn")


def test_every_file_is_found(root: Path) -> None:
    for kind in registry.KINDS:
        files = {file.stem for file in (root / "hf_nft" / kind).glob("*.py")}
        public = sorted(name for name in files if not name.startswith("_") and name != "base")
        assert registry.names(kind) == public
        assert public
    assert set(registry.KINDS) == set(BASES)


@EVERY
def test_one_file_holds_one_plug_in_of_its_name(kind: str, name: str) -> None:
    module = importlib.import_module(f"hf_nft.{kind}.{name}")
    own = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    found = [value for value in own if issubclass(value, BASES[kind]) and not inspect.isabstract(value)]
    assert [value.name for value in found] == [name]
    assert registry.get(kind, name) is found[0]


@EVERY
def test_plug_ins_are_documented_with_their_source(kind: str, name: str, root: Path) -> None:
    plugin = registry.get(kind, name)
    assert plugin.__doc__ is not None
    assert inspect.getmodule(plugin).__doc__
    assert not plugin.__doc__.startswith(f"{plugin.__name__}(")  # a dataclass without a docstring gets its signature
    if kind in ("attacks", "defenses"):
        assert plugin.source == "control" or plugin.source.startswith("https://")
        assert plugin.source == "control" or "Source:" in plugin.__doc__
    else:
        text = (root / "hf_nft" / kind / f"{name}.py").read_text()
        assert any(word in text for word in ("Source:", "arXiv"))


@EVERY
def test_every_setting_has_help_and_a_default(kind: str, name: str) -> None:
    plugin = registry.get(kind, name)
    if kind == "tasks":
        return
    assert plugin.__dataclass_params__.frozen
    for field in dataclasses.fields(plugin):
        assert field.metadata.get("help"), field.name
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    plugin(**getattr(plugin, "tiny", {}))


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_an_attack_names_a_task_and_its_columns(name: str) -> None:
    attack = registry.get("attacks", name)
    task = registry.get("tasks", attack.modality)
    assert (attack.input_column, attack.target_column) == (task.input_column, task.target_column)


@pytest.mark.parametrize("name", registry.names("models"))
def test_an_architecture_names_a_task(name: str) -> None:
    assert registry.get("models", name).task in registry.names("tasks")


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_presets_begin_with_default_and_can_be_made(name: str) -> None:
    defense = registry.get("defenses", name)
    assert next(iter(defense.presets)) == "default"
    for preset in defense.presets:
        made = defense.from_preset(preset, seed="3")
        assert (made.preset, made.seed) == (preset, 3)
        assert json.loads(json.dumps(made.settings()))["defense"] == name
    with pytest.raises(UnknownNameError, match="Closest: default"):
        defense.from_preset("defaul")


@pytest.mark.parametrize("name", registry.names("tasks"))
def test_task_metrics_have_modules_and_definitions(name: str) -> None:
    from hf_nft.evaluation import metrics
    from hf_nft.evaluation.run import DEFINITIONS

    task = registry.get("tasks", name)
    for metric in task.metrics:
        assert metric.module in metrics.names()
        assert metric.name in DEFINITIONS
        assert metric.split in ("clean", "triggered")
        assert metric.reference in ("target", "attack")
    assert "none" not in task.augmentations[1:]


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"attack 'badnet' is not known .* Closest: badnets") as caught:
        registry.get("attacks", "badnet")
    assert "hf-nft ls attacks" in str(caught.value)
    assert caught.value.known == registry.names("attacks")
    assert caught.value.exit_code == 2
    for kind in registry.KINDS:
        for name in ("base", "_image", "__init__", "", "../attacks/badnets", "os"):
            with pytest.raises(UnknownNameError):
                registry.get(kind, name)


def test_listing_imports_nothing_heavy(child) -> None:
    code = "import sys; from hf_nft import registry; print([registry.names(k) for k in registry.KINDS]);"
    listed, loaded = child(code + "print(sorted(set(sys.modules) & set(HEAVY)))".replace("HEAVY", repr(HEAVY))).split(
        "\n"
    )
    assert ast.literal_eval(listed) == [registry.names(kind) for kind in registry.KINDS]
    assert loaded == "[]"


def test_another_package_can_add_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_nft.attacks]\nforeign_attack = foreign_plugin:Foreign\n")
    (tmp_path / "foreign_plugin.py").write_text("class Foreign:\n    name = 'foreign_attack'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "foreign_attack" in registry.names("attacks")
    assert "foreign_attack" not in registry.names("tasks")
    assert registry.get("attacks", "foreign_attack").__name__ == "Foreign"
