"""Recipes: readable YAML files, `<modality>/<dataset>-<attack>-<model>/recipe.yaml`, run from top to bottom.

A recipe names a data set, an output folder, and the settings of the jobs `plant` and `purify`; every key is a field of
the job or of its config. `hf-nft run` takes overrides by dotted path: `plant.config.epochs=2`.
"""

if __name__ != "hf_nft.recipes":
    raise ImportError(
        "import hf_nft.recipes; the folder `recipes` is mapped into the package and has no name of its own"
    )

from pathlib import Path
from typing import Any

import yaml

from hf_nft.errors import ConfigError, UnknownNameError

FOLDER = Path(__file__).parent
SETTINGS = ("arch_args", "attack_args", "columns", "config", "settings", "task_args")
"""Keys of a job that hold settings themselves; an override may add one that the recipe leaves out."""


def names() -> list[str]:
    """List the built-in recipes, such as `image/cifar10-badnets-preact_resnet18`."""
    return sorted(file.parent.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("recipe.yaml"))


def path_of(name: str) -> Path:
    """Find the file of a built-in recipe, or a recipe file or folder of the user's own.

    Args:
        name: Name of a built-in recipe, or a path.

    Returns:
        The file.

    Raises:
        UnknownNameError: If there is neither.
    """
    own = Path(name)
    if own.is_file():
        return own
    if (own / "recipe.yaml").is_file():
        return own / "recipe.yaml"
    if name not in names():
        raise UnknownNameError("recipe", name, names(), "List them with: hf-nft ls recipes")
    return FOLDER / name / "recipe.yaml"


def load(name: str, overrides: dict[str, str] | None = None) -> dict[str, Any]:
    """Read a recipe and apply overrides.

    Args:
        name: Name of a built-in recipe, or a path.
        overrides: Dotted path to value, such as `{"plant.config.epochs": "2"}`.

    Returns:
        The recipe: `dataset`, `out`, `plant`, `purify`.

    Raises:
        UnknownNameError: If there is no such recipe, or an override names a section the recipe does not have.
        ConfigError: If the file is no recipe, or has no `dataset` or `out`.
    """
    file = path_of(name)
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected YAML, found {str(error).splitlines()[0]}.") from error
    sections = {"description", "dataset", "out", "plant", "purify"}
    if not isinstance(recipe, dict) or set(recipe) - sections or not {"dataset", "out"} <= set(recipe):
        found = sorted(map(str, recipe)) if isinstance(recipe, dict) else type(recipe).__name__
        raise ConfigError(f"{file}: expected the keys {sorted(sections)}, found {found}.")
    for section in {"plant", "purify"} & set(recipe):
        if not isinstance(recipe[section], dict):
            raise ConfigError(f"{file}: expected settings under '{section}', found {recipe[section]!r}.")
    for path, value in (overrides or {}).items():
        *parents, last = path.split(".")
        place = recipe
        for parent in parents:
            if parent in SETTINGS and place is not recipe:
                place.setdefault(parent, {})
            if not isinstance(place.get(parent), dict):
                raise UnknownNameError("recipe section", path, [k for k, v in place.items() if isinstance(v, dict)])
            place = place[parent]
        if place is recipe and last not in sections:
            raise UnknownNameError("recipe key", last, sections)
        place[last] = value
    return recipe


def jobs(recipe: dict[str, Any], progress: bool = False) -> list[Any]:
    """Turn a recipe into jobs, checking every setting before any work starts.

    Args:
        recipe: As `load` returns it.
        progress: Whether jobs show progress bars.

    Returns:
        The jobs in order: a `PlantJob` and a `PurifyJob`, those that the recipe has.

    Raises:
        UnknownNameError: If a setting is not known.
        ConfigError: If a setting is wrong.
    """
    try:
        return _jobs(recipe, progress)
    except TypeError as error:  # YAML brings values of any type
        raise ConfigError(f"recipe: expected settings of the right type, found a wrong one ({error}).") from error


def _jobs(recipe: dict[str, Any], progress: bool) -> list[Any]:
    from hf_nft import registry
    from hf_nft.configs import build
    from hf_nft.planting import PlantConfig
    from hf_nft.workflows import PlantJob, PurifyJob

    out = Path(recipe["out"])
    found: list[Any] = []
    if "plant" in recipe:
        told = {**recipe["plant"], "dataset": recipe["dataset"], "out": str(out / "victim"), "progress": progress}
        told["config"] = build(PlantConfig, told.get("config", {}))
        found.append(build(PlantJob, told))
    if "purify" in recipe:
        told = {"model": str(out / "victim"), **recipe["purify"], "dataset": recipe["dataset"], "progress": progress}
        defense = registry.get("defenses", told.pop("defense", "nft"))
        told["defense"] = defense.from_preset(told.pop("preset", "default"), **told.pop("settings", {}))
        if "attack" not in told and "plant" in recipe:
            told["attack"] = recipe["plant"].get("attack")
        found.append(build(PurifyJob, {**told, "out": str(out / "clean")}))
    return found
