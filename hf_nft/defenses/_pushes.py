"""Pushes: which answer a constant on the masked units reaches most easily, and through which units it goes.

A backdoor is a way to one answer that is open whatever the example shows. So it can be found without its trigger: add
to what every unit passes on a constant, the same for every example and place, and look for the constant of a given
size that takes all clean shots to an answer. Without a backdoor all answers are about as hard to reach; with one the
attacker's is reached by a push that moves the others nowhere. The push runs through the units that carry the backdoor.
What each of them adds is its share of the path integral from no push to the whole one (integrated gradients). The units
that add most are cut, as far as the answers to clean shots allow, and the search begins anew, since a push looks for
another way; until that answer is no easier to reach than others.

The size of a push is its length in units of each layer's own root mean square on clean shots. No label of the shots is
used.

Source: this package's. That the attacker's answer is near from everywhere is the idea of Wang et al., Neural Cleanse
(IEEE S&P 2019), there for pixels; integrated gradients are Sundararajan et al., arXiv 1703.01365.
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
from hf_nft.types import Draw, take

RADII = tuple(2 ** (step / 2) for step in range(-2, 13))
"""Sizes of a push that are tried in turn, 0.5 to 64."""
NEAR = 0.25
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
class Pushed:
    """What pushes found.

    Attributes:
        scores: Mean log-likelihood of each answer under the push to it, float32 (classes,).
        radius: Size of the pushes.
        cut: Units through which the push to the easiest answer goes, int64, the first to be cut first.
        curve: Harm, and the likelihood that was left to the push, by the number of units cut.
    """

    scores: torch.Tensor
    radius: float
    cut: torch.Tensor
    curve: dict[int, tuple[float, float]]

    def evidence(self) -> dict[str, Any]:
        """Return what a record says: the easiest answers, and what each cut did; JSON values."""
        order = self.scores.argsort(descending=True)[:10].tolist()
        return {
            "push_radius": round(self.radius, 3),
            "push_scores": {answer: round(float(self.scores[answer]), 3) for answer in order},
            "push_curve": {size: [round(value, 4) for value in pair] for size, pair in self.curve.items()},
            "cut_by_push": len(self.cut),
        }

    def doubts(self) -> tuple[tuple[str, str], ...]:
        """Return a doubt if no answer is easier to reach than the others."""
        if stands_out(self.scores):
            return ()
        text = f"none of {len(self.scores)} answers is easier to reach by a push on the units than the others are"
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
    """A constant for each answer aimed at, added to what every masked unit passes on."""

    def __init__(self, model: nn.Module, aims: torch.Tensor, scales: dict[str, torch.Tensor]) -> None:
        """Begin with none.

        Args:
            model: The suspect with an NFT adapter.
            aims: The answers aimed at, int64 (aims,).
            scales: Root mean square of what each layer's masks scale, by its name; layers without are not pushed.
        """
        self.aims, self.scales = aims, scales
        self.layers = {name: layer for name, layer in mask_layers(model).items() if name in scales}
        shape = {name: (len(aims), _width(layer)) for name, layer in self.layers.items()}
        self.vectors = {n: torch.zeros(size, device=aims.device, requires_grad=True) for n, size in shape.items()}
        self.gates = {n: torch.zeros_like(layer.nft_mask["default"]) for n, layer in self.layers.items()}
        self.strength = 1.0
        self.which = torch.zeros(0, dtype=torch.int64)

    def _added(self, name: str, like: torch.Tensor, axis: int) -> torch.Tensor:
        """The push on one layer, shaped like what it is added to; gates are 0 and there for their gradient."""
        gate = self.gates[name] - self.gates[name].detach() + self.strength
        vector = self.vectors[name][self.which]
        vector = (vector * expand_groups(gate, vector.shape[1])).to(like.dtype)
        vector = vector.repeat_interleave(len(like) // len(vector), 0)  # a row may be several frames or windows
        shape = [1] * like.dim()
        shape[0], shape[axis] = vector.shape
        return vector.view(shape)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Push while this lasts."""

        def before(name: str, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x + self._added(name, x, -1),)

        def after(name: str, layer: NFTLayer, y: torch.Tensor) -> torch.Tensor:
            axis = 1 if _side(layer) == "gain" else y.dim() - 1 - layer.rule.spatial  # type: ignore[union-attr]
            shape = [1] * y.dim()
            shape[axis] = -1
            gain = layer.weight if _side(layer) == "gain" else layer.nft_mask["default"]
            assert isinstance(gain, torch.Tensor)
            return y + self._added(name, y, axis) * gain.detach().view(shape).to(y.dtype)

        hooks = [
            layer.register_forward_pre_hook(lambda _, x, name=name: before(name, x[0]))
            if _side(layer) == "input"
            else layer.register_forward_hook(lambda m, _, y, name=name: after(name, m, y))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def objective(self, context: Context, network: nn.Module, part: Draw) -> torch.Tensor:
        """Negative log-likelihood of the answers that the rows are pushed to, mean over rows."""
        self.which = part.batch[WHICH]
        return label_loss(network, context.task, Draw(context.task.told(part.batch, self.aims[self.which])))


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
            vector -= group["lr"] * direction / length[:, None]
        back = (self.radius / self._length(vectors).clamp(min=1e-12)).clamp(max=1.0)
        for vector in vectors:
            vector *= back[:, None]

    def _length(self, vectors: list[torch.Tensor]) -> torch.Tensor:
        parts = [(v / scale).square().sum(1) for v, scale in zip(vectors, self.scales, strict=True)]
        return torch.stack(parts).sum(0).sqrt()


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
    scales = _scales(context, model, batch_size)
    units = sum(mask.numel() for mask in masks(model).values())
    found = context.loop.once("pushes", lambda: _easiest(context, model, scales))
    scores, radius = found[:-1], float(found[-1])
    cut, curve = torch.empty(0, dtype=torch.int64), dict[int, tuple[float, float]]()
    if not stands_out(scores):
        return Pushed(scores, radius, cut, curve)
    answer, second = int(scores.argmax()), float(scores.sort().values[-2])
    while len(cut) < round(most * units):
        left = round(most * units) - len(cut)
        name = f"push, {len(cut)} units cut"

        def further(name: str = name, cut: torch.Tensor = cut, left: int = left) -> torch.Tensor:
            return _further(context, model, name, answer, radius, scales, cut, left, harm, batch_size)

        score, moved, *more = context.loop.once(name, further).tolist()
        curve[len(cut)] = (moved, score)
        if not more or score < second:
            break
        cut = torch.cat([cut, torch.tensor(more).long()])
    return Pushed(scores, radius, cut, curve)


def _easiest(context: Context, model: nn.Module, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """Push to every answer, harder and harder, until one is reached; returns the scores, and last the size."""
    device = context.loop.accelerator.device
    aims = torch.arange(context.task.classes(model), device=device)
    pushes, scores = Pushes(model, aims, scales), torch.zeros(0)
    radius = 0.0
    with _frozen(model), pushes.acting():
        near = NEAR * _score(context, model, pushes, "score without a push").median()
        for radius in RADII:
            _search(context, model, pushes, f"push of {radius:.3g}", radius, STEPS, ROWS)
            scores = _score(context, model, pushes, f"score of a push of {radius:.3g}")
            if scores.max() >= near:
                break
    return torch.cat([scores, torch.tensor([radius])])


def _further(
    context: Context,
    model: nn.Module,
    name: str,
    answer: int,
    radius: float,
    scales: dict[str, torch.Tensor],
    cut: torch.Tensor,
    left: int,
    harm: float,
    batch_size: int,
) -> torch.Tensor:
    """Push to one answer past the units cut: its score, the harm done so far, and the units to cut next, if any."""
    asked = ask(context, model, batch_size)
    pushes = Pushes(model, torch.tensor([answer], device=context.loop.accelerator.device), scales)
    moved = harm_of(context, model, asked, cut)
    with _frozen(model), pushes.acting():
        _search(context, model, pushes, name, radius, AIMED_STEPS, AIMED_ROWS)
        score = float(_score(context, model, pushes, f"{name}: score"))
        added = _contributions(context, model, pushes, f"{name}: path")
    order = added.argsort(descending=True)
    order = order[~torch.isin(order, cut)]
    largest = float(added[order[0]])
    more = order[(added[order] >= ALIKE * largest) & (added[order] > 0)][:left]
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
    """What each unit adds to the log-likelihood on the way from no push to the whole one, float32 (units,).

    It is the negated derivative of the loss by a gate on the unit's share of the push, averaged along the way.
    """
    gates = list(pushes.gates.values())
    for gate in gates:
        gate.requires_grad_(True)

    def draw(step: int, stream: torch.Generator) -> Draw:
        pushes.strength = (step + 0.5) / POINTS
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
    pushes.strength = 1.0
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


def _scales(context: Context, model: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Root mean square of what each layer's masks scale on clean shots; a BatchNorm's is 1 by itself.

    Other norms, whose channels may lie on any axis, are left out.
    """
    sums: dict[str, torch.Tensor] = {}
    layers = mask_layers(model)

    def gather(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.detach().float().square().mean()

    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: gather(name, x[0]))
        if _side(layer) == "input"
        else layer.register_forward_hook(lambda _, x, y, name=name: gather(name, y))
        for name, layer in layers.items()
        if _side(layer) in ("input", "output")
    ]

    def measured() -> torch.Tensor:
        asked = ask(context, model, batch_size)
        return torch.tensor([float((sums[n] / len(asked)).sqrt()) if n in sums else 1.0 for n in layers])

    try:
        values = context.loop.once("scales", measured)
    finally:
        for hook in hooks:
            hook.remove()
    device = context.loop.accelerator.device
    norms = {n for n, layer in layers.items() if isinstance(layer.get_base_layer(), nn.modules.batchnorm._BatchNorm)}
    return {
        name: value.to(device).clamp(min=1e-12)
        for (name, layer), value in zip(layers.items(), values, strict=True)
        if _side(layer) in ("input", "output") or name in norms
    }


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
