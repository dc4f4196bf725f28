"""The masked layer: one base layer plus, per adapter, one mask vector and its own BatchNorm statistics.

The base layer is never written to, except by `merge`. Everything else on the layer is the adapter and is saved.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_nft.adapter.rules import (
    NORM_STATISTICS,
    Rule,
    Side,
    expand_groups,
    output_units,
    rule_for,
    run_norm,
    scaled_output,
    scaled_weight,
)
from hf_nft.errors import ConfigError


@dataclass(frozen=True)
class MaskSpec:
    """What one adapter does to one layer.

    Attributes:
        side: Where the mask sits; `statistics` is an unmasked BatchNorm whose running statistics the adapter owns.
        units: Number of masks; 0 for `statistics`.
        mask_bias: Whether the bias is scaled too (`gain` and `output` only).
        init: Start value of the masks.
    """

    side: Side
    units: int
    mask_bias: bool = False
    init: float = 1.0


class NFTLayer(nn.Module, BaseTunerLayer):
    """A frozen base layer whose neurons are scaled by masks.

    Args:
        base_layer: The layer to wrap; it stays frozen and keeps its own statistics.
        adapter_name: Name of the first adapter.
        spec: Where and how its mask acts; None masks the gain or the output channels with ones.

    Raises:
        ConfigError: If the base layer has no masking rule for the side asked for.

    Source: defenses.md 1.3, 1.7, 1.10.
    """

    adapter_layer_names = ("nft_mask",)
    other_param_names = tuple(f"nft_{name}" for name in NORM_STATISTICS)

    def __init__(self, base_layer: nn.Module, adapter_name: str, spec: MaskSpec | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.nft_mask = nn.ParameterDict()
        for name in NORM_STATISTICS:
            setattr(self, f"nft_{name}", BufferDict(persistent=True))
        self.rule: Rule | None = rule_for(base_layer)
        self.specs: dict[str, MaskSpec] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._backup: dict[str, Tensor | None] | None = None
        self.update_layer(adapter_name, spec)
        self.train(base_layer.training)  # a new module starts in training mode, whatever the layer it replaces does

    def __getattr__(self, name: str) -> Any:
        """Fall through to the base layer; running statistics are those of the active adapter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            if name in NORM_STATISTICS and (owner := self._statistics_owner()) is not None:
                return getattr(self, f"nft_{name}")[owner]
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, spec: MaskSpec | None = None) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name: Name of the adapter.
            spec: Where and how its mask acts; None masks the gain or the output channels with ones.

        Raises:
            ConfigError: If the base layer has no masking rule for the side asked for.
        """
        base = self.get_base_layer()
        if spec is None and self.rule is not None:
            spec = MaskSpec(self.rule.side, output_units(base, self.rule))
        if spec is None or (spec.side != "statistics" and self.rule is None):
            raise ConfigError(f"{type(base).__name__} has no masking rule; take it out of target_modules.")
        if spec.side == "input" and (self.rule is None or self.rule.in_axis is None):
            raise ConfigError(f"{type(base).__name__} cannot be masked on its input; only linear layers can.")
        self.specs[adapter_name] = spec
        weight = getattr(base, "weight", None)
        device = weight.device if weight is not None else None
        if spec.side != "statistics":
            # fp32 whatever the base dtype: a step of 1e-3 around 1 is lost in half precision
            self.nft_mask[adapter_name] = nn.Parameter(torch.full((spec.units,), spec.init, device=device))
        if owns_statistics(base):
            for name in NORM_STATISTICS:
                value = getattr(base, name).detach().clone()
                wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
                getattr(self, f"nft_{name}")[adapter_name] = wide
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer.

        Args:
            adapter_name: Name of the adapter.
        """
        self.specs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _acting(self) -> list[str]:
        """Adapters that change the forward pass now; where they are disabled, the base layer is as it was before."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.specs]

    def _statistics_owner(self) -> str | None:
        """The adapter whose running statistics are in use; None for the base layer's own."""
        owners: list[str] = [name for name in self._acting() if name in self._modules["nft_running_mean"]]  # type: ignore[operator]
        return owners[-1] if owners else None

    def reset_running_stats(self) -> None:
        """Reset the running statistics of the active adapter, never those of the base layer."""
        owner = self._statistics_owner()
        for name, value in zip(NORM_STATISTICS, (0, 1, 0), strict=True):
            if owner is not None:
                getattr(self, f"nft_{name}")[owner].fill_(value)

    def _base_tensor(self, name: str) -> Tensor | None:
        """A parameter or buffer of the base layer, None where it has none."""
        value = getattr(self.get_base_layer(), name, None)
        assert value is None or isinstance(value, Tensor)
        return value

    def _folded_weight(self, names: list[str]) -> Tensor:
        weight = self._base_tensor("weight")
        assert weight is not None
        for name in names:
            if name in self.nft_mask:
                assert self.rule is not None
                base, side = self.get_base_layer(), self.specs[name].side
                weight = scaled_weight(base, self.rule, side, weight, self.nft_mask[name])
        return weight

    def _folded_bias(self, names: list[str]) -> Tensor | None:
        bias = self._base_tensor("bias")
        for name in names:
            if bias is not None and name in self.nft_mask and self._masks_bias(name):
                bias = bias.to(torch.promote_types(bias.dtype, torch.float32)) * self.nft_mask[name].view(bias.shape)
        return bias

    def _masks_bias(self, name: str) -> bool:
        return self.specs[name].mask_bias and self.specs[name].side != "input"

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        """The effective weight, in the base dtype; parents such as `nn.MultiheadAttention` read it."""
        weight = self._base_tensor("weight")
        return weight if weight is None else self._folded_weight(self._acting()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The effective bias, in the base dtype."""
        bias = self._base_tensor("bias")
        folded = self._folded_bias(self._acting())
        return None if bias is None or folded is None else folded.to(bias.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer with the active masks.

        Args:
            x: Whatever the base layer takes.
            *args: Passed on to the base layer.
            **kwargs: Passed on to the base layer.

        Returns:
            The masked output, in the dtype the base layer gives.
        """
        names, base = self._acting(), self.get_base_layer()
        if isinstance(base, nn.modules.batchnorm._NormBase) or (self.rule is not None and self.rule.side == "gain"):
            return self._forward_norm(names, x, *args, **kwargs)
        for name in names:
            if self.specs[name].side == "input":
                x = x * expand_groups(self.nft_mask[name], x.shape[-1]).to(x.dtype)
        y: Tensor = base(x, *args, **kwargs)
        bias = self._base_tensor("bias")
        for name in names:
            if self.specs[name].side == "output":
                assert self.rule is not None
                mask, scales_bias = self.nft_mask[name], self.specs[name].mask_bias
                y = scaled_output(self.rule, y, None if scales_bias else bias, mask)
                bias = bias * mask if scales_bias and bias is not None else bias
        return y

    def _forward_norm(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a norm with its effective gain and the statistics of the acting adapter."""
        base = self.get_base_layer()
        state: dict[str, Tensor] = {}
        owner = self._statistics_owner()
        if owner is not None:
            # updated in place by the norm, so they must be the adapter's own tensors and not casts of them
            state = {name: getattr(self, f"nft_{name}")[owner] for name in NORM_STATISTICS}
        elif owns_statistics(base) and base.training and not self.merged:
            # a training-mode pass with the adapter disabled must not move the suspect's statistics either
            state = {name: getattr(base, name).clone() for name in NORM_STATISTICS}
        weight = self._base_tensor("weight")
        if weight is not None and (names or state):
            # statistics are fp32; batch_norm wants gain and bias of the same dtype as they are
            dtype = state["running_mean"].dtype if owner is not None else weight.dtype
            state["weight"] = self._folded_weight(names).to(dtype)
            if (bias := self._folded_bias(names)) is not None:
                state["bias"] = bias.to(dtype)
        result: Tensor = run_norm(base, state, x, *args, **kwargs) if state else base(x, *args, **kwargs)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold masks and statistics into the base layer.

        New tensors replace the old ones, so that weights tied to this layer elsewhere are not altered.

        Args:
            safe_merge: Refuse to fold values that are not finite.
            adapter_names: Adapters to fold; None folds the active ones.

        Raises:
            ConfigError: If `safe_merge` is set and a folded value is not finite; the layer is left unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.specs]
        if not names:
            return
        base = self.get_base_layer()
        folded: dict[str, Tensor | None] = {}
        if getattr(base, "weight", None) is not None:
            folded["weight"], folded["bias"] = self._folded_weight(names), self._folded_bias(names)
        if names[-1] in self.nft_running_mean:
            folded |= {name: getattr(self, f"nft_{name}")[names[-1]].clone() for name in NORM_STATISTICS}
        if safe_merge:
            stored = {name: v.to(getattr(base, name).dtype) for name, v in folded.items() if v is not None}
            if broken := [name for name, value in stored.items() if not value.isfinite().all()]:
                raise ConfigError(
                    f"merge: adapter {', '.join(names)} gives non-finite {', '.join(broken)} in {type(base).__name__}; "
                    "expected finite masks. Retrain with a lower learning rate, or load an earlier adapter."
                )
        if self._backup is None:
            self._backup = {name: getattr(base, name, None) for name in folded}
        for name, value in folded.items():
            self._put(name, value)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the tensors back that were there before merging; a mask of 0 could not be divided out."""
        if self._backup is None:
            return
        for name, value in self._backup.items():
            self._put(name, value)
        self.merged_adapters, self._backup = [], None

    def _put(self, name: str, value: Tensor | None) -> None:
        """Replace one tensor of the base layer, keeping its kind (parameter or buffer) and dtype."""
        base = self.get_base_layer()
        old = getattr(base, name, None)
        if value is None or old is None or value is old:
            return
        value = value.to(old.dtype)
        if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(base, name, value)

    def __repr__(self) -> str:
        return "nft." + super().__repr__()


def owns_statistics(module: nn.Module) -> bool:
    """Whether a layer gathers running statistics in training mode.

    Args:
        module: A base layer.

    Returns:
        True for BatchNorm and InstanceNorm layers that track statistics.
    """
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
