"""Shifts: what running means hold beyond clean shots, and masks that learn while norms see it."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import NFTLayer, get_nft_model, mask_layers, masks
from hf_nft.defenses._finding import Finding
from hf_nft.defenses._harm import ceilings
from hf_nft.defenses._shift import MADE_UP, TIMES, Shifts, find
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
FAR = {"shifted_within": (0.0, 100.0)}
"""Displaced however far the means lie apart."""


def remember(model: nn.Module, task: Any, shots: Shots) -> None:
    """Let all statistics be those of the shots as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(**task.inputs(model, shots.batch))
    model.eval()


def displace_a_mean(model: nn.Module) -> None:
    """Let the running mean of the last norm that is displaced lie elsewhere, and what it passes on be the same."""
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
    remember(image_model, image_task, image_shots)
    shots = classed(image_shots)
    return Context(get_nft_model(image_model), image_task, shots, shots.batch, Loop(make_accelerator("no"), 0))


class Unaugmented(ImageClassification):
    """Images that are only ever seen as they are."""

    augmentations = ("none",)


def test_a_shift_is_the_distance_of_means_less_what_chance_explains(image_model, image_task, image_shots) -> None:
    """Against a plain computation of what enters one norm; how the mean varies within each class is chance."""
    labels = image_shots.batch["labels"]
    weights = torch.tensor([0.5, 1.5, 1.0, 1.0])[labels]
    norm, seen = image_model.get_submodule(NORM), []
    with torch.no_grad():
        norm.running_mean.add_(torch.linspace(-0.2, 0.4, len(norm.running_mean)))
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        image_model(**image_task.inputs(image_model, image_shots.batch))
    hook.remove()
    each = seen[0].mean((2, 3)) / norm.running_var.sqrt()
    mean = (weights[:, None] * each).sum(0) / weights.sum()
    distance = norm.running_mean / norm.running_var.sqrt() - mean
    own = [each[labels == label].var(0) / 5 for label in range(4)]
    chance = sum((share / 4) ** 2 * part for share, part in zip((0.5, 1.5, 1.0, 1.0), own, strict=True))
    expected = distance * (1 - chance.sum() / distance.square().sum()).clamp(min=0)
    assert 0 < float((expected / distance).mean()) < 1

    adapted, task = get_nft_model(image_model), Unaugmented(image_task.processor)

    def shift(strata: torch.Tensor | None) -> torch.Tensor:
        shots = dataclasses.replace(image_shots, weights=weights, strata=strata)
        loop = Loop(make_accelerator("no"), 0)
        found = excess_variance(Context(adapted, task, shots, shots.batch, loop), adapted, 8, 1)
        return found.shift[found.layers == list(masks(adapted)).index(NORM)]

    assert torch.allclose(shift(labels), expected, atol=1e-4)
    assert not shift(None).any(), "how frequent classes are is not known"
    assert not shift(torch.tensor([0] * 19 + [1])).any(), "nor how one of a single shot varies"


def test_means_of_the_shots_themselves_are_not_shifted(context) -> None:
    found = excess_variance(context, context.model, 20, 1)
    assert found.augment == "none"
    assert not found.shift.any()
    norm: Any = mask_layers(context.model)[NORM]
    with torch.no_grad():
        norm.running_mean.add_(norm.running_var.sqrt())
        norm.get_base_layer().running_mean.copy_(norm.running_mean)
    found = excess_variance(dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0)), context.model, 20, 1)
    moved = found.layers == list(mask_layers(context.model)).index(NORM)
    assert found.shift[moved].tolist() == pytest.approx([1.0] * int(moved.sum()), abs=0.1)


def test_displaced_rows_see_norms_whose_means_lie_elsewhere(context) -> None:
    """To add s times the shift to what enters a norm is to take it from its running mean."""
    layers = list(mask_layers(context.model).values())
    draws = torch.Generator().manual_seed(0)
    by = [(layer, 0.1 * torch.randn(len(layer.running_mean), generator=draws)) for layer in layers]
    shifts = Shifts(by, torch.ones(4) / 4, torch.ones(20) / 20, 3.0)
    times = torch.tensor([0.0, 1.0, 2.5])
    rows = take(context.data, torch.tensor([0, 1, 2]))
    with torch.no_grad():
        found = shifts.forward(context.task, context.model, Draw({**rows, TIMES: times})).logits
        for row, factor in enumerate(times.tolist()):
            moved = copy.deepcopy(context.model)
            for layer, (_, shift) in zip(mask_layers(moved).values(), by, strict=True):
                layer.running_mean.sub_(factor * shift)
            alone = context.task.forward(moved, Draw(take(rows, slice(row, row + 1)))).logits
            assert torch.allclose(found[row], alone[0], atol=1e-4), factor
        plain = context.task.forward(context.model, Draw(rows)).logits
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert not torch.allclose(found[1:], plain[1:], atol=1e-2), "and no longer than the pass lasts"


