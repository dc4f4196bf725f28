"""One pass over a model: which layers can be masked at all, and why the others cannot."""

from collections import Counter
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_nft.adapter.layer import NFTLayer
from hf_nft.adapter.rules import TORCH_NORMS, Rule, rule_for


@dataclass(frozen=True)
class Survey:
    """All layers of a model, in registration order.

    Attributes:
        rules: Name -> (base layer, rule) of every layer that can be masked.
        skipped: Name -> why not, for the others that hold parameters.
        containers: Names of numbered blocks, such as `layers.0`.
    """

    rules: dict[str, tuple[nn.Module, Rule]]
    skipped: dict[str, str]
    containers: list[str]


def base_model(model: nn.Module) -> nn.Module:
    """Take off PEFT's outer wrapper.

    Args:
        model: A model, wrapped or not.

    Returns:
        The model that module names are relative to.
    """
    if isinstance(model, PeftModel):
        model = model.base_model  # not get_base_model(), which fails once the last adapter is deleted
    if isinstance(model, BaseTuner):
        model = model.model
    assert isinstance(model, nn.Module)
    return model


def survey_model(model: nn.Module) -> Survey:
    """Classify every layer of a model.

    Args:
        model: The model itself, not PEFT's outer wrapper; its layers may be wrapped.

    Returns:
        Its layers, sorted by whether and how they can be masked.
    """
    rules: dict[str, tuple[nn.Module, Rule]] = {}
    skipped: dict[str, str] = {}
    containers: list[str] = []
    copies = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(closed or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            closed += (name + ".",)
            if not isinstance(module, NFTLayer):
                skipped[name] = "belongs to another adapter; merge that first"
                continue
            module = module.get_base_layer()
        elif any(True for _ in module.children()) and not isinstance(module, TORCH_NORMS):
            if name.rpartition(".")[2].isdigit():
                containers.append(name)
            continue
        if isinstance(module, nn.Embedding):
            skipped[name] = "is an embedding"
        elif id(module.__dict__.get("_parameters", {}).get("weight")) in embeddings:
            skipped[name] = "shares its weight with the embeddings; untie them first (tie_word_embeddings=False)"
        elif copies[id(module)] > 1:
            skipped[name] = "is one module registered under several names"
        elif (rule := rule_for(module)) is not None:
            rules[name] = (module, rule)
        elif any(True for _ in module.parameters()) or "qweight" in module._buffers:
            skipped[name] = f"has no masking rule ({type(module).__name__}: quantised, parametrised or unknown layer)"
    return Survey(rules, skipped, containers)
