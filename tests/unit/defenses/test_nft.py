"""NFT: the published preset against a computation in plain torch, and each switch by what it alone may change.

Every setting that matters here is named; the preset `default` is not looked at.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import get_nft_model, masks
from hf_nft.defenses._composites import Composites
from hf_nft.defenses._exposure import Ranking
from hf_nft.defenses._finding import Finding
from hf_nft.defenses._harm import ceilings
from hf_nft.defenses._training import train
from hf_nft.defenses.base import Context, told_by
from hf_nft.defenses.nft import NFT
from hf_nft.errors import ConfigError, DataError
from hf_nft.loop import Loop, generator
from hf_nft.models.base import CIFAR_MEAN, CIFAR_STD
from hf_nft.purification import PurifyResult, purify
from hf_nft.shots import Shots
from hf_nft.types import Draw, take

NORMS = [f"stages.{stage}.0.bn{i}" for stage in range(4) for i in (1, 2)]
QUICK = {"steps": 4, "batch_size": 8, "mixed_precision": "no"}
"""The published method, short."""
SWIFT = {"momentum": 0.0, "eta": 0.0, "schedule": "none", "augment": "none", "mixup_alpha": 0.0}


def paper(**changes: Any) -> NFT:
    defense = NFT.from_preset("paper", **{**QUICK, **changes})
    assert isinstance(defense, NFT)
    return defense


def run(model: nn.Module, task, shots: Shots, **changes: Any) -> PurifyResult:
    return purify(model, task, shots, paper(**changes))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bare_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The suspect's own tensors inside the adapter, under its own names."""
    found = {}
    for name, value in model.get_base_model().state_dict().items():
        if ".nft_" not in name:
            found[name.replace("base_layer.", "")] = value
    return found


def statistics(model: PeftModel) -> dict[str, torch.Tensor]:
    """Running means and variances that the adapted model uses."""
    modules = dict(model.get_base_model().named_modules())
    return {f"{n}.{k}": getattr(modules[n], k).detach().clone() for n in NORMS for k in ("running_mean", "running_var")}


# the published method, step by step


