"""Remove backdoors from models you did not train, with a few clean examples: Neural Mask Fine-Tuning.

Importing this package makes PEFT know the method `NFT`, as soon as PEFT itself is imported; nothing heavy is loaded
before it is used.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "NFTConfig": "hf_nft.adapter",
    "get_nft_model": "hf_nft.adapter",
    "mask_layers": "hf_nft.adapter",
    "purify": "hf_nft.purification",
    "PurifyResult": "hf_nft.purification",
    "plant": "hf_nft.planting",
    "PlantConfig": "hf_nft.planting",
    "evaluate": "hf_nft.evaluation.run",
    "make_eval_set": "hf_nft.evaluation.run",
    "load_suspect": "hf_nft.suspect",
    "load_data": "hf_nft.data",
    "draw_shots": "hf_nft.workflows",
    "Shots": "hf_nft.shots",
    "NFT": "hf_nft.defenses.nft",
    "PlantJob": "hf_nft.workflows",
    "PurifyJob": "hf_nft.workflows",
    "EvaluateJob": "hf_nft.workflows",
    "VerifyJob": "hf_nft.workflows",
    "InspectJob": "hf_nft.workflows",
    "RunRecord": "hf_nft.reporting.record",
    "push": "hf_nft.reporting.hub",
    "Destination": "hf_nft.reporting.hub",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_nft' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


class _AfterPeft(MetaPathFinder, Loader):
    """Registers the adapter right after `peft` is imported, so that `import hf_nft` need not import it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module("hf_nft.adapter")


if "peft" in sys.modules:
    importlib.import_module("hf_nft.adapter")
else:
    sys.meta_path.insert(0, _AfterPeft())
