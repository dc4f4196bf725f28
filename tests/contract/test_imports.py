"""The rooms of the house: imports point one way, and what is general names no modality."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_nft
from hf_nft import registry

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "types"),
    ("configs", "registry", "hub"),
    ("tasks.base",),
    ("hook", "poisoning"),
    ("attacks.base",),
    ("intake",),
    ("weights",),
    ("blueprint", "adapter_intake"),
    ("suspect", "shots", "data"),
    ("adapter",),
    ("masks",),
    ("tasks", "models"),
    ("acceleration", "checkpoint"),
    ("loop",),
    ("defenses", "planting"),
    ("attacks",),
    ("purification",),
    ("evaluation",),
    ("reporting",),
    ("workflows",),
    ("demo",),
    ("app",),
    ("recipes",),
    ("cli",),
)
"""Lowest first. A room imports from itself and from lower layers only; rooms of one layer do not know each other."""
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}

TASKS = registry.names("tasks")
GENERAL = (
    *("adapter", "masks", "checkpoint", "acceleration", "loop", "purification", "defenses", "shots"),
    *("planting", "hook", "poisoning"),
)
MODALITY = re.compile(
    r"\b(image|pixel|picture|prompt|token|video|audio|point cloud|sentence classif)\w*", re.IGNORECASE
)
BATCH_KEYS = {"pixel_values", "pixels", "input_ids", "attention_mask", "prompt_ids", "labels", "logits"}


def files(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Room (as in LAYERS), dotted name below hf_nft, and file, of every module."""
    for folder, prefix in ((root / "hf_nft", ""), (root / "cli", "cli"), (root / "recipes", "recipes")):
        for file in sorted(folder.rglob("*.py")):
            parts = [*([prefix] if prefix else []), *file.relative_to(folder).with_suffix("").parts]
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            yield room(parts), ".".join(parts), file


def room(parts: list[str]) -> str:
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LEVEL else parts[0] if parts else ""


def imported(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted parts below hf_nft of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            assert parts[0] not in ("cli", "recipes"), f"{file}:{node.lineno} imports the bare name {parts[0]}"
            if parts[0] == "hf_nft" and parts[1:] not in ([], ["__version__"]):
                yield node.lineno, parts[1:]


def test_imports_point_one_way(root: Path) -> None:
    problems, seen = [], set()
    for own, module, file in files(root):
        if not module:
            continue  # the public names, which are strings
        assert own in LEVEL, f"{file}: room '{own}' has no place in LAYERS"
        seen.add(own)
        for line, parts in imported(file):
            other = room(parts)
            if other != own and other.split(".")[0] + ".base" != own and LEVEL[other] >= LEVEL[own]:
                problems.append(f"{file.relative_to(root)}:{line} {own} -> {other}")
            if other.split(".")[0] + ".base" == own and other != own:
                problems.append(f"{file.relative_to(root)}:{line} a base imports its plug-ins")
    assert not problems, "\n".join(problems)
    assert seen == set(LEVEL), "a layer without a module"


def test_plug_ins_are_asked_for_by_name(root: Path) -> None:
    """Nobody imports a concrete attack, task, defense or architecture, except the demonstration, which is about one."""
    plugins = {f"{kind}.{name}" for kind in registry.KINDS for name in registry.names(kind)}
    found = {
        f"{module} imports {'.'.join(parts[:2])}"
        for own, module, file in files(root)
        for _, parts in imported(file)
        if ".".join(parts[:2]) in plugins and module not in plugins and own != "demo"
    }
    assert not found


@pytest.mark.parametrize("name", GENERAL)
def test_what_is_general_names_no_modality(name: str, root: Path) -> None:
    problems = []
    for own, _, file in files(root):
        if own != name:
            continue
        text = file.read_text()
        for i, line in enumerate(text.splitlines(), 1):
            words = [m.group() for m in MODALITY.finditer(line)]
            words += [task for task in TASKS if task in line]
            problems += [f"{file.name}:{i} {word}" for word in words]
        for node in ast.walk(ast.parse(text)):
            word = node.value if isinstance(node, ast.Constant) else node.attr if isinstance(node, ast.Attribute) else 0
            if word in BATCH_KEYS and not (word == "labels" and "objective" in text):  # NFT's objective is named so
                problems.append(f"{file.name}:{node.lineno} {word}")
    assert not problems, "\n".join(problems)


def test_modules_stay_short(root: Path) -> None:
    long = {module: n for _, module, file in files(root) if (n := len(file.read_text().splitlines())) > 300}
    assert not long


def test_no_module_is_called_like_a_public_name(root: Path) -> None:
    """Importing such a module would hide the name: `hf_nft.masks` was a function until something imported the room."""
    assert not set(hf_nft.__all__) & {module for _, module, _ in files(root)}


def test_the_library_does_not_print_or_seed(root: Path) -> None:
    problems = []
    for own, _, file in files(root):
        if own in ("cli", "demo"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "np.random.seed", "random.seed", "torch.cuda.manual_seed_all"):
                    problems.append(f"{file.name}:{node.lineno} {called}")
                if called == "torch.manual_seed" and own not in ("models", "loop", "attacks"):  # there inside fork_rng
                    problems.append(f"{file.name}:{node.lineno} {called}")
    assert not problems
