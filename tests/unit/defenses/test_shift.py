"""What running means remember beyond clean shots, and masks that learn while inputs are pushed so."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import NFTLayer, get_nft_model, mask_layers, masks
from hf_nft.defenses._displacement import MADE_UP, TIMES, entering
from hf_nft.defenses._finding import Finding
from hf_nft.defenses._harm import ceilings
from hf_nft.defenses._memory import COARSE, FINE, Memory, listening, remember
from hf_nft.defenses._shift import MOST, SIZE, Shifts, find
from hf_nft.defenses._statistics import excess_variance
from hf_nft.defenses._training import train
from hf_nft.defenses.base import Context
from hf_nft.defenses.nft import NFT
from hf_nft.loop import Loop, generator
from hf_nft.purification import purify
from hf_nft.shots import Shots
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.types import Draw, take
from hf_nft.workflows.estimate import forwards

NORM = "stages.1.0.bn2"
DRY: dict[str, Any] = {"steps": 0, "mixed_precision": "no", "exposures": 0, "cut": 0.0, "pushes": "never"}
FAR = {"shifted_within": (0.01, 1e9)}
"""Pushed however far the means lie apart."""


def settle(model: nn.Module, task: Any, shots: Shots) -> None:
    """Let all statistics be those of the shots as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(**task.inputs(model, shots.batch))
    model.eval()


def displace_a_mean(model: nn.Module) -> None:
    """Let the running mean of the last norm that counts lie elsewhere, and what it passes on be the same."""
    names = list(mask_layers(get_nft_model(copy.deepcopy(model))))
    norm: Any = model.get_submodule(names[-1 - round(NFT().shifted_late * len(names))])
    with torch.no_grad():
        norm.running_mean.add_(norm.running_var.sqrt())
        norm.bias.add_(norm.weight)


def classed(shots: Shots) -> Shots:
    """The shots of a data set of which all classes are as frequent."""
    return dataclasses.replace(shots, strata=shots.batch["labels"])


@pytest.fixture
def context(image_model, image_task, image_shots) -> Context:
    """Return what a defense sees of a suspect, adapter attached, whose statistics are those of the shots."""
    settle(image_model, image_task, image_shots)
    shots = classed(image_shots)
    return Context(get_nft_model(image_model), image_task, shots, shots.batch, Loop(make_accelerator("no"), 0))


class Unaugmented(ImageClassification):
    """Images that are only ever seen as they are."""

    augmentations = ("none",)


def looked_up(context: Context, late: float = 0.0) -> Memory:
    """Return what the running means remember."""
    found = excess_variance(context, context.model, 20, 1)
    memory = remember(context, context.model, found, late, 8)
    assert memory is not None
    return memory


@pytest.fixture
def shifts(context) -> Shifts:
    """Return what pushes inputs of a suspect whose means lie elsewhere than those of the shots, by a known pattern."""
    with torch.no_grad():
        for layer in mask_layers(context.model).values():
            base: Any = layer.get_base_layer()
            noise = torch.randn(base.running_mean.shape, generator=torch.Generator().manual_seed(1))
            layer.running_mean.add_(0.3 * noise * base.running_var.sqrt())
            base.running_mean.copy_(layer.running_mean)
    found = find(context, context.model, looked_up(context), 5.0, 20.0, 8)
    assert found is not None
    return found


def test_a_shift_is_the_distance_of_means(image_model, image_task, image_shots) -> None:
    """Against a plain computation of what enters one norm."""
    weights = torch.tensor([0.5, 1.5, 1.0, 1.0])[image_shots.batch["labels"]]
    norm, seen = image_model.get_submodule(NORM), []
    with torch.no_grad():
        norm.running_mean.add_(torch.linspace(-0.2, 0.4, len(norm.running_mean)))
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        image_model(**image_task.inputs(image_model, image_shots.batch))
    hook.remove()
    mean = (weights[:, None] * seen[0].mean((2, 3))).sum(0) / weights.sum()
    adapted, task = get_nft_model(image_model), Unaugmented(image_task.processor)
    shots = dataclasses.replace(image_shots, weights=weights)
    found = excess_variance(Context(adapted, task, shots, shots.batch, Loop(make_accelerator("no"), 0)), adapted, 8, 1)
    shift = found.shift[found.layers == list(masks(adapted)).index(NORM)]
    assert torch.allclose(shift, (norm.running_mean - mean) / norm.running_var.sqrt(), atol=1e-4)