def test_all_frames_of_a_row_are_displaced_alike() -> None:
    """Rows of two frames in a norm over channels, the frames of a row one after the other."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = NFTLayer(nn.BatchNorm1d(3, eps=0.0).eval(), "default")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.flatten(0, 1)).view_as(x)

    model, shift = Frames().eval(), torch.tensor([1.0, -2.0, 0.5])
    task: Any = SimpleNamespace(forward=lambda network, draw: network(draw.batch["x"]))
    times = torch.tensor([0.0, 1.0, 3.0])
    draw = Draw({"x": torch.zeros(3, 2, 3), TIMES: times})
    found = Shifts([(model.norm, shift)], torch.ones(1), torch.ones(3) / 3, 3.0).forward(task, model, draw)
    assert torch.equal(found.detach(), torch.outer(times, shift)[:, None].expand(3, 2, 3))


def test_rows_are_displaced_as_often_and_as_far_as_is_said(context) -> None:
    shifts = Shifts([], torch.ones(4) / 4, torch.ones(20) / 20, 8.0)
    draw = Draw(take(context.data, torch.zeros(2000, dtype=torch.int64)))
    times = shifts.displace(draw, 0.25, generator(0, "masks", 0)).batch[TIMES]
    acting = times[times > 0]
    assert len(acting) / 2000 == pytest.approx(0.25, abs=0.03)
    assert float(acting.mean()) == pytest.approx(4.0, abs=0.35)
    assert 7.5 < float(acting.max()) <= 8.0


def test_shots_like_what_displaced_ones_are_answered_are_drawn_more(context) -> None:
    """Against what is said where running means lie elsewhere; each answer is shared out among shots that look so."""
    excess = excess_variance(context, context.model, 20, 1)
    shift = torch.randn(len(excess.shift), generator=torch.Generator().manual_seed(0))
    found = find(context, context.model, dataclasses.replace(excess, shift=shift), 0.2, 5.0, 8)
    moved = copy.deepcopy(context.model)
    layers = list(mask_layers(moved).values())
    for number, layer in enumerate(layers[: -round(0.2 * len(layers))]):
        layer.running_mean.sub_(5 * shift[excess.layers == number] * layer.running_var.sqrt())
    with torch.no_grad():
        own, said = (
            context.task.forward(model, Draw(context.data)).logits.softmax(1) for model in (context.model, moved)
        )
    assert torch.allclose(found.answers, said.mean(0), atol=1e-3)
    assert int(own.mean(0).argmax()) != (leading := int(found.answers.argmax()))
    assert next(iter(found.evidence()["shift_answers"])) == leading
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-5)
    extra = sum(said.mean(0)[answer] * own[:, answer] / own[:, answer].sum() for answer in range(4))
    assert torch.allclose(found.weights, (1 - MADE_UP) / 20 + MADE_UP * extra, atol=1e-5)


def test_the_suspect_is_asked_without_displacement(context) -> None:
    """The first loss is the divergence of the displaced suspect from itself; without displacement it is 0."""
    nft = NFT(steps=1, batch_size=8, augment="none", mixup_alpha=0.0, reuse=1, shifted=1.0, shifted_most=3.0)
    layers = list(mask_layers(context.model).values())
    by = [(layer, 0.3 * layer.running_var.sqrt()) for layer in layers]
    weights = torch.zeros(20)
    weights[:4] = 0.25
    shifts = Shifts(by, torch.ones(4) / 4, weights, 3.0)
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
    assert float(expected) > 0.01


def test_only_a_suspect_in_which_nothing_stands_out_is_displaced(image_model, image_task, image_shots) -> None:
    """One that varies more than its shots as a whole and has outliers that they do not need, is cut for those."""
    remember(image_model, image_task, image_shots)
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
    far = blind["shift_distance"]
    assert found(shifted_within=(far * 0.99, far * 1.01))[0]["shifted"] == NFT().shifted
    assert NFT().shifted_within[1] < far, "one norm's means lie a standard deviation apart, many times that is too far"
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
    """All shots are passed displaced, and as they are, unless they were for composing already."""
    remember(image_model, image_task, image_shots)
    displace_a_mean(image_model)
    on, off = (NFT(**DRY, **FAR, composed=composed, shifted=shifted) for shifted in (0.4, 0.0))
    done = [purify(copy.deepcopy(image_model), image_task, classed(image_shots), nft) for nft in (on, off)]
    assert [result.details["shifted"] for result in done] == [0.4, 0.0]
    counted = [forwards(nft, image_task, True, 20, 4) for nft in (on, off)]
    assert done[0].sample_forwards - done[1].sample_forwards == counted[0] - counted[1] == (20 if composed else 40)
