"""Pushes: which answer a constant on inputs and units reaches most easily, and through which units it goes.

A backdoor is a way to one answer that is open whatever the example shows. So it can be found without its trigger: add
a constant to what every masked unit passes on, the same for all examples and places, and look for the constant of a
given size that takes all clean shots to an answer. Without a backdoor all answers are about as hard to reach; with one
the attacker's is reached by a push that moves the others nowhere. A small trigger at any place is met by a push on
units. One that covers the input differs from place to place; it is met by a push on the inputs, which is tried where
the first finds nothing.

The push runs through the units that carry the backdoor. What each adds to the answer is its share of the path integral
from no push to the whole one (conductance). The units that add most are cut, as far as the answers to clean shots
allow, and the search for that answer begins anew, since a push looks for another way; until the answer is no easier to
reach than others.

The size of a push is its length in units of the root mean square that each layer, or the input, has on clean shots. No
label of the shots is used.

Source: this package's. That the attacker's answer is near from everywhere is the idea of Wang et al., Neural Cleanse
(IEEE S&P 2019), there for inputs alone; conductance is Dhamdhere et al., arXiv 1805.12233.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_nft.adapter import NFTLayer, mask_layers, masks
from hf_nft.adapter.rules import expand_groups
from hf_nft.defenses._harm import ask, harm_of, hold
from hf_nft.defenses.base import Context, label_loss, set_modes
from hf_nft.loop import Stage
from hf_nft.types import Draw, Inputs, take

RADII = tuple(2 ** (step / 2) for step in range(-2, 13))
"""Sizes of a push that are tried in turn, 0.5 to 64."""
NEAR = 0.5
"""Share of the log-likelihood that an answer has without a push at which it counts as near; harder pushes reach all."""
STEPS, ROWS = 8, 8
"""Steps of each answer at each size, and rows of each of them."""
TOGETHER = 64
"""Answers that are pushed to in one step at most."""
AIMED_STEPS, AIMED_ROWS = 16, 64
"""Steps and rows of a search for one answer alone."""
SCORED = 32
"""Rows that tell how well a push works."""
POINTS = 4
"""Points on the path from no push to the whole one."""
STRIDE = 0.3
"""First step of a search as a share of the push's size; it shrinks to a sixth of that."""
ALIKE = 0.5
"""Share of the largest contribution from which units are cut together."""
APART = 2.0
"""How much farther ahead of the second answer the easiest one must lie than the second does of the median."""
WHICH = "pushed_to"
"""Key of each row's push among the encoded rows."""


