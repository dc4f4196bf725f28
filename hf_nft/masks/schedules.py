"""Lower bounds on the masks: schedule of a depth, depth of a layer, and the projection after each step.

Shallow layers extract what every input needs, so their masks may fall only so far; deep masks may reach 0.

Source: the NFT paper's bound mu(l) = alpha * exp(-beta * l); defenses.md 1.4 (alternatives) and 1.10 (depth indices).
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hf_nft.adapter.model import mask_layers
from hf_nft.errors import ConfigError, SuspectError, UnknownNameError

Index = Literal["ordinal", "execution", "block", "relative"]

RELATIVE_TOTAL = 19  # masked layers of the paper's ResNet-18, whose range of depths `relative` reproduces
_NESTED_BLOCKS = ("layers", "blocks")  # a numbered list below a numbered stage, as in ResNet and Swin


def _exponential(depth: float, total: float, alpha: float, beta: float) -> float:
    return alpha * math.exp(-beta * depth)


def _progress(depth: float, total: float) -> float:
    """0 at the first layer, 1 at the last."""
    return (depth - 1.0) / (total - 1.0) if total > 1.0 else 0.0


def _linear(depth: float, total: float, alpha: float, beta: float) -> float:
    return alpha * (1.0 - _progress(depth, total))


def _cosine(depth: float, total: float, alpha: float, beta: float) -> float:
    return alpha / 2.0 * (1.0 + math.cos(math.pi * _progress(depth, total)))


def _constant(depth: float, total: float, alpha: float, beta: float) -> float:
    return alpha


def _none(depth: float, total: float, alpha: float, beta: float) -> float:
    return 0.0


SCHEDULES: dict[str, Callable[[float, float, float, float], float]] = {
    "exponential": _exponential,
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "none": _none,
}


def lower_bound(schedule: str, depth: float, total: float, alpha: float = 0.8, beta: float = 0.5) -> float:
    """Lowest value a mask may take at one depth of the network.

    Args:
        schedule: A name in `SCHEDULES`. `exponential` is alpha * exp(-beta * l); with u = (l - 1) / (L - 1), `linear`
            is alpha * (1 - u) and `cosine` alpha / 2 * (1 + cos(pi * u)); `constant` is alpha; `none` is 0.
        depth: l, 1 for the first masked layer.
        total: L, the depth of the last masked layer.
        alpha: Scale in [0, 1]. Larger keeps early layers closer to their original weights.
        beta: Decay per layer of `exponential`, >= 0. At 0 every layer has the same floor.

    Returns:
        A floor in [0, 1].

    Raises:
        UnknownNameError: If there is no such schedule.
        ConfigError: If a number is out of range; the message lists all of them.

    Source: defenses.md 1.4; the defaults are those of the NFT release.
    """
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)
    problems = []
    if not 0.0 <= alpha <= 1.0:
        problems.append(f"alpha must be in [0, 1], found {alpha}.")
    if not beta >= 0.0:
        problems.append(f"beta must be >= 0, found {beta}.")
    if not 1.0 <= depth <= total:
        problems.append(f"depth must be in [1, total={total}], found {depth}.")
    if problems:
        raise ConfigError("lower_bound: " + " ".join(problems))
    return max(0.0, SCHEDULES[schedule](depth, total, alpha, beta))


def depths(model: nn.Module, index: Index = "ordinal", run: Callable[[], object] | None = None) -> dict[str, float]:
    """Depth of every masked layer.

    Args:
        model: A model with an NFT adapter.
        index: `ordinal` counts layers in registration order from 1 (the release); `execution` in the order in which
            one forward pass reaches them; `block` counts numbered blocks, whose masks share a depth (a mask outside
            them is a block of its own); `relative` stretches `ordinal` to 1..19 whatever the number of layers.
        run: Runs one forward pass of the model; needed by `execution` only. Nothing it returns is used.

    Returns:
        Layer name -> depth, in registration order.

    Raises:
        ConfigError: If `index` is not known, or `execution` comes without `run`.
        SuspectError: If the model has no masks.

    Source: defenses.md 1.10.
    """
    names = list(mask_layers(model))
    if not names:
        raise SuspectError(f"{type(model).__name__} has no masked layers. Make them with get_nft_model(model).")
    if index == "ordinal":
        return {name: float(i) for i, name in enumerate(names, 1)}
    if index == "relative":
        last = max(len(names) - 1, 1)
        return {name: 1.0 + (RELATIVE_TOTAL - 1) * i / last for i, name in enumerate(names)}
    if index == "block":
        blocks: dict[str, float] = {}
        return {name: blocks.setdefault(_block(name), len(blocks) + 1.0) for name in names}
    if index != "execution":
        raise ConfigError(f"depth index must be one of {', '.join(get_args(Index))}, found {index!r}.")
    if run is None:
        raise ConfigError("depth index 'execution' needs run=, a function that runs one forward pass of the model.")
    order = _execution_order(model, names, run)
    return {name: order.index(name) + 1.0 for name in names}


def _block(name: str) -> str:
    """The numbered block a module belongs to: `h.3.mlp.c_proj` -> `h.3`, `stages.0.layers.1.x` -> `stages.0.layers.1`.

    The first number counts; a second one only in a list called `layers` or `blocks`, since T5 numbers the parts of a
    block and nn.Sequential the layers of a branch.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    inner = [i for i in numbers[1:] if parts[i - 1] in _NESTED_BLOCKS]
    ends = numbers[:1] + inner[:1]
    return ".".join(parts[: ends[-1] + 1]) if ends else name


