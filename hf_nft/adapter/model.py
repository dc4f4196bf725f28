"""NFT as a PEFT method: `get_peft_model`, `PeftModel.from_pretrained` and the rest work once this is imported."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_MODEL_CONFIG
from torch import nn

from hf_nft.adapter.config import NFTConfig
from hf_nft.adapter.layer import MaskSpec, NFTLayer
from hf_nft.adapter.rules import output_units, rule_for
from hf_nft.adapter.survey import base_model
from hf_nft.adapter.targets import HINT, resolve, statistics_modules
from hf_nft.errors import ConfigError, SuspectError, UnknownNameError


class NFTModel(BaseTuner):
    """Attaches masks to a frozen model.

    Raises:
        ConfigError, UnknownNameError, SuspectError: See `resolve_targets`.
    """

    prefix = "nft_"
    tuner_layer_cls = NFTLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own declaration)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> NFTConfig:
        """Resolve the placement into names, unless a saved adapter brought them along."""
        assert isinstance(peft_config, NFTConfig)
        if peft_config.resolved_modules is None:
            used, targets = resolve(self.model, peft_config)
            peft_config.resolved_placement, peft_config.resolved_modules = used, list(targets)
            peft_config.input_units = {n: target.units for n, target in targets.items() if target.side == "input"}
            peft_config.statistics_modules = statistics_modules(self.model, targets)
            return peft_config
        known = [name for name, _ in self.model.named_modules()]
        for name in (*peft_config.resolved_modules, *peft_config.statistics_modules):
            if name not in known:
                raise UnknownNameError("module", name, known, f"The adapter was made for another model. {HINT}")
        return peft_config

    @property
    def config(self) -> Any:
        """The model's own configuration, or PEFT's stand-in where `get_model_config` finds none that it could read."""
        own = self.model.config
        return own if self.get_model_config(self.model) is not DUMMY_MODEL_CONFIG else DUMMY_MODEL_CONFIG

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Read the model's configuration; `config` may be anything in a model that is not from transformers."""
        config = BaseTuner.get_model_config(model)
        return config if isinstance(config, Mapping) else DUMMY_MODEL_CONFIG

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Leave tied targets to `resolve_targets`, which refuses them; PEFT would only warn."""
        if getattr(peft_config, "modules_to_save", None):
            super()._check_tied_modules(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Match full names only: a resolved name must not catch a longer one that ends in it."""
        assert isinstance(peft_config, NFTConfig)
        if key in (peft_config.resolved_modules or ()) or key in peft_config.statistics_modules:
            return True
        return _ExcludedModule() if peft_config.exclude_modules else False

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Wrap one module, or add the adapter to a module that is wrapped already."""
        assert isinstance(peft_config, NFTConfig)
        spec = self._spec(peft_config, target, current_key)
        if isinstance(target, NFTLayer):
            target.update_layer(adapter_name, spec)
            return
        layer = NFTLayer(target, adapter_name, spec)
        layer.requires_grad_(adapter_name in self.active_adapters)
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _spec(config: NFTConfig, target: nn.Module, key: str) -> MaskSpec | None:
        """What the adapter does to one module."""
        if key in config.statistics_modules:
            return MaskSpec("statistics", 0)
        if key in config.input_units:
            return MaskSpec("input", config.input_units[key], config.mask_bias, config.init_mask)
        base = target.get_base_layer() if isinstance(target, NFTLayer) else target
        rule = rule_for(base)
        if rule is None:
            return None  # the layer refuses, with the reason
        return MaskSpec(rule.side, output_units(base, rule), config.mask_bias, config.init_mask)


def get_nft_model(model: nn.Module, config: NFTConfig | None = None, adapter_name: str = "default") -> PeftModel:
    """Freeze a model and put masks on its neurons.

    Args:
        model: Any model, from transformers or not. It is changed in place: its layers are wrapped.
        config: Where the masks go; None is `NFTConfig()`. Copied, so it can be used for several models.
        adapter_name: Name of the adapter.

    Returns:
        The wrapped model. Only the masks (see `masks`) are trainable.

    Raises:
        UnknownNameError: If a name in `target_modules` or `exclude_modules` matches no module.
        ConfigError: If a named module cannot be masked, or the model already carries an adapter.
        SuspectError: If the model has nothing to mask.
    """
    if isinstance(model, PeftModel) or mask_layers(model):
        raise ConfigError(
            f"get_nft_model expects a plain model, found {type(model).__name__} that carries an adapter already. "
            "Call merge_and_unload() or unload() first, or model.add_adapter(name, NFTConfig()) for a second set."
        )
    model.requires_grad_(False)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 calls deprecated; nothing the caller could change
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        wrapped = get_peft_model(model, copy.deepcopy(config) if config is not None else NFTConfig(), adapter_name)
    wrapped.training = wrapped.base_model.training = model.training  # PEFT's new modules start in training mode
    return wrapped


def mask_layers(model: nn.Module, adapter: str | None = None) -> dict[str, NFTLayer]:
    """Collect the masked layers.

    Args:
        model: A model with an NFT adapter.
        adapter: Name of the adapter; None is the active one (the last, if several are active).

    Returns:
        Name relative to the base model -> layer, in registration order. Layers whose statistics alone belong to the
        adapter are not among them. Empty if the model carries no adapter.
    """
    layers = {name: module for name, module in base_model(model).named_modules() if isinstance(module, NFTLayer)}
    return {name: layer for name, layer in layers.items() if (adapter or _active(layer)) in layer.nft_mask}


def _active(layer: NFTLayer) -> str:
    """The adapter in use, empty after the last one was deleted."""
    return str(layer.active_adapters[-1]) if layer.active_adapters else ""


def masks(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Collect the masks, which are all there is to train.

    Args:
        model: A model with an NFT adapter.
        adapter: Name of the adapter; None is the active one.

    Returns:
        Name of the masked module -> fp32 parameter of shape (units,), in registration order.

    Raises:
        SuspectError: If the model carries no such adapter.
    """
    layers = mask_layers(model, adapter)
    if not layers:
        raise SuspectError(
            f"{type(base_model(model)).__name__} carries no NFT adapter{f' named {adapter!r}' if adapter else ''}. "
            "Make one with get_nft_model(model)."
        )
    return {name: layer.nft_mask[adapter or _active(layer)] for name, layer in layers.items()}


def register() -> None:
    """Make NFT known to PEFT; a second call does nothing."""
    if "NFT" not in PEFT_TYPE_TO_TUNER_MAPPING:
        config_class: type[PeftConfig] = NFTConfig
        register_peft_method(name="nft", config_cls=config_class, model_cls=NFTModel)


register()