def test_distances_are_measured_in_what_the_choice_of_shots_explains(context) -> None:
    """Against dense matrices: how a weighted mean varies is the sum of its classes' covariances."""
    labels = context.shots.strata
    weights = torch.tensor([0.5, 1.5, 1.0, 1.0])[labels]
    context = dataclasses.replace(context, shots=dataclasses.replace(context.shots, weights=weights))
    names = list(mask_layers(context.model))[:2]
    layers = [mask_layers(context.model)[name] for name in names]
    with torch.no_grad(), listening(layers, 20) as heard:
        context.task.forward(context.model, Draw(context.data))
    bases: list[Any] = [layer.get_base_layer() for layer in layers]
    seen = torch.cat(heard, 1) / torch.cat([(base.running_var + base.eps).sqrt() for base in bases])
    covariance = sum(
        (weights[labels == label].sum() / 20) ** 2 * seen[labels == label].T.cov() / 5 for label in range(4)
    )
    average, unit = covariance.trace() / len(covariance), torch.eye(len(covariance))
    fine, coarse = ((covariance + other * average * unit).double().inverse().float() for other in (FINE, COARSE))
    memory = looked_up(context, 1 - 2 / len(mask_layers(context.model)))
    assert memory.layers == layers
    distance, moved = memory.distance, torch.randn(len(covariance), generator=torch.Generator().manual_seed(0))
    assert memory.ratio == pytest.approx(float(distance @ coarse @ distance) / len(distance), rel=1e-3)
    sizes = float(distance @ fine @ distance) * float(moved @ fine @ moved)
    cosine = float(moved @ fine @ distance) / sizes**0.5
    assert float(memory.agreement(moved)) == pytest.approx(cosine, abs=1e-3)
    along = float(moved @ fine @ distance) / float(moved @ fine @ moved)
    assert torch.allclose(memory.explained(moved), max(0.0, along) * moved, atol=1e-4)
    assert torch.allclose(memory.explained(-moved), max(0.0, -along) * -moved, atol=1e-4)


def test_what_chance_explains_is_not_always_known(context) -> None:
    found = excess_variance(context, context.model, 20, 1)
    for strata in (None, torch.tensor([0] * 19 + [1])):
        shots = dataclasses.replace(context.shots, strata=strata)
        assert remember(dataclasses.replace(context, shots=shots), context.model, found, 0.0, 8) is None
    same = dataclasses.replace(found, shift=torch.zeros_like(found.shift))
    assert remember(context, context.model, same, 0.0, 8) is None


def test_means_of_the_shots_themselves_are_not_shifted(context) -> None:
    found = excess_variance(context, context.model, 20, 1)
    assert found.augment == "none"
    assert float(found.shift.abs().max()) < 0.01
    norm: Any = mask_layers(context.model)[NORM]
    with torch.no_grad():
        norm.running_mean.add_(norm.running_var.sqrt())
        norm.get_base_layer().running_mean.copy_(norm.running_mean)
    found = excess_variance(dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0)), context.model, 20, 1)
    moved = found.layers == list(mask_layers(context.model)).index(NORM)
    assert found.shift[moved].tolist() == pytest.approx([1.0] * int(moved.sum()), abs=0.1)


def test_all_frames_of_a_row_are_heard_as_one() -> None:
    """Rows of two frames in a norm over channels, the frames of a row one after the other."""
    norm = NFTLayer(nn.BatchNorm1d(3).eval(), "default")
    x = torch.arange(24.0).view(8, 3)
    with listening([norm], 4) as heard:
        norm(x)
    assert torch.equal(heard[0], x.view(4, 2, 3).mean(1))


def test_rows_are_pushed_as_often_as_is_said(context, shifts) -> None:
    times, rows = torch.tensor([0.0, 1.0, 0.5]), take(context.data, torch.tensor([0, 1, 2]))
    pattern = {name: torch.randn_like(vector.detach()) for name, vector in shifts.pushes.vectors.items()}
    for name, vector in shifts.pushes.vectors.items():
        vector.detach().copy_(pattern[name])
    inputs = context.task.inputs(context.model, rows)
    with torch.no_grad():
        found = shifts.forward(context.task, context.model, Draw({**rows, TIMES: times})).logits
        alone = context.model(
            pixel_values=inputs["pixel_values"] + times[:, None, None, None] * pattern["pixel_values"]
        )
        assert torch.allclose(found, alone.logits, atol=1e-5)
        with entering(context.model, pattern, torch.ones(1)):
            every = context.task.forward(context.model, Draw(rows)).logits
        assert torch.allclose(every[1], found[1], atol=1e-5)
        plain = context.task.forward(context.model, Draw(rows)).logits
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert not torch.allclose(found[1:], plain[1:], atol=1e-3), "and no longer than the pass lasts"


