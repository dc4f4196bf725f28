"""How to load what a run wrote: Python lines for the card."""

from functools import cache
from pathlib import Path
from typing import Any

from hf_nft import registry
from hf_nft.errors import UnknownNameError
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import hub_name

UNKNOWN = "REPOSITORY_OR_FOLDER"


def model_code(record: RunRecord, folder: Path, repository: str | None = None) -> str:
    """Return the lines that load the model in the folder or its `model/`; empty if there is none."""
    place = next((p for p in ("", "model") if (folder / p / "config.json").exists()), None)
    loader = _auto_class(record)
    if place is None or loader is None:
        return ""
    own = _own_module(str(record.suspect.get("architecture")))
    where = f', subfolder="{place}"' if place else ""
    lines = [f"from transformers import {loader}"]
    lines += [f"import {own}  # registers the architecture with transformers", ""] if own else [""]
    return "\n".join([*lines, f'model = {loader}.from_pretrained("{repository or UNKNOWN}"{where})'])


def adapter_code(record: RunRecord, folder: Path, repository: str | None = None) -> str:
    """Return the lines that load the suspect with the adapter that lies in the folder; empty if there is none."""
    place = next((p for p in ("adapter", "") if (folder / p / "adapter_config.json").exists()), None)
    loader = _auto_class(record)
    if place is None or loader is None:
        return ""
    own, base = _own_module(str(record.suspect.get("architecture"))), record.suspect.get("base")
    suspect = _named(record.suspect, "THE_SUSPECT")
    where = f', subfolder="{place}"' if place else ""
    imports = [
        f"from transformers import {loader}",
        "from peft import PeftModel",
        "import hf_nft.adapter  # makes NFT known",
    ]
    imports += [f"import {own}  # registers the architecture with transformers"] if own else []
    load = [f"suspect = {loader}.from_pretrained({suspect})"]
    if isinstance(base, dict):  # then the suspect is an adapter itself
        load = [
            f"base = {loader}.from_pretrained({_named(base, 'THE_BASE_MODEL')})",
            f"suspect = PeftModel.from_pretrained(base, {suspect}).merge_and_unload()",
        ]
    load += [
        f'model = PeftModel.from_pretrained(suspect, "{repository or UNKNOWN}"{where})',
    ]
    return "\n".join([*imports, "", *load])


def _named(model: dict[str, Any], unknown: str) -> str:
    """Return the arguments that name a model at its commit, or what stands for a folder."""
    hub = hub_name(model)
    return f'"{hub}", revision="{model["revision"]}"' if hub else f'"{unknown}"'


def _auto_class(record: RunRecord) -> str | None:
    try:
        found: str = registry.get("tasks", str(record.suspect.get("task"))).auto_class
    except UnknownNameError:
        return None
    return found


@cache
def _own_module(architecture: str) -> str | None:
    """Return the module of this package that registers an architecture; None if transformers has it."""
    for module in registry.load("models"):
        if getattr(getattr(module, architecture, None), "__module__", None) == module.__name__:
            return module.__name__
    return None
