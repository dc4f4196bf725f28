"""A push: a constant added to the inputs, or to what every masked unit passes on, the same for all rows and places.

Its size is its length in units of the root mean square that each layer, or the input, has on clean shots.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import NFTLayer, mask_layers, masks
from hf_nft.adapter.rules import expand_groups
from hf_nft.defenses._harm import ask
from hf_nft.defenses.base import Context, label_loss
from hf_nft.types import Draw, Inputs, take

WHICH = "pushed_to"
"""Key of each row's push among the encoded rows."""
ALONG = 7
"""Windows along each axis of places: each begins half a window after the one before."""


@dataclass(frozen=True)
class Ground:
    """What is pushed, by the names of layers or inputs.

    Attributes:
        kind: `units` or `inputs`.
        shapes: Shape on one row: (units,) or (features,) of a layer.
        scales: Root mean square on clean shots; 1 for a norm, before its gain.
    """

    kind: str
    shapes: dict[str, torch.Size]
    scales: dict[str, torch.Tensor]


class Pushes:
    """A constant for each answer aimed at, added to the inputs or to what every masked unit passes on."""

    def __init__(
        self, model: nn.Module, ground: Ground, aims: torch.Tensor, within: torch.Tensor | None = None
    ) -> None:
        """Begin with none.

        Args:
            model: The suspect with an NFT adapter.
            ground: What is pushed.
            aims: The answers aimed at, int64 (aims,).
            within: 1 where a push may be and 0 elsewhere, float32, as many as aims; default everywhere.
        """
        self.model, self.aims, self.scales = model, aims, ground.scales
        self.within = torch.ones((), device=aims.device) if within is None else within.to(aims.device)
        self.layers = pushable(model)
        self.vectors = {
            name: torch.zeros(len(aims), *shape, device=aims.device, requires_grad=True)
            for name, shape in ground.shapes.items()
        }
        self.gates = {name: torch.zeros_like(layer.nft_mask["default"]) for name, (layer, _) in self.layers.items()}
        self.which = torch.zeros(0, dtype=torch.int64)
        self.strength = 1.0
        self.tracing = False
        self._quiet: dict[str, torch.Tensor] = {}  # what layers pass on without a push

    def _on(self, name: str, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Push what a layer passes on, along the axis of its features."""
        if self.strength == 0:
            self._quiet[name] = x.detach()
            return x
        shape, axis = [1] * x.dim(), self.layers[name][1]
        shape[axis] = -1
        pushed, rows = x, len(x) // len(self.which)  # a row may be several frames or windows
        if name in self.vectors and len(x) == rows * len(self.which):  # else it knows no rows, as a table of positions
            vector = self.vectors[name][self.which] * self.strength
            vector = vector if gain is None else vector * gain.detach()
            pushed = x + vector.to(x.dtype).repeat_interleave(rows, 0).view(len(x), *shape[1:])
        if not self.tracing:
            return pushed
        gate = self.gates[name] - self.gates[name].detach()  # 0, and there for its gradient
        way = (pushed - self._quiet[name]).detach() / self.strength
        return pushed + expand_groups(gate, x.shape[axis]).view(shape).to(x.dtype) * way

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Push while this lasts."""

        def enter(_: nn.Module, args: tuple[Any, ...], inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
            ours = {name: self.vectors[name] for name in inputs if name in self.vectors}
            added = {name: (vector[self.which] * self.strength).to(inputs[name].dtype) for name, vector in ours.items()}
            return args, {**inputs, **{name: inputs[name] + push for name, push in added.items()}}

        def after(name: str, layer: NFTLayer, y: torch.Tensor) -> torch.Tensor:
            gain = layer.weight if side_of(layer) == "gain" else layer.nft_mask["default"]
            assert isinstance(gain, torch.Tensor)
            return self._on(name, y, gain)

        hooks = [self.model.register_forward_pre_hook(enter, with_kwargs=True)]
        for name, (layer, _) in self.layers.items():
            if side_of(layer) == "input":
                hook = layer.register_forward_pre_hook(lambda _, x, name=name: (self._on(name, x[0]),))
            else:
                hook = layer.register_forward_hook(lambda module, _, y, name=name: after(name, module, y))
            hooks.append(hook)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def objective(self, context: Context, network: nn.Module, part: Draw) -> torch.Tensor:
        """Negative log-likelihood of the answers that the rows are pushed to, mean over rows."""
        self.which = part.batch[WHICH]
        draw = Draw(context.task.told(part.batch, self.aims[self.which]))
        if self.tracing:
            strength, self.strength = self.strength, 0.0
            with torch.no_grad():
                context.task.forward(network, draw)
            self.strength = strength
        return label_loss(network, context.task, draw)


class Ascent(torch.optim.Optimizer):
    """Steps of one length along each push's gradient, measured in the layers' scales, within a ball."""

    def __init__(self, pushes: Pushes, radius: float | torch.Tensor) -> None:
        """Prepare.

        Args:
            pushes: What is learnt.
            radius: Largest length of a push, > 0; or of each, float32 (aims,). The length of a step is this times `lr`,
                which the stage sets.
        """
        self.scales = [pushes.scales[name] for name in pushes.vectors]
        self.within, self.radius = pushes.within, torch.as_tensor(radius, device=pushes.aims.device)
        super().__init__(list(pushes.vectors.values()), {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Go down the loss, and back to the ball."""
        group = self.param_groups[0]
        vectors = group["params"]
        gradients = [torch.zeros_like(v) if v.grad is None else v.grad for v in vectors]  # a layer may be passed by
        steepest = [self.within * g * scale.square() for g, scale in zip(gradients, self.scales, strict=True)]
        stride = group["lr"] * self.radius / _length(steepest, self.scales).clamp(min=1e-12)
        for vector, direction in zip(vectors, steepest, strict=True):
            vector -= _rows(stride, vector) * direction
        shorten(vectors, self.scales, self.radius)


@torch.no_grad()
def shorten(vectors: list[torch.Tensor], scales: list[torch.Tensor], longest: torch.Tensor) -> None:
    """Bring pushes back to a length, float32 () or (aims,), in place; shorter ones stay."""
    back = (longest.to(vectors[0].device) / _length(vectors, scales).clamp(min=1e-12)).clamp(max=1.0)
    for vector in vectors:
        vector *= _rows(back, vector)


def _length(vectors: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    """Length of each push in the layers' scales, float32 (aims,)."""
    parts = [(v / scale).square().flatten(1).sum(1) for v, scale in zip(vectors, scales, strict=True)]
    return torch.stack(parts).sum(0).sqrt()


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value for each row of a tensor, to be multiplied with it."""
    return values.view(-1, *[1] * (like.dim() - 1))


def side_of(layer: NFTLayer) -> str:
    """Return where the mask of a layer's adapter sits."""
    return layer.specs["default"].side


def _width(layer: NFTLayer) -> int:
    """Number of coordinates that a layer's masks scale."""
    weight, rule = layer.get_base_layer().weight, layer.rule
    if side_of(layer) != "input" or rule is None or rule.in_axis is None:
        return layer.nft_mask["default"].numel()
    assert isinstance(weight, torch.Tensor)
    return weight.shape[rule.in_axis]


def pushable(model: nn.Module) -> dict[str, tuple[NFTLayer, int]]:
    """Return the masked layers of an adapted model that can be pushed, by name, and the axis of their features."""
    axes = {name: (layer, _axis(layer)) for name, layer in mask_layers(model).items()}
    return {name: (layer, axis) for name, (layer, axis) in axes.items() if axis is not None}


def _axis(layer: NFTLayer) -> int | None:
    """Axis of the features that a layer's masks scale; None for norms that may have them anywhere."""
    base: Any = layer.get_base_layer()
    side = side_of(layer)
    if side == "output" and layer.rule is not None:
        return -1 - layer.rule.spatial
    if side == "input":
        return -1
    if isinstance(base, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return 1
    known = getattr(type(base), "forward", None) in (nn.LayerNorm.forward, nn.RMSNorm.forward)  # heirs use other axes
    return -1 if known and base.weight.dim() == 1 else None


def grounds(context: Context, model: nn.Module, batch_size: int) -> list[Ground]:
    """Return what can be pushed: the units, and the inputs that are floating point numbers.

    Args:
        context: What the defense sees.
        model: The suspect with an NFT adapter, in evaluation mode.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        One or both.
    """
    inputs = context.task.inputs(model, take(context.data, slice(0, 1)))
    floats = {name: x.shape[1:] for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    layers = {name: torch.Size([_width(layer)]) for name, (layer, _) in pushable(model).items()}
    scales = _scales(context, model, [*layers, *floats], batch_size)
    grounds = [("units", layers), ("inputs", floats)]
    return [Ground(kind, shapes, {name: scales[name] for name in shapes}) for kind, shapes in grounds if shapes]


def windows(shape: torch.Size, axes: int) -> torch.Tensor | None:
    """Lay windows over an input, a quarter of each side wide, seven along each, so that a small trigger is in one.

    Args:
        shape: Shape of one row of the input.
        axes: How many of its last axes, behind its channels, are places; 0 if none are.

    Returns:
        1 within and 0 outside, float32 (windows, 1, ..., *sides); None where there are no places, or too few.
    """
    sides = shape[len(shape) - axes :]
    if axes == 0 or len(shape) <= axes or min(sides) < 8:
        return None
    starts = [[round(i / (ALONG - 1) * (side - side // 4)) for i in range(ALONG)] for side in sides]
    spans = [[slice(at, at + side // 4) for at in each] for side, each in zip(sides, starts, strict=True)]
    made = torch.zeros(ALONG**axes, *[1] * (len(shape) - axes), *sides)
    for window, where in zip(made, itertools.product(*spans), strict=True):
        window[..., *where] = 1.0
    return made


def _scales(context: Context, model: nn.Module, names: list[str], batch_size: int) -> dict[str, torch.Tensor]:
    """Root mean square on clean shots of inputs and of what layers' masks scale; 1 for a norm, before its gain."""
    device = context.loop.accelerator.device
    sums = {name: torch.zeros((), device=device) for name in names}

    def gather(name: str, x: torch.Tensor) -> None:
        sums[name] += x.detach().float().square().mean()

    def enter(_: nn.Module, args: tuple[Any, ...], inputs: Inputs) -> None:
        for name in inputs.keys() & sums.keys():
            gather(name, inputs[name])

    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    for name, layer in mask_layers(model).items():
        if name in sums and side_of(layer) == "input":
            hooks.append(layer.register_forward_pre_hook(lambda _, x, name=name: gather(name, x[0])))
        elif name in sums and side_of(layer) == "output":
            hooks.append(layer.register_forward_hook(lambda _, x, y, name=name: gather(name, y)))

    def measured() -> torch.Tensor:
        asked = ask(context, model, batch_size)
        return torch.stack(list(sums.values())).div(len(asked)).sqrt()

    try:
        values = context.loop.once("scales", measured).to(device)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value if value > 0 else torch.ones_like(value) for name, value in zip(sums, values, strict=True)}


def aimed(context: Context, pushes: torch.Tensor, stream: torch.Generator, rows: int) -> Draw:
    """Draw so many shots for each push, with the push's number beside each."""
    device = context.loop.accelerator.device
    which = pushes.repeat_interleave(rows)
    chosen = torch.randint(len(context.shots), (len(which),), generator=stream)
    return Draw({**take(context.data, chosen.to(device)), WHICH: which.to(device)})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take no gradients of masks while this lasts."""
    learnt = list(masks(model).values())
    for mask in learnt:
        mask.requires_grad_(False)
    try:
        yield
    finally:
        for mask in learnt:
            mask.requires_grad_(True)
