"""How each kind of layer is masked: one table from base type to rule, and the arithmetic of folding.

A mask `m` scales a neuron's response: `gain` multiplies the scale of a normalisation layer, `output` the output
channels of a linear or convolutional layer, `input` the input columns of a linear layer (one mask per hidden unit, or
per attention head, which is a group of equal size). A module gets a rule only if its `weight` is an ordinary floating
point tensor of its own: quantised, parametrised and lazy layers do not, and are reported as skipped.

Source: defenses.md 1.10.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

Side = Literal["gain", "output", "input", "statistics"]

NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_PLAIN_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORM_NAME = re.compile(r"norm", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """How to mask one base layer.

    Attributes:
        side: `gain` for norms, `output` for the others (which may be masked on their `input` where `in_axis` is set).
        out_axis: Axis of the weight that counts output channels (within a group for transposed convolutions).
        in_axis: Axis of the weight that counts input features; None where masks of the input are not defined.
        spatial: Number of dimensions after the channel dimension of the output.
        offset: Norms only: the layer applies `1 + weight`, so the fold is `m * (1 + weight) - 1`.
    """

    side: Side
    out_axis: int = 0
    in_axis: int | None = None
    spatial: int = 0
    offset: bool = False


TABLE: tuple[tuple[type[nn.Module], Rule], ...] = (
    (nn.Linear, Rule("output", out_axis=0, in_axis=1)),
    (Conv1D, Rule("output", out_axis=1, in_axis=0)),  # stores its weight as (in, out)
    (nn.Conv1d, Rule("output", spatial=1)),
    (nn.Conv2d, Rule("output", spatial=2)),
    (nn.Conv3d, Rule("output", spatial=3)),
    (nn.ConvTranspose1d, Rule("output", out_axis=1, spatial=1)),
    (nn.ConvTranspose2d, Rule("output", out_axis=1, spatial=2)),
    (nn.ConvTranspose3d, Rule("output", out_axis=1, spatial=3)),
)


def owns_plain_weight(module: nn.Module) -> bool:
    """Whether `weight` is an ordinary floating point tensor held by the module itself.

    Args:
        module: Any layer.

    Returns:
        False for missing, quantised (integer or wrapped), parametrised and not yet initialised weights.
    """
    weight = (module._parameters | module._buffers).get("weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return False
    return weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rule_for(module: nn.Module) -> Rule | None:
    """Look up how a layer is masked.

    Args:
        module: A base layer, not a wrapper of another adapter.

    Returns:
        Its rule, or None if it cannot be masked.
    """
    if not owns_plain_weight(module):
        return None
    for base_type, rule in TABLE:
        if isinstance(module, base_type):
            return rule
    is_norm = isinstance(module, TORCH_NORMS)
    if not is_norm and not (_NORM_NAME.search(type(module).__name__) and not any(True for _ in module.children())):
        return None
    if is_norm and type(module).__module__.startswith("torch.nn."):
        return Rule("gain")
    return _probe_norm(module)


def _probe_norm(module: nn.Module) -> Rule | None:
    """Find out by experiment whether a norm applies `weight` or `1 + weight`.

    With a gain of zero the output no longer depends on the input: that happens at weight 0 in the first convention
    and at weight -1 in the second. Runs on the CPU with stand-in tensors, so it also works for models on `meta`.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    shape = tensors["weight"].shape
    n, training = shape.numel(), module.training
    state = {name: torch.full(t.shape, 0.5 if "var" in name else 0.0) for name, t in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    layouts = [(2, 3, *shape)] if len(shape) > 1 else [(2, 3, n), (2, n, 3, 3), (2, n, 3), (3, n)]
    module.train(False)
    try:
        for layout in layouts:
            inputs = [torch.randn(layout, generator=generator) for _ in range(2)]
            for gain_zero, rule in ((0.0, Rule("gain")), (-1.0, Rule("gain", offset=True))):
                state["weight"] = torch.full(shape, gain_zero)
                try:
                    with torch.no_grad():
                        first, second = (functional_call(module, state, (x,)) for x in inputs)
                        state["weight"] = torch.full(shape, gain_zero + 1.0)
                        alive = functional_call(module, state, (inputs[0],))
                except (RuntimeError, TypeError, ValueError, IndexError):
                    break  # this layout is not the one the norm takes
                if torch.equal(first, second) and alive.shape == inputs[0].shape and not torch.equal(alive, first):
                    return rule
    finally:
        module.train(training)
    return None


def output_units(module: nn.Module, rule: Rule) -> int:
    """Number of masks on a layer's gain or output.

    Args:
        module: A base layer.
        rule: Its rule.

    Returns:
        Entries of the gain for norms, output channels otherwise.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if rule.side == "gain":
        return weight.numel()
    return int(module.out_channels) if _is_transposed(module) else weight.shape[rule.out_axis]  # type: ignore[arg-type]


def scaled_weight(module: nn.Module, rule: Rule, side: Side, weight: Tensor, mask: Tensor) -> Tensor:
    """Fold a mask into a weight.

    Args:
        module: The base layer; only its group count is read.
        rule: The layer's rule.
        side: Where the mask sits.
        weight: The layer's weight, any floating dtype.
        mask: fp32 of shape (units,).

    Returns:
        A new tensor of the weight's shape, in fp32 or wider, bitwise equal to the weight where the mask is 1.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if side == "gain":
        gain = mask.view(weight.shape)
        # weight * m + (m - 1) is m * (1 + weight) - 1, written so that m = 1 returns the weight unchanged
        return weight * gain + (gain - 1.0) if rule.offset else weight * gain
    if side == "input":
        assert rule.in_axis is not None
        mask = expand_groups(mask, weight.shape[rule.in_axis])
        return weight * _along(mask, rule.in_axis, weight.dim())
    if _is_transposed(module):
        groups = int(module.groups)  # type: ignore[arg-type]
        grouped = weight.view(groups, -1, *weight.shape[1:])  # (groups, in / groups, out / groups, *kernel)
        scale = mask.view(groups, 1, -1, *[1] * rule.spatial)
        return (grouped * scale).flatten(0, 1)
    return weight * _along(mask, rule.out_axis, weight.dim())


def scaled_output(rule: Rule, output: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Apply a mask to a layer's output without touching its weight, so that no weight gradient is needed.

    `y * m + b * (1 - m)` equals `m * (response without bias) + bias`, and is bitwise `y` where the mask is 1.

    Args:
        rule: The layer's rule.
        output: `(..., channels, *spatial)` with `rule.spatial` trailing dimensions.
        bias: The bias to keep unmasked, shape (channels,), or None.
        mask: fp32 of shape (channels,).

    Returns:
        A tensor like `output`.
    """
    tail = (-1, *[1] * rule.spatial)
    scaled = output * mask.view(tail).to(output.dtype)
    if bias is None:
        return scaled
    return scaled + (bias * (1.0 - mask)).view(tail).to(output.dtype)


def expand_groups(mask: Tensor, size: int) -> Tensor:
    """Repeat each mask over the neighbouring coordinates of its group.

    Args:
        mask: Shape (units,).
        size: Number of coordinates, a multiple of the units.

    Returns:
        Shape (size,).
    """
    return mask if mask.numel() == size else mask.repeat_interleave(size // mask.numel())


def run_norm(module: nn.Module, state: dict[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run a norm with other tensors in place of its own.

    Args:
        module: The norm.
        state: Tensors by name; running statistics are updated in place where the norm updates its own.
        x: The norm's input.
        *args: Passed on to the norm.
        **kwargs: Passed on to the norm.

    Returns:
        The norm's output.
    """
    if isinstance(module, nn.GroupNorm) and not x.requires_grad:
        x = x.contiguous()  # channels last, torch 2.13 crashes in the gain's gradient on a CPU where x needs none
    if type(module) not in _PLAIN_BATCH_NORMS or len(state) != 5 or args or kwargs:
        result: Tensor = functional_call(module, state, (x, *args), kwargs)
        return result
    # torch's own BatchNorms are most of the masked layers there are, and swapping tensors costs them half their time
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    module._check_input_dim(x)
    momentum = module.momentum
    if module.training:
        state["num_batches_tracked"].add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(state["num_batches_tracked"])
    mean, var, weight, bias = (state[name] for name in ("running_mean", "running_var", "weight", "bias"))
    return nn.functional.batch_norm(x, mean, var, weight, bias, module.training, momentum or 0.0, module.eps)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvTransposeNd)


def _along(mask: Tensor, axis: int, dims: int) -> Tensor:
    return mask.view([-1 if i == axis else 1 for i in range(dims)])