def reference(
    model: nn.Module, shots: Shots, steps: int, batch: int, alpha: float, beta: float
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Masks on BatchNorm gains by the NFT paper: MixUp, SGD with momentum, L1 pull by N_c, bound by depth."""
    model = copy.deepcopy(model).train()
    gains = {name: dict(model.named_modules())[name].weight.detach().clone() for name in NORMS}
    learnt = {name: torch.ones_like(gain, requires_grad=True) for name, gain in gains.items()}
    momentum = {name: torch.zeros_like(gain) for name, gain in gains.items()}
    images, labels = shots.batch["pixels"].permute(0, 2, 3, 1).numpy(), shots.batch["labels"]
    rates, losses = (0.05, 0.0471353, 0.0396353, 0.0303647, 0.0228647), []
    for step in range(steps):
        stream = generator(0, "masks", step)
        rows = torch.randint(len(labels), (batch,), generator=stream)
        tops, lefts = torch.randint(0, 5, (2, batch), generator=stream).tolist()
        mirrored = torch.rand(batch, generator=stream) < 0.5
        cut = []
        for row, top, left, mirror in zip(rows.tolist(), tops, lefts, mirrored.tolist(), strict=True):
            window = np.pad(images[row], ((2, 2), (2, 2), (0, 0)))[top : top + 16, left : left + 16]
            cut.append((window[:, ::-1] if mirror else window) / 255.0)
        x = torch.from_numpy((np.stack(cut) - CIFAR_MEAN) / CIFAR_STD).float().permute(0, 3, 1, 2)
        partner = torch.randperm(batch, generator=stream)
        lam = np.random.default_rng(int(torch.randint(2**62, (), generator=stream))).beta(1.0, 1.0)
        weights = {f"{name}.weight": gains[name] * learnt[name] for name in NORMS}
        logits = functional_call(model, weights, (lam * x + (1 - lam) * x[partner],)).logits
        y = labels[rows]
        loss = lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[partner])
        loss = loss + 0.001 / 5 * sum((1 - mask).abs().sum() for mask in learnt.values())  # N_c = 20 shots / 4 classes
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, list(learnt.values()))
        with torch.no_grad():
            for depth, (name, gradient) in enumerate(zip(NORMS, gradients, strict=True), 1):
                momentum[name].mul_(0.95).add_(gradient)
                learnt[name].sub_(rates[step * 5 // steps] * momentum[name])
                learnt[name].clamp_(alpha * math.exp(-beta * depth), 1.0)
    moved = {name: value for name, value in model.state_dict().items() if "running" in name}
    return {name: mask.detach() for name, mask in learnt.items()} | moved, losses


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.5), (0.999, 0.001)])
def test_the_published_method_step_by_step(image_model, image_task, image_shots, alpha: float, beta: float) -> None:
    """With the published bound, and with one so high that masks run into it."""
    expected, losses = reference(image_model, image_shots, 20, 16, alpha, beta)
    result = run(image_model, image_task, image_shots, steps=20, batch_size=16, alpha=alpha, beta=beta)
    found = {name.removesuffix(".base_layer"): mask.detach() for name, mask in masks(result.model).items()}
    assert list(found) == NORMS  # in the order that depth counts
    assert result.losses["masks"] == pytest.approx(losses, abs=2e-5)
    for name in NORMS:
        assert float((found[name] - expected[name]).abs().max()) < 1e-5, name
    for name, value in statistics(result.model).items():
        assert torch.allclose(value, expected[name], atol=1e-4), name
    low = [float(mask.min()) for mask in found.values()]
    floors = [alpha * math.exp(-beta * depth) for depth in range(1, 9)]
    assert all(value >= floor - 1e-6 for value, floor in zip(low, floors, strict=True))
    assert any(value < floor + 1e-6 for value, floor in zip(low, floors, strict=True)) == (alpha > 0.9)
    assert min(low) < (0.999 if alpha > 0.9 else 0.97)  # it did learn something
    assert result.details["effective_eta"] == pytest.approx(0.001 / 5)
    assert result.sample_forwards == 20 * 16 * 2


def test_the_published_learning_rates() -> None:
    defense = NFT.from_preset("paper")
    assert [round(defense.rate(step), 4) for step in (0, 199, 200, 400, 600, 800, 999)] == [
        0.05, 0.05, 0.0471, 0.0396, 0.0304, 0.0229, 0.0229,
    ]  # fmt: skip
    every = paper(steps=10, lr_passes="none", lr=0.1, lr_end=0.0)
    assert [every.rate(step) for step in (0, 5)] == pytest.approx([0.1, 0.05])


def test_the_published_settings() -> None:
    settings = NFT.from_preset("paper").settings()
    expected = {
        "steps": 1000, "batch_size": 128, "optimizer": "sgd", "momentum": 0.95, "lr": 0.05, "lr_end": 0.02,
        "lr_passes": 5, "eta": 1e-3, "alpha": 0.8, "beta": 0.5, "schedule": "exponential", "depth_index": "ordinal",
        "mixup_alpha": 1.0, "objective": "labels", "bn_mode": "train_stats", "mask_stem": False, "mask_bias": False,
        "exposures": 0, "cut": 0.0, "project_momentum": False,
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected


# what stays as it was


def test_the_suspects_weights_and_statistics_are_never_written(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    result = run(image_model, image_task, image_shots)
    found = bare_state(result.model)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)
    with torch.no_grad(), result.model.disable_adapter():
        x = image_task.inputs(result.model, image_shots.batch)["pixel_values"]
        inside = result.model(pixel_values=x).logits
    fresh = type(image_model)(image_model.config).eval()
    fresh.load_state_dict(before)
    assert torch.allclose(inside, fresh(x).logits, atol=1e-6)


def test_masks_stay_within_their_bounds(image_model, image_task, image_shots) -> None:
    result = run(image_model, image_task, image_shots, lr=5.0, lr_end=5.0, steps=6)
    for depth, mask in enumerate(masks(result.model).values(), 1):
        floor, mask = 0.8 * math.exp(-0.5 * depth), mask.detach()
        assert float(mask.min()) == pytest.approx(floor, abs=1e-6)  # at this rate some sit there
        assert float(mask.max()) <= 1.0
    assert list(result.details["floors"].values()) == pytest.approx([0.8 * math.exp(-0.5 * d) for d in range(1, 9)])


# BatchNorm statistics and dropout


def test_frozen_statistics_do_not_move_by_a_bit(image_model, image_task, image_shots) -> None:
    before = {k: v for k, v in snapshot(image_model).items() if "running" in k or "num_batches" in k}
    result = run(image_model, image_task, image_shots, bn_mode="frozen_stats")
    after = statistics(result.model)
    assert all(torch.equal(after[name], before[name]) for name in after)
    merged = result.merged().state_dict()
    assert all(torch.equal(merged[name], before[name]) for name in before)


def test_training_moves_the_adapters_statistics(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    result = run(image_model, image_task, image_shots, bn_mode="train_stats")
    after = statistics(result.model)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    merged = result.merged().state_dict()
    assert all(torch.equal(merged[name], after[name]) for name in after)


@pytest.mark.parametrize("batch_size", [20, 19, 10, 8])
def test_recalibrated_statistics_are_averages_over_shots(image_model, image_task, image_shots, batch_size: int) -> None:
    result = run(image_model, image_task, image_shots, bn_mode="recalibrate_unmixed", batch_size=batch_size)
    found = statistics(result.model)
    # what each norm receives, batch by batch, in a network that normalises by batch statistics
    net = copy.deepcopy(result.model).merge_and_unload().train()
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in NORMS}
    for name in NORMS:
        dict(net.named_modules())[name].register_forward_pre_hook(lambda m, x, name=name: inputs[name].append(x[0]))
    x = image_task.inputs(net, image_shots.batch)["pixel_values"]
    with torch.no_grad():
        for part in x.tensor_split(-(-20 // batch_size)):  # 10 and 10, not 19 and 1, whose variance is unknown
            net(part)
    for name in NORMS:
        means = sum(len(x) / 20 * x.mean((0, 2, 3)) for x in inputs[name])
        variances = sum(len(x) / 20 * x.var((0, 2, 3), unbiased=True) for x in inputs[name])
        assert torch.allclose(found[f"{name}.running_mean"], means, atol=1e-5), name
        assert torch.allclose(found[f"{name}.running_var"], variances, atol=1e-5), name


def test_only_statistics_that_are_measured_again_are_reset(image_model, image_task, image_shots) -> None:
    class Instance(nn.InstanceNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, affine=True, track_running_stats=True)
            self.running_mean.fill_(0.25)

    norm = image_model.get_submodule(NORMS[-1])
    image_model.set_submodule(NORMS[-1], Instance(norm.num_features))
    result = run(image_model.eval(), image_task, image_shots, bn_mode="recalibrate_unmixed")
    assert (statistics(result.model)[f"{NORMS[-1]}.running_mean"] == 0.25).all()


def test_recalibration_does_not_touch_masks_or_momentum(image_model, image_task, image_shots) -> None:
    other = copy.deepcopy(image_model)
    moved = masks(run(image_model, image_task, image_shots, bn_mode="train_stats").model)
    result = run(other, image_task, image_shots, bn_mode="recalibrate_unmixed")
    for name, mask in masks(result.model).items():
        assert torch.equal(mask, moved[name])
    assert {m.momentum for m in result.model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


class Dropped(nn.Module):
    """A network whose classifier sees features through dropout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.body, self.drop = model.config, model, nn.Dropout(0.5)
        self.seen: list[bool] = []

    def forward(self, pixel_values: torch.Tensor) -> Any:
        self.seen.append(self.drop.training)
        return self.body(self.drop(pixel_values))


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_has_its_own_switch(image_model, image_task, image_shots, dropout: bool) -> None:
    model = Dropped(image_model)
    run(model, image_task, image_shots, dropout=dropout, depth_index="ordinal")
    assert model.seen
    assert set(model.seen) == {dropout}
    assert not model.drop.training  # evaluation mode afterwards


# objective


def test_without_mixing_and_pull_the_first_step_is_the_plain_gradient(image_model, image_task, image_shots) -> None:
    """With frozen statistics the first loss is the suspect's own cross-entropy on the drawn rows."""
    rows = torch.randint(20, (8,), generator=generator(0, "masks", 0))
    with torch.no_grad():
        logits = image_model(image_task.inputs(image_model, image_shots.batch)["pixel_values"][rows]).logits
    expected = float(F.cross_entropy(logits, image_shots.batch["labels"][rows]))
    result = run(image_model, image_task, image_shots, steps=1, bn_mode="frozen_stats", **SWIFT)
    assert result.losses["masks"] == pytest.approx([expected], abs=1e-5)


def test_distillation_starts_at_zero_and_moves_nothing(image_model, image_task, image_shots) -> None:
    """Student and teacher are the same network until a mask moves; so the loss is 0, and so is its gradient."""
    settings = {"objective": "distill", "bn_mode": "frozen_stats", "steps": 3}
    result = run(image_model, image_task, image_shots, **{**settings, "eta": 0.0})
    assert result.losses["masks"] == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(float((1 - mask.detach()).abs().max()) < 1e-4 for mask in masks(result.model).values())


def test_the_suspect_answers_each_batch_once(image_model, image_task, image_shots) -> None:
    """A batch that is used several times is drawn and answered once, so the rows of the last step repeat."""
    forwards = []
    image_model.register_forward_hook(lambda module, inputs, output: forwards.append(module.training))
    settings = {"objective": "distill", "bn_mode": "frozen_stats", "eta": 0.0, "steps": 6}
    apart = run(copy.deepcopy(image_model), image_task, image_shots, **settings, reuse=1)
    alone = len(forwards)
    together = run(image_model, image_task, image_shots, **settings, reuse=3)
    assert (alone, len(forwards) - alone) == (12, 8)
    assert (apart.sample_forwards, together.sample_forwards) == (6 * 8 * 2 + 6 * 8, 6 * 8 * 2 + 2 * 8)


@pytest.mark.parametrize(("shots", "batch_size", "sizes"), [(20, 8, [7, 7, 6]), (9, 8, [5, 4]), (3, 4, [3])])
def test_the_suspect_answers_shots_that_never_change_once(
    image_model, image_task, image_shots, shots, batch_size, sizes
) -> None:
    """Neither mixed nor augmented, every shot is passed to it once, and trained on for as many steps as the others."""
    asked, steps = [], 12
    kept = Shots(take(image_shots.batch, slice(0, shots)), per_class=image_shots.per_class)
    expected = image_task.inputs(image_model, kept.batch)["pixel_values"]

    def note(module, args, inputs) -> None:
        if not torch.is_grad_enabled():
            asked.append(inputs["pixel_values"])

    image_model.register_forward_pre_hook(note, with_kwargs=True)
    settings = {"objective": "distill", "bn_mode": "frozen_stats", "augment": "none", "mixup_alpha": 0.0}
    result = run(image_model, image_task, kept, **settings, steps=steps, batch_size=batch_size, reuse=None)
    assert [len(part) for part in asked] == sizes
    found = torch.cat(asked).flatten(1)
    assert torch.equal(*(rows[rows[:, 0].argsort()] for rows in (found, expected.flatten(1))))
    assert result.sample_forwards == shots * (2 * steps // len(sizes) + 1)


def test_composed_shots_are_to_be_answered_as_their_parts(image_model, image_task, image_shots) -> None:
    """The divergence is that from what the suspect says to either shot, each as far as it is seen."""
    own, other = (take(image_shots.batch, slice(start, start + 4)) for start in (0, 4))
    said = [
        SimpleNamespace(logits=image_model(**image_task.inputs(image_model, batch)).logits.detach())
        for batch in (own, other)
    ]
    student = SimpleNamespace(logits=torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    draw = Draw(own, other, 0.4, seam=1)
    with torch.no_grad():
        taught = replace(draw, answers=told_by(image_model, image_task, draw, 2.0))
    found = image_task.divergence(student, taught, 2.0)
    parts = [image_task.divergence(student, Draw(own, answers=image_task.answers(s, 2.0)), 2.0) for s in said]
    assert float(found) == pytest.approx(0.4 * float(parts[0]) + 0.6 * float(parts[1]), abs=1e-5)


def test_composed_draws_show_either_shot_whole_to_the_suspect_only(image_model, image_task, image_shots) -> None:
    """Of every composed image, the masks see two parts that come from two shots on one side of one seam."""
    shown: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def note(module, args, inputs) -> None:
        shown[torch.is_grad_enabled()].append(inputs["pixel_values"])

    image_model.register_forward_pre_hook(note, with_kwargs=True)
    nft = NFT(steps=3, reuse=1, batch_size=8, augment="none", composed=1.0, lr=1.0)
    context = Context(image_model, image_task, image_shots, image_shots.batch, Loop(make_accelerator("no"), 0))
    parts = torch.zeros(4, 4)
    parts[1:3, 3] = 1.0  # classes 1 and 2 draw answer 3, so one is on either side
    own = image_shots.batch["labels"]
    adapted = get_nft_model(image_model)
    bounds, tops = dict.fromkeys(masks(adapted), 0.0), ceilings(adapted, torch.empty(0, dtype=torch.int64))
    train(nft, context, adapted, bounds, tops, Finding("none", composites=Composites(own, parts)))
    wholes = image_task.inputs(image_model, image_shots.batch)["pixel_values"]
    asked, side = shown[False], wholes.shape[-1]  # two for each step
    assert [len(rows) for rows in asked] == [8] * 6
    for sides in zip(asked[::2], asked[1::2], strict=True):
        kinds = [[int(own[(row == wholes).flatten(1).all(1)][0]) for row in rows] for rows in sides]
        assert all({one, two} == {1, 2} for one, two in zip(*kinds, strict=True))
    assert len(shown[True]) == 3
    for step, composed in enumerate(shown[True]):
        pairs = list(zip(composed, *asked[2 * step : 2 * step + 2], strict=True))
        seams = [
            axis
            for axis in (1, 2)
            for seam in range(round(0.35 * side), round(0.65 * side) + 1)
            if all(torch.equal(row, _beside(one, two, seam, axis)) for row, one, two in pairs)
        ]
        assert len(seams) == 1


def _beside(one: torch.Tensor, two: torch.Tensor, seam: int, axis: int) -> torch.Tensor:
    return torch.cat([one.narrow(axis, 0, seam), two.narrow(axis, seam, two.shape[axis] - seam)], axis)


def test_the_pull_holds_masks_at_one(image_model, image_task, image_shots) -> None:
    other = copy.deepcopy(image_model)
    free = masks(run(image_model, image_task, image_shots, eta=0.0, steps=8).model)
    held = masks(run(other, image_task, image_shots, eta=5.0, steps=8).model)
    distance = [sum(float((1 - m.detach()).abs().sum()) for m in found.values()) for found in (free, held)]
    assert distance[1] < distance[0]


# exposure and cut


EXPOSED = {"exposures": 2, "unlearn_steps": 3, "relearn_passes": 2}


def test_an_exposure_leaves_the_suspect_exactly_as_it_was(image_model, image_task, image_shots) -> None:
    before = snapshot(image_model)
    result = run(image_model, image_task, image_shots, **EXPOSED, cut=0.0, steps=0, bn_mode="frozen_stats")
    found, used = bare_state(result.model), statistics(result.model)
    assert all(torch.equal(found[name], before[name]) for name in before)
    assert all(torch.equal(used[name], before[name]) for name in used)
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in masks(result.model).values())
    assert not any(p.requires_grad for n, p in result.model.named_parameters() if "nft_mask" not in n)
    assert sum("unlearn" in name for name in result.losses) == 2
    merged = result.merged().state_dict()
    assert all(torch.equal(merged[name], before[name]) for name in before)


def test_cut_units_are_zero_and_stay_zero_when_merged(image_model, image_task, image_shots) -> None:
    result = run(image_model, image_task, image_shots, **EXPOSED, cut=0.1, lr=0.5, lr_end=0.5, alpha=0.9, beta=0.0)
    learnt = masks(result.model)
    units = sum(mask.numel() for mask in learnt.values())
    assert result.details["masks"] == units
    assert result.details["placement"] == "bn"
    assert result.details["units_cut"] == round(0.1 * units) > 0
    zeros = {name: torch.nonzero(mask == 0).flatten() for name, mask in learnt.items()}
    assert sum(len(z) for z in zeros.values()) == round(0.1 * units)  # floors of 0.9 keep all others off 0
    assert {n: len(z) for n, z in zeros.items() if len(z)} == result.details["cut_by_layer"]
    assert all(float(mask.detach()[mask > 0].min()) >= 0.9 - 1e-6 for mask in learnt.values())
    norms = dict(result.merged().named_modules())
    for name, rows in zeros.items():
        gain = norms[name.removesuffix(".base_layer")].weight
        assert torch.equal(torch.nonzero(gain == 0).flatten(), rows)


def test_a_ranking_is_reported(image_model, image_task, image_shots) -> None:
    result = run(image_model, image_task, image_shots, **EXPOSED, cut=0.05, steps=1)
    ranking = result.details["ranking"]
    assert ranking == sorted(ranking)
    assert all(0 <= value <= 1 for value in ranking)
    assert len(result.details["collapsed_accuracy"]) == 2
    assert all(0 <= value <= 1 for value in result.details["collapsed_accuracy"])


@pytest.mark.parametrize(
    ("lowest", "accuracy", "codes"),
    [
        (0.1, [0.1, 0.5], []),
        (0.41, [0.1, 0.1], ["nothing-stands-out"]),
        (0.1, [0.5, 0.5], ["exposure-did-not-collapse"]),
    ],
)
def test_a_ranking_without_a_gap_or_a_collapse_is_doubted(lowest: float, accuracy: list[float], codes) -> None:
    scores = torch.full((100,), 0.8)
    scores[7] = lowest
    assert [code for code, _ in Ranking(scores, accuracy, 0.2).doubts()] == codes


# runs


def test_the_same_seed_learns_the_same_masks(image_model, image_task, image_shots) -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        result = run(copy.deepcopy(image_model), image_task, image_shots, **EXPOSED, cut=0.05, seed=seed)
        found.append(torch.cat([mask.detach() for mask in masks(result.model).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_accumulation_changes_nothing_without_batch_statistics(image_model, image_task, image_shots) -> None:
    found = []
    for parts in (1, 3):
        result = run(
            copy.deepcopy(image_model),
            image_task,
            image_shots,
            bn_mode="frozen_stats",
            gradient_accumulation_steps=parts,
        )
        found.append(torch.cat([mask.detach() for mask in masks(result.model).values()]))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_merging_is_the_same_model(image_model, image_task, image_shots) -> None:
    result = run(image_model, image_task, image_shots, lr=0.5, lr_end=0.5)
    x = image_task.inputs(result.model, image_shots.batch)["pixel_values"]
    with torch.no_grad():
        masked = result.model(pixel_values=x).logits
        plain = result.merged()(x).logits
    assert type(result.merged()).__name__ == "PreActResNetForImageClassification"
    assert torch.allclose(masked, plain, atol=1e-5)


def test_momentum_at_a_bound_can_be_dropped(image_model, image_task, image_shots) -> None:
    kept, dropped = (
        torch.cat([m.detach() for m in masks(result.model).values()])
        for result in (
            run(copy.deepcopy(image_model), image_task, image_shots, lr=1.0, lr_end=1.0, project_momentum=flag, steps=8)
            for flag in (False, True)
        )
    )
    assert not torch.equal(kept, dropped)
    told = {"optimizer": "sgd", "momentum": 0.0, "lr": 100.0, "lr_end": 100.0, "steps": 4}
    alone, projected = (
        torch.cat([m.detach() for m in masks(result.model).values()])
        for result in (
            run(copy.deepcopy(image_model), image_task, image_shots, **told, project_momentum=flag)
            for flag in (False, True)
        )
    )
    assert torch.equal(alone, projected)  # there is none to drop
    assert (alone == 1).any()  # some sit at a bound


def test_no_shots_and_impossible_settings(image_model, image_task, image_shots) -> None:
    empty = Shots({key: value[:0] for key, value in image_shots.batch.items()}, per_class=0.0)
    with pytest.raises(DataError, match="at least one clean example"):
        purify(image_model, image_task, empty, paper())
    with pytest.raises(ConfigError) as caught:
        NFT.from_preset("paper", alpha="2", beta="-1", lr="0", momentum="1", temperature="0", cut="1")
    for name in ("alpha", "beta", "lr", "momentum", "temperature", "cut"):
        assert f"{name}: expected" in str(caught.value)
    counts = ("unlearn_steps", "relearn_passes", "statistics_passes")
    with pytest.raises(ConfigError) as caught:
        NFT(**dict.fromkeys(counts, 0), unlearn_lrs=(0.0,), unlearn_clip=0.0, relearn_lr=0.0, lr_end=-1.0)
    for name in (*counts, "unlearn_lrs", "unlearn_clip", "relearn_lr", "lr_end"):
        assert f"{name}: expected" in str(caught.value)
    with pytest.raises(ConfigError, match="needs exposures"):
        NFT.from_preset("paper", cut=0.1)