@dataclass(frozen=True)
class Ground:
    """What is pushed, by the names of layers or inputs.

    Attributes:
        kind: `units` or `inputs`.
        shapes: Shape on one row: (units,) or (features,) of a layer.
        scales: Root mean square on clean shots; 1 for a BatchNorm, before its gain.
    """

    kind: str
    shapes: dict[str, torch.Size]
    scales: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pushed:
    """What pushes found.

    Attributes:
        kind: What was pushed, `units` or `inputs`.
        scores: Mean log-likelihood of each answer under the push to it, float32 (classes,).
        radius: Size of the pushes.
        cut: Units through which the push to the easiest answer goes, int64, the first to be cut first.
        curve: Harm, and the likelihood that was left to the push, by the number of units cut.
    """

    kind: str
    scores: torch.Tensor
    radius: float
    cut: torch.Tensor
    curve: dict[int, tuple[float, float]]

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the easiest answers, and what each cut did; JSON values."""
        order = self.scores.argsort(descending=True)[:10].tolist()
        return {
            "pushed": self.kind,
            "push_radius": round(self.radius, 3),
            "push_scores": {answer: round(float(self.scores[answer]), 3) for answer in order},
            "push_curve": {size: [round(value, 4) for value in pair] for size, pair in self.curve.items()},
            "cut_by_push": len(self.cut),
        }

    def doubts(self) -> tuple[tuple[str, str], ...]:
        """Return a doubt if no answer is easier to reach than the others."""
        if stands_out(self.scores):
            return ()
        text = f"none of {len(self.scores)} answers is easier to reach by a push than the others are"
        return (("nothing-stands-out", text),)


def stands_out(scores: torch.Tensor) -> bool:
    """Whether one answer is reached far more easily than any other.

    Args:
        scores: Log-likelihoods, float (classes,).

    Returns:
        True if the first is ahead of the second by `APART` times what the second is ahead of the median; never with
        fewer than three answers.
    """
    first, second, *_ = (*scores.sort(descending=True).values.tolist(), float("nan"), float("nan"))
    return first - second > APART * (second - float(scores.median())) and len(scores) > 2


class Pushes:
    """A constant for each answer aimed at, added to the inputs or to what every masked unit passes on."""

    def __init__(self, model: nn.Module, ground: Ground, aims: torch.Tensor) -> None:
        """Begin with none.

        Args:
            model: The suspect with an NFT adapter.
            ground: What is pushed.
            aims: The answers aimed at, int64 (aims,).
        """
        self.model, self.aims, self.scales = model, aims, ground.scales
        self.layers = {name: layer for name, layer in mask_layers(model).items() if _pushable(layer)}
        self.vectors = {
            name: torch.zeros(len(aims), *shape, device=aims.device, requires_grad=True)
            for name, shape in ground.shapes.items()
        }
        self.gates = {name: torch.zeros_like(layer.nft_mask["default"]) for name, layer in self.layers.items()}
        self.which = torch.zeros(0, dtype=torch.int64)
        self.strength = 1.0
        self.tracing = False
        self._quiet: dict[str, torch.Tensor] = {}  # what layers pass on without a push

    def _on(self, name: str, x: torch.Tensor, axis: int, gain: torch.Tensor | None = None) -> torch.Tensor:
        """Push what a layer passes on, along the axis of its features."""
        if self.strength == 0:
            self._quiet[name] = x.detach()
            return x
        shape = [1] * x.dim()
        shape[axis] = -1
        pushed = x
        if name in self.vectors:
            vector = self.vectors[name][self.which] * self.strength
            vector = vector if gain is None else vector * gain.detach()
            rows = len(x) // len(vector)  # a row may be several frames or windows
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
            if _side(layer) == "gain":
                gain = layer.weight
                assert isinstance(gain, torch.Tensor)
                return self._on(name, y, 1, gain)
            assert layer.rule is not None
            return self._on(name, y, y.dim() - 1 - layer.rule.spatial, layer.nft_mask["default"])

        hooks = [self.model.register_forward_pre_hook(enter, with_kwargs=True)]
        for name, layer in self.layers.items():
            if _side(layer) == "input":
                hook = layer.register_forward_pre_hook(lambda _, x, name=name: (self._on(name, x[0], x[0].dim() - 1),))
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

    def __init__(self, pushes: Pushes, radius: float) -> None:
        """Prepare; `lr` is the length of a step, `radius` that of a push."""
        self.scales = [pushes.scales[name] for name in pushes.vectors]
        self.radius = radius
        super().__init__(list(pushes.vectors.values()), {"lr": STRIDE * radius})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Go down the loss, and back to the ball."""
        group = self.param_groups[0]
        vectors, gradients = group["params"], [vector.grad for vector in group["params"]]
        steepest = [g * scale.square() for g, scale in zip(gradients, self.scales, strict=True)]
        length = self._length(steepest).clamp(min=1e-12)
        for vector, direction in zip(vectors, steepest, strict=True):
            vector -= group["lr"] * direction / _rows(length, vector)
        back = (self.radius / self._length(vectors).clamp(min=1e-12)).clamp(max=1.0)
        for vector in vectors:
            vector *= _rows(back, vector)

    def _length(self, vectors: list[torch.Tensor]) -> torch.Tensor:
        parts = [(v / scale).square().flatten(1).sum(1) for v, scale in zip(vectors, self.scales, strict=True)]
        return torch.stack(parts).sum(0).sqrt()


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value for each row of a tensor, to be multiplied with it."""
    return values.view(-1, *[1] * (like.dim() - 1))


def find(context: Context, model: nn.Module, most: float, harm: float, batch_size: int) -> Pushed:
    """Find the answer that a push reaches most easily, and cut the units that it goes through.

    Args:
        context: What the defense sees; its task has classes.
        model: The suspect with an NFT adapter; all masks are at 1, and are again in the end.
        most: Largest share of all units that is cut, in [0, 1).
        harm: How far the answers to clean shots may go from the suspect's, in nats, see `_harm`.
        batch_size: Rows per forward pass, >= 1.

    Returns:
        What was found; nothing is cut where no answer stands out.
    """
    set_modes(model, statistics=False, dropout=False)
    units = sum(mask.numel() for mask in masks(model).values())
    for ground in _grounds(context, model, batch_size):
        found = context.loop.once(f"pushes on {ground.kind}", lambda ground=ground: _easiest(context, model, ground))  # type: ignore[misc]
        scores, radius = found[:-1], float(found[-1])
        if stands_out(scores):
            break
    cut, curve = torch.empty(0, dtype=torch.int64), dict[int, tuple[float, float]]()
    while stands_out(scores) and len(cut) < round(most * units):

        def further(cut: torch.Tensor = cut) -> torch.Tensor:
            return _further(context, model, ground, scores, radius, cut, harm, batch_size)

        score, moved, *more = context.loop.once(f"push past {len(cut)} units", further).tolist()
        curve[len(cut)] = (moved, score)
        if not more or score < scores.sort().values[-2]:
            break
        cut = torch.cat([cut, torch.tensor(more).long()])[: round(most * units)]
    return Pushed(ground.kind, scores, radius, cut, curve)


def _easiest(context: Context, model: nn.Module, ground: Ground) -> torch.Tensor:
    """Push to every answer, harder and harder, until one is near; returns the scores, and last the size."""
    aims = torch.arange(context.task.classes(model), device=context.loop.accelerator.device)
    pushes, scores, radius = Pushes(model, ground, aims), torch.zeros(0), 0.0
    with _frozen(model), pushes.acting():
        near = NEAR * _score(context, model, pushes, "score without a push").median()
        for radius in RADII:
            name = f"push on {ground.kind} of {radius:.3g}"
            _search(context, model, pushes, name, radius, STEPS, ROWS)
            scores = _score(context, model, pushes, f"{name}: score")
            if scores.max() >= near:
                break
    return torch.cat([scores, torch.tensor([radius])])


def _further(
    context: Context,
    model: nn.Module,
    ground: Ground,
    scores: torch.Tensor,
    radius: float,
    cut: torch.Tensor,
    harm: float,
    batch_size: int,
) -> torch.Tensor:
    """Push to the easiest answer past the units cut: its score, the harm done, and the units to cut next, if any."""
    asked, name = ask(context, model, batch_size), f"push past {len(cut)} units"
    pushes = Pushes(model, ground, scores.argmax()[None].to(context.loop.accelerator.device))
    moved = harm_of(context, model, asked, cut)
    with _frozen(model), pushes.acting():
        _search(context, model, pushes, name, radius, AIMED_STEPS, AIMED_ROWS)
        score = float(_score(context, model, pushes, f"{name}: score"))
        added = _contributions(context, model, pushes, f"{name}: path")
    order = added.argsort(descending=True)
    order = order[~torch.isin(order, cut)]
    largest = float(added[order[0]])
    more = order[(added[order] >= ALIKE * largest) & (added[order] > 0)]
    while len(more) and harm_of(context, model, asked, torch.cat([cut, more])) > harm:
        more = more[: len(more) // 2]
    hold(model, cut[:0])
    return torch.cat([torch.tensor([score, moved]), more.float()])


def _search(
    context: Context, model: nn.Module, pushes: Pushes, name: str, radius: float, steps: int, rows: int
) -> None:
    """Learn the pushes of one size, each for so many steps on so many shots."""
    groups = torch.arange(len(pushes.aims)).split(TOGETHER)
    ascent, first, total = Ascent(pushes, radius), STRIDE * radius, steps * len(groups)
    stage = Stage(
        name,
        total,
        lambda step, stream: _aimed(context, groups[step % len(groups)], stream, rows),
        lambda network, part: pushes.objective(context, network, part),
        ascent,
        lambda step: first * (1 - 5 / 6 * step / total),
        passes=2,
    )
    context.loop.run(stage, model, lambda: dict(pushes.vectors))


def _score(context: Context, model: nn.Module, pushes: Pushes, name: str) -> torch.Tensor:
    """Mean log-likelihood of each answer under the push to it, on the same shots for all; float32 (aims,)."""
    stage = Stage(
        name,
        len(pushes.aims),
        lambda step, _: _aimed(context, torch.tensor([step]), torch.Generator().manual_seed(0), SCORED),
        lambda network, part: pushes.objective(context, network, part),
        None,
    )
    return -torch.tensor(context.loop.run(stage, model, dict))


def _contributions(context: Context, model: nn.Module, pushes: Pushes, name: str) -> torch.Tensor:
    """What goes through each unit of the log-likelihood gained from no push to the whole one, float32 (units,).

    It is the negated derivative of the loss by a gate on what the push has changed in the unit, averaged along the way.
    """
    gates = list(pushes.gates.values())
    for gate in gates:
        gate.requires_grad_(True)

    def draw(step: int, stream: torch.Generator) -> Draw:
        pushes.tracing, pushes.strength = True, (step + 0.5) / POINTS
        return _aimed(context, torch.tensor([0]), stream, AIMED_ROWS)

    summing = torch.optim.SGD(gates, lr=1.0)  # each step's gradient is taken off, so they add up
    stage = Stage(
        name,
        POINTS,
        draw,
        lambda network, part: pushes.objective(context, network, part),
        summing,
        lambda step: 1 / POINTS,
        passes=2,
    )
    context.loop.run(stage, model, lambda: dict(pushes.gates))
    pushes.tracing, pushes.strength = False, 1.0
    every = {name: torch.zeros_like(layer.nft_mask["default"]) for name, layer in mask_layers(model).items()}
    return torch.cat([gate.detach().cpu() for gate in (every | pushes.gates).values()])


def _aimed(context: Context, pushes: torch.Tensor, stream: torch.Generator, rows: int) -> Draw:
    """Draw so many shots for each push, with the push's number beside each."""
    device = context.loop.accelerator.device
    which = pushes.repeat_interleave(rows)
    chosen = torch.randint(len(context.shots), (len(which),), generator=stream)
    return Draw({**take(context.data, chosen.to(device)), WHICH: which.to(device)})