def _execution_order(model: nn.Module, names: list[str], run: Callable[[], object]) -> list[str]:
    """Names in the order of one forward pass; layers that it does not reach come last, in registration order."""
    layers = mask_layers(model)
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    events: list[tuple[str, bool]] = []
    hooks = []
    for name in names:
        # nn.MultiheadAttention reads the weight of its output layer and never calls it: take the parent's turn
        parent = modules[paths[id(layers[name])].rpartition(".")[0]]
        for module, is_direct in ((layers[name], True), (parent, False)):
            event = (name, is_direct)
            hooks.append(module.register_forward_hook(lambda *_, event=event: events.append(event)))
    training = {module: module.training for module in modules.values()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer would call none of its children
    model.eval()  # a pass in training mode would move running statistics and draw dropout
    try:
        with torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()
        for module, was_training in training.items():
            module.training = was_training
    direct = {name for name, is_direct in events if is_direct}
    reached = [name for name, is_direct in events if is_direct or name not in direct]
    return list(dict.fromkeys([*reached, *names]))


def floors(
    model: nn.Module,
    schedule: str = "exponential",
    index: Index = "ordinal",
    alpha: float = 0.8,
    beta: float = 0.5,
    run: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Floor of every masked layer.

    Args:
        model: A model with an NFT adapter.
        schedule: See `lower_bound`.
        index: See `depths`.
        alpha: See `lower_bound`.
        beta: See `lower_bound`.
        run: See `depths`.

    Returns:
        Layer name -> floor in [0, 1], in registration order.

    Raises:
        UnknownNameError: If there is no such schedule.
        ConfigError: If a setting is out of range.
        SuspectError: If the model has no masks.
    """
    found = depths(model, index, run)
    total = max(found.values())
    return {name: lower_bound(schedule, depth, total, alpha, beta) for name, depth in found.items()}


@torch.no_grad()
def project_(
    masks: Mapping[str, Tensor], floors: Mapping[str, float], ceilings: Mapping[str, Tensor] | None = None
) -> None:
    """Clamp masks in place to [floor, ceiling]; to be called after every optimizer step.

    Args:
        masks: Layer name -> mask of shape (units,).
        floors: Layer name -> lowest value.
        ceilings: Layer name -> highest value per unit, shape (units,), below 1 for units pinned lower. Layers left
            out have ceiling 1. Where a ceiling is below the floor, the ceiling wins.

    Raises:
        ConfigError: If a masked layer has no floor.
    """
    missing = masks.keys() - floors.keys()
    if missing:
        raise ConfigError(f"project_: no floor for {', '.join(sorted(missing))}; expected one for every masked layer.")
    for name, mask in masks.items():
        ceiling = None if ceilings is None else ceilings.get(name)
        if ceiling is None:
            mask.clamp_(min=floors[name], max=1.0)
        else:
            mask.clamp_(min=floors[name]).clamp_(max=ceiling)


@torch.no_grad()
def active_bounds(
    masks: Mapping[str, Tensor], floors: Mapping[str, float], ceilings: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Where masks sit at a bound, for zeroing their momentum.

    Args:
        masks: Layer name -> mask of shape (units,), projected.
        floors: Layer name -> lowest value.
        ceilings: Layer name -> highest value per unit; 1 where left out.

    Returns:
        Layer name -> bool tensor of shape (units,), True at a bound.
    """
    at = {}
    for name, mask in masks.items():
        ceiling: Tensor | float = 1.0 if ceilings is None else ceilings.get(name, 1.0)
        low = torch.full_like(mask, floors[name])  # compared in the mask's precision
        at[name] = (mask <= low) | (mask >= ceiling)
    return at
