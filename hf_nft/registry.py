"""Name to plug-in, found by looking in the folder.

A plug-in is one file in `hf_nft/<kind>/` holding one public class (a concrete subclass of the folder's base) whose
`name` equals the file's name. Listing reads file names only; a file is imported when its plug-in is first asked for.
Other packages add plug-ins through the entry-point groups `hf_nft.attacks`, `hf_nft.tasks`, `hf_nft.defenses`,
`hf_nft.models`.
"""

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_nft.errors import UnknownNameError

KINDS = {"attacks": "attack", "tasks": "task", "defenses": "defense", "models": "architecture"}


def names(kind: str) -> list[str]:
    """List the plug-ins of one kind without importing them.

    Args:
        kind: `attacks`, `tasks`, `defenses` or `models`.

    Returns:
        Sorted names: the built-in files, then those of installed entry points, without duplicates.
    """
    folder = Path(__file__).parent / kind
    found = {module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_")}
    found.discard("base")
    return sorted(found | {point.name for point in entry_points(group=f"hf_nft.{kind}")})


def load(kind: str) -> list[ModuleType]:
    """Import all plug-ins of one kind and the private files beside them, for what they register with other libraries.

    Args:
        kind: `attacks`, `tasks`, `defenses` or `models`.

    Returns:
        Their modules.
    """
    own = [f"hf_nft.{kind}.{module.name}" for module in pkgutil.iter_modules([str(Path(__file__).parent / kind)])]
    others = [point.module for point in entry_points(group=f"hf_nft.{kind}")]
    return [importlib.import_module(name) for name in own + others]


def get(kind: str, name: str) -> Any:
    """Return the class of a plug-in.

    Args:
        kind: `attacks`, `tasks`, `defenses` or `models`.
        name: The plug-in's name, which is its file's name.

    Returns:
        The class, not an instance.

    Raises:
        UnknownNameError: If no plug-in of that kind has the name.
    """
    if name not in names(kind):
        raise UnknownNameError(KINDS[kind], name, names(kind), f"List them with: hf-nft ls {kind}")
    for point in entry_points(group=f"hf_nft.{kind}"):
        if point.name == name:
            return point.load()
    module = importlib.import_module(f"hf_nft.{kind}.{name}")
    for _, value in inspect.getmembers(module, inspect.isclass):
        if value.__module__ == module.__name__ and getattr(value, "name", None) == name:
            return value
    raise AssertionError(f"hf_nft/{kind}/{name}.py holds no class whose name is {name!r}")
