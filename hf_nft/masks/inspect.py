"""What training did to the masks: histograms, the most suppressed units, the difference between two runs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_nft.adapter.model import mask_layers, masks
from hf_nft.errors import ConfigError

BINS = 10  # histogram cells of equal width over [0, 1]; the last one includes 1


@dataclass(frozen=True)
class LayerRow:
    """Masks of one layer.

    Attributes:
        name: Layer name, relative to the base model.
        side: `gain`, `output` or `input`.
        units: Number of masks.
        mean: Their mean.
        min: The smallest.
        histogram: Counts in `BINS` equal cells over [0, 1]; values outside count in the nearest cell.
        at_floor: Number of masks at or below the floor; None if no floors were given.
    """

    name: str
    side: str
    units: int
    mean: float
    min: float
    histogram: tuple[int, ...]
    at_floor: int | None


def summarize(model: nn.Module, floors: Mapping[str, float] | None = None) -> list[LayerRow]:
    """Describe the masks, layer by layer.

    Args:
        model: A model with an NFT adapter.
        floors: Layer name -> floor, to count the masks that sit on it.

    Returns:
        One row per masked layer, in registration order.

    Raises:
        SuspectError: If the model carries no adapter.
    """
    layers = mask_layers(model)
    rows = []
    for name, parameter in masks(model).items():
        mask = parameter.detach().float().cpu()
        cells = (mask.clamp(0.0, 1.0) * BINS).long().clamp(max=BINS - 1)
        at_floor = None
        if floors is not None and name in floors:
            at_floor = int((mask <= torch.full_like(mask, floors[name])).sum())
        rows.append(
            LayerRow(
                name=name,
                side=layers[name].specs[layers[name].active_adapters[-1]].side,
                units=mask.numel(),
                mean=float(mask.mean()),
                min=float(mask.min()),
                histogram=tuple(torch.bincount(cells, minlength=BINS).tolist()),
                at_floor=at_floor,
            )
        )
    return rows


def most_suppressed(model: nn.Module, k: int = 20) -> list[tuple[str, int, float]]:
    """The units with the smallest masks.

    Args:
        model: A model with an NFT adapter.
        k: How many, >= 1; fewer are returned if there are fewer masks.

    Returns:
        (layer name, unit, mask value), smallest value first, ties in registration order.

    Raises:
        ConfigError: If `k` < 1.
        SuspectError: If the model carries no adapter.
    """
    if k < 1:
        raise ConfigError(f"most_suppressed: k must be >= 1, found {k}.")
    found = masks(model)
    flat = torch.cat([mask.detach().float().cpu().flatten() for mask in found.values()])
    owners = [(name, unit) for name, mask in found.items() for unit in range(mask.numel())]
    order = torch.sort(flat, stable=True).indices[:k].tolist()
    return [(*owners[i], float(flat[i])) for i in order]


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Difference between two sets of masks of the same model.

    Args:
        a: Layer name -> mask.
        b: The same layers, with masks of the same shape.

    Returns:
        Layer name -> a - b in fp32 on the CPU, in the order of `a`.

    Raises:
        ConfigError: If the layers or shapes differ; the message lists all differences.
    """
    problems = [f"'{name}' is in one of them only." for name in sorted(a.keys() ^ b.keys())]
    for name in a.keys() & b.keys():
        if a[name].shape != b[name].shape:
            problems.append(f"'{name}' has shapes {tuple(a[name].shape)} and {tuple(b[name].shape)}.")
    if problems:
        raise ConfigError("difference: expected masks of the same layers. " + " ".join(problems))
    return {name: a[name].detach().float().cpu() - b[name].detach().float().cpu() for name in a}