def test_rows_are_pushed_as_often_and_as_far_as_is_drawn(context, shifts) -> None:
    draw = Draw(take(context.data, torch.zeros(2000, dtype=torch.int64)))
    times = shifts.displace(draw, 0.25, generator(0, "masks", 0)).batch[TIMES]
    acting = times[times > 0]
    assert len(acting) / 2000 == pytest.approx(0.25, abs=0.03)
    assert float(acting.mean()) == pytest.approx(MOST / 2, abs=0.07)
    assert 0.9 * MOST < float(acting.max()) <= MOST


def test_the_pattern_moves_means_as_they_are_remembered(context, shifts) -> None:
    """Far more nearly than patterns at random do; and norms are displaced by what the distances hold of it."""
    memory, shape = shifts.memory, shifts.start["pixel_values"].shape

    def moved(pattern: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), listening(memory.layers, 20) as before:
            context.task.forward(context.model, Draw(context.data))
        with torch.no_grad(), entering(context.model, {"pixel_values": pattern}, torch.ones(1)):
            with listening(memory.layers, 20) as after:
                context.task.forward(context.model, Draw(context.data))
        return (memory.measured(after) - memory.measured(before)).mean(0)

    draws = torch.Generator().manual_seed(0)
    size = shifts.start["pixel_values"].square().mean().sqrt()
    others = [float(memory.agreement(moved(size * torch.randn(shape, generator=draws)))) for _ in range(20)]
    found = moved(shifts.start["pixel_values"])
    assert float(memory.agreement(found)) > max(others) + 0.1
    assert torch.allclose(memory.explained(shifts.moves), shifts.moves / 5.0, atol=1e-4), "five times what they hold"


def test_shots_like_what_displaced_ones_are_answered_are_drawn_more(context, shifts) -> None:
    """Against what is said where running means lie elsewhere, by which what enters each norm is displaced."""
    moved = copy.deepcopy(context.model)
    parts = (shifts.moves * shifts.memory.spread).split([len(layer.running_mean) for layer in shifts.memory.layers])
    with torch.no_grad():
        for layer, part in zip(mask_layers(moved).values(), parts, strict=True):
            layer.running_mean.sub_(part)
        own, said = (
            context.task.forward(model, Draw(context.data)).logits.softmax(1) for model in (context.model, moved)
        )
    assert torch.allclose(shifts.answers, said.mean(0), atol=1e-3)
    leading = int(shifts.answers.argmax())
    assert next(iter(shifts.evidence()["shift_answers"])) == leading == int(shifts.pushes.aims)
    assert torch.allclose(shifts.weights, (1 - MADE_UP) / 20 + MADE_UP * own[:, leading] / own[:, leading].sum())


def test_each_draw_leads_the_pattern_on_to_the_answer(context, shifts) -> None:
    """By rows of the draw; held to what is remembered, it stays nearer to where it began."""
    draw = Draw(take(context.data, torch.arange(20)))
    (name, start), answer = next(iter(shifts.start.items())), int(shifts.pushes.aims)
    scale = float(shifts.pushes.scales[name])
    longest = SIZE * start.numel() ** 0.5 * scale

    def likelihood(pattern: torch.Tensor) -> float:
        with torch.no_grad(), entering(context.model, {name: pattern}, torch.ones(1)):
            return float(context.task.forward(context.model, draw).logits.log_softmax(1)[:, answer].mean())

    led = {}
    for guide in (0.0, 20.0):
        dataclasses.replace(shifts, guide=guide).prepare(draw)
        led[guide] = shifts.pushes.vectors[name].detach().clone()
        assert float(led[guide].norm()) <= longest * (1 + 1e-4)
        assert likelihood(led[guide]) > likelihood(torch.zeros_like(start))
    assert likelihood(led[0.0]) > likelihood(start)
    near = [float(torch.cosine_similarity(led[guide].flatten(), start.flatten(), 0)) for guide in (0.0, 20.0)]
    assert near[0] < near[1]
    assert all(mask.requires_grad for mask in masks(context.model).values())