def _side(layer: NFTLayer) -> str:
    return layer.specs["default"].side


def _width(layer: NFTLayer) -> int:
    """Number of coordinates that a layer's masks scale."""
    weight, rule = layer.get_base_layer().weight, layer.rule
    if _side(layer) != "input" or rule is None or rule.in_axis is None:
        return layer.nft_mask["default"].numel()
    assert isinstance(weight, torch.Tensor)
    return weight.shape[rule.in_axis]


def _pushable(layer: NFTLayer) -> bool:
    """Whether the axis of a layer's features is known: norms other than BatchNorm may have them anywhere."""
    return _side(layer) in ("input", "output") or isinstance(layer.get_base_layer(), nn.modules.batchnorm._BatchNorm)


def _grounds(context: Context, model: nn.Module, batch_size: int) -> list[Ground]:
    """What can be pushed: the units, and the inputs that are floating point numbers."""
    inputs = context.task.inputs(model, take(context.data, slice(0, 1)))
    floats = {name: x.shape[1:] for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    layers = {name: torch.Size([_width(layer)]) for name, layer in mask_layers(model).items() if _pushable(layer)}
    scales = _scales(context, model, [*layers, *floats], batch_size)
    grounds = [("units", layers), ("inputs", floats)]
    return [Ground(kind, shapes, {name: scales[name] for name in shapes}) for kind, shapes in grounds if shapes]


def _scales(context: Context, model: nn.Module, names: list[str], batch_size: int) -> dict[str, torch.Tensor]:
    """Root mean square on clean shots of inputs and of what layers' masks scale; 1 for a BatchNorm, before its gain."""
    device = context.loop.accelerator.device
    sums = {name: torch.zeros((), device=device) for name in names}

    def gather(name: str, x: torch.Tensor) -> None:
        sums[name] += x.detach().float().square().mean()

    def enter(_: nn.Module, args: tuple[Any, ...], inputs: Inputs) -> None:
        for name in inputs.keys() & sums.keys():
            gather(name, inputs[name])

    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    for name, layer in mask_layers(model).items():
        if name in sums and _side(layer) == "input":
            hooks.append(layer.register_forward_pre_hook(lambda _, x, name=name: gather(name, x[0])))
        elif name in sums and _side(layer) == "output":
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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take no gradients of masks while this lasts."""
    learnt = list(masks(model).values())
    for mask in learnt:
        mask.requires_grad_(False)
    try:
        yield
    finally:
        for mask in learnt:
            mask.requires_grad_(True)