def test_the_suspect_is_asked_without_displacement(context, shifts) -> None:
    """The first loss is the divergence of the pushed suspect from itself; without pushes it is 0."""
    nft = NFT(steps=1, batch_size=8, augment="none", mixup_alpha=0.0, reuse=1, shifted=1.0)
    weights = torch.zeros(20)
    weights[:4] = 0.25
    shifts = dataclasses.replace(shifts, weights=weights)
    stream = generator(0, "masks", 0)
    rows = torch.multinomial(weights, 8, replacement=True, generator=stream)
    draw = shifts.displace(Draw(take(context.data, rows)), 1.0, stream)
    with torch.no_grad():
        plain = context.task.forward(context.model, draw).logits / nft.temperature
        moved = shifts.forward(context.task, context.model, draw).logits / nft.temperature
        expected = nn.functional.kl_div(moved.log_softmax(1), plain.softmax(1), reduction="batchmean") * 4
    learnt = masks(context.model)
    bounds, tops = dict.fromkeys(learnt, 0.0), ceilings(context.model, torch.empty(0, dtype=torch.int64))
    train(nft, context, context.model, bounds, tops, Finding("none", shifts=shifts))
    assert context.loop.losses["masks"] == pytest.approx([float(expected)], rel=1e-3)
    assert float(expected) > 0.001


def test_only_a_suspect_in_which_nothing_stands_out_is_pushed(image_model, image_task, image_shots) -> None:
    """One that varies more than its shots as a whole and has outliers that they do not need, is cut for those."""
    settle(image_model, image_task, image_shots)
    still = copy.deepcopy(image_model)
    displace_a_mean(image_model)

    def found(model: nn.Module = image_model, **changes: Any) -> tuple[dict[str, Any], set[str]]:
        settings = {**DRY, **FAR, "composed": 0.0, **changes}
        result = purify(copy.deepcopy(model), image_task, classed(image_shots), NFT(**settings))
        return result.details, {code for code, _ in result.doubts}

    blind, doubts = found()
    assert "nothing-stands-out" in doubts
    assert blind["shifted"] == NFT().shifted
    assert list(blind["shift_answers"].values()) == sorted(blind["shift_answers"].values(), reverse=True)
    far = blind["shift_ratio"]
    assert found(shifted_within=(far * 0.99, far * 1.01))[0]["shifted"] == NFT().shifted
    assert NFT().shifted_within[1] < far, "one norm's means lie a standard deviation apart, which is too far"
    without = [found(still), found(shifted=0.0), found(bn_mode="train_stats"), found(class_prior=False)]
    without += [found(shifted_late=0.5)]  # the norm whose mean lies elsewhere is one of these
    without += [found(shifted_within=within) for within in (NFT().shifted_within, (far * 1.01, 2 * far))]
    assert all("nothing-stands-out" in doubts for _, doubts in without)
    composed, doubts = found(composed=0.5)
    assert (composed["shifted"] == 0.0) == ("composite-trigger" in doubts), "the one or the other"
    with torch.no_grad():
        image_model.get_submodule(NORM).running_var.mul_(50)
    seen, doubts = found()
    assert doubts == {"few-shots"}
    needed, doubts = found(needed=0.0)
    assert "needed-units" in doubts
    spared, doubts = found(needed=0.0, outliers=0.0)
    assert "needed-units" in doubts
    assert spared["shifted"] == NFT().shifted, "nothing was cut"
    for details in (seen, needed, *(details for details, _ in without)):
        assert details["shifted"] == 0.0
        assert "shift_answers" not in details


@pytest.mark.parametrize("composed", [0.0, 0.75])
def test_what_looking_costs_is_estimated(image_model, image_task, image_shots, composed: float) -> None:
    """The search for a pattern; and what the suspect says to the shots is asked once, for composing as well."""
    settle(image_model, image_task, image_shots)
    displace_a_mean(image_model)
    on, off = (NFT(**DRY, **FAR, composed=composed, shifted=shifted) for shifted in (0.6, 0.0))
    done = [purify(copy.deepcopy(image_model), image_task, classed(image_shots), nft) for nft in (on, off)]
    assert [result.details["shifted"] for result in done] == [0.6, 0.0]
    counted = [forwards(nft, image_task, True, 20, 4) for nft in (on, off)]
    assert done[0].sample_forwards - done[1].sample_forwards == counted[0] - counted[1]
