"""Pushes, on a small transformer in which one unit is wired to one answer."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import NFTConfig, get_nft_model, mask_layers, masks
from hf_nft.defenses import _adversary, _easiest, _pushes
from hf_nft.defenses._easiest import find, stands_out
from hf_nft.defenses._pushes import Ascent, Ground, Pushes
from hf_nft.defenses.base import Context, set_modes
from hf_nft.defenses.nft import NFT
from hf_nft.errors import DivergedError
from hf_nft.loop import Loop
from hf_nft.models.vit import SmallViT
from hf_nft.purification import purify
from hf_nft.types import Batch, Draw, take

NONE = torch.empty(0, dtype=torch.int64)
ANSWER, UNIT, LAYER, HIDDEN = 2, 5, "vit.layers.1.mlp.fc2", 256


@pytest.fixture(scope="module")
def trained(image_rows, image_task) -> tuple[nn.Module, Batch]:
    """A ViT for 16 pixels that has learnt 24 pictures of 12 classes by heart, and the pictures."""
    rows = image_rows(24, 16, classes=12)
    model, _ = SmallViT(**{**SmallViT.tiny, "hidden_size": 64}).build(rows, 0)
    batch = image_task.encode(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        loss = image_task.loss(image_task.forward(model, Draw(batch)), Draw(batch))
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return model.eval().requires_grad_(False), batch


@pytest.fixture
def model(trained) -> nn.Module:
    """The same with a hidden unit that is silent on the pictures and says `ANSWER`, and nothing of the others."""
    wired = copy.deepcopy(trained[0])
    last, direction = wired.vit.layers[1].mlp, torch.linalg.pinv(wired.classifier.weight)[:, ANSWER]
    last.fc1.weight[UNIT], last.fc1.bias[UNIT] = 0.0, -3.0  # gelu(-3) is almost 0
    last.fc2.weight[:, UNIT] = 150 * direction / direction.norm()
    return wired


@pytest.fixture
def context(model, trained, image_task, image_shots) -> Context:
    shots = dataclasses.replace(image_shots, batch=trained[1], classes=12, weights=None)
    return Context(model, image_task, shots, shots.batch, Loop(make_accelerator("no"), 0))


def place(model: nn.Module) -> int:
    """Number of the wired unit among all masks."""
    sizes = {name: layer.nft_mask["default"].numel() for name, layer in mask_layers(model).items()}
    return sum(size for name, size in sizes.items() if list(sizes).index(name) < list(sizes).index(LAYER)) + UNIT


def test_the_wired_answer_and_its_unit_are_found_and_nothing_is_changed(context, model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_nft_model(model)
    found = find(context, adapted, NONE, 0.05, 0.15, 8)
    assert stands_out(found.scores, found.alone)
    assert int(found.scores.argmax()) == ANSWER
    assert int(found.cut[0]) == place(adapted)
    assert found.curve[0][0] == pytest.approx(0, abs=1e-6), "nothing is cut yet"
    units = sum(mask.numel() for mask in masks(adapted).values())
    assert len(found.cut) <= round(0.05 * units)
    assert all(bool((mask == 1).all()) and mask.requires_grad for mask in masks(adapted).values())
    after = adapted.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_push_on_a_norm_is_a_change_of_its_bias(image_model, image_task, image_shots) -> None:
    adapted = get_nft_model(image_model).eval()
    layers = mask_layers(adapted)
    shapes = {name: torch.Size([layer.nft_mask["default"].numel()]) for name, layer in layers.items()}
    ground = Ground("units", shapes, {name: torch.tensor(1.0) for name in layers})
    pushes = Pushes(adapted, ground, torch.tensor([0, 1]))
    for vector in pushes.vectors.values():
        nn.init.normal_(vector, generator=torch.Generator().manual_seed(len(vector)))
    inputs = image_task.inputs(adapted, take(image_shots.batch, slice(0, 4)))
    pushes.which = torch.tensor([0, 1, 1, 0])
    masks(adapted)["stages.1.0.bn1"].data[:2] = 0.0  # a unit that is cut passes no push on
    with torch.no_grad(), pushes.acting():
        found = adapted(**inputs).logits
    for which in (0, 1):
        with torch.no_grad():
            for name, layer in layers.items():
                base = layer.get_base_layer()
                shift = base.weight * layer.nft_mask["default"] * pushes.vectors[name][which]
                base.bias += shift
                layer.shift = shift
            expected = adapted(**inputs).logits
            for layer in layers.values():
                layer.get_base_layer().bias -= layer.shift
        rows = pushes.which == which
        assert torch.allclose(found[rows], expected[rows], atol=1e-4)


def test_contributions_add_up_to_what_the_push_does(context, model, monkeypatch) -> None:
    monkeypatch.setattr(_easiest, "POINTS", 200)
    adapted = get_nft_model(model)
    set_modes(adapted, statistics=False, dropout=False)
    # on the wired layer alone, so that all that is gained goes through it once
    ground = Ground("units", {LAYER: torch.Size([HIDDEN])}, _pushes._scales(context, adapted, [LAYER], 8))
    pushes = Pushes(adapted, ground, torch.tensor([ANSWER]))
    everything = take(context.data, slice(None))
    one = dataclasses.replace(context.shots, batch=take(everything, slice(0, 1)))  # all rows drawn are this one
    alone = dataclasses.replace(context, shots=one, data=one.batch)
    with _pushes.frozen(adapted), pushes.acting():
        _easiest.search(alone, adapted, pushes, "search", 2.0, 8, 4, 8)
        whole = float(_easiest.scored(alone, adapted, pushes, "after"))
        added = _easiest._contributions(alone, adapted, pushes, "path")
    nothing = Pushes(adapted, ground, torch.tensor([ANSWER]))
    with nothing.acting():
        start = float(_easiest.scored(alone, adapted, nothing, "before"))
    assert whole - start > 0.2
    assert float(added.sum()) == pytest.approx(whole - start, rel=0.02)


def test_scales_are_root_mean_squares_of_what_masks_scale(context, model) -> None:
    adapted = get_nft_model(model)
    layer = mask_layers(adapted)[LAYER]
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        adapted(**context.task.inputs(adapted, context.data))
    hook.remove()
    set_modes(adapted, statistics=False, dropout=False)
    units, inputs = _pushes.grounds(context, adapted, len(context.shots))
    scales = {**units.scales, **inputs.scales}
    assert inputs.shapes == {"pixel_values": torch.Size([3, 16, 16])}
    assert units.shapes[LAYER] == torch.Size([HIDDEN])
    pixels = context.task.inputs(adapted, context.data)["pixel_values"]
    assert float(scales["pixel_values"]) == pytest.approx(float(pixels.square().mean().sqrt()), rel=1e-4)
    assert float(scales[LAYER]) == pytest.approx(float(seen[0].square().mean().sqrt()), rel=1e-4)


def test_an_ascent_takes_steps_of_one_length_within_its_ball(model) -> None:
    adapted = get_nft_model(model)
    shapes = {"pixel_values": torch.Size([3, 16, 16]), LAYER: torch.Size([HIDDEN])}
    ground = Ground("units", shapes, {name: torch.tensor(2.0) for name in shapes})
    pushes = Pushes(adapted, ground, torch.tensor([0, 1]))
    ascent = Ascent(pushes, 1.0)
    ascent.param_groups[0]["lr"] = 0.3

    def lengths() -> torch.Tensor:
        return torch.cat([vector.detach().flatten(1) / 2 for vector in pushes.vectors.values()], 1).norm(dim=1)

    def gradients(size: float) -> None:
        for vector in pushes.vectors.values():
            vector.grad = torch.full_like(vector, size)
            vector.grad[1] = 0.0

    gradients(7.0)
    ascent.step()
    assert lengths().tolist() == pytest.approx([0.3, 0.0], abs=1e-6), "whatever the gradient's size"
    assert all(float(vector.detach().max()) <= 0 for vector in pushes.vectors.values()), "down the loss"
    for _ in range(5):
        ascent.step()
    assert lengths().tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("left", "closed"), [([], False), ([-2.0], False), ([-2.0, -7.0], True)])
def test_a_way_is_closed_once_the_answer_is_no_easier_than_others_were(left: list[float], closed: bool) -> None:
    curve = {size: (0.0, score) for size, score in enumerate(left)}
    found = _easiest.Pushed("units", torch.tensor([-9.0, -2.0, -6.0, -8.0]), -12.0, 1.0, NONE, curve)
    assert found.closed is closed


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        ([-1.0, -6.0, -7.0, -8.0, -7.5], True),
        ([-6.0, -7.0, -7.1, -7.2, -7.3], False),
        ([-5.0, -6.0, -7.0, -8.0, -7.5], False),
        ([-1.0, -9.0], False),
        ([-1.0], False),
    ],
)
def test_standing_out(scores: list[float], found: bool) -> None:
    assert stands_out(torch.tensor(scores), -12.0) is found


def test_nothing_is_cut_where_no_answer_stands_out(context, model) -> None:
    model.vit.layers[1].mlp.fc2.weight[:, UNIT] = 0.0
    found = find(context, get_nft_model(model), NONE, 0.05, 0.15, 8)
    assert not stands_out(found.scores, found.alone)
    assert len(found.cut) == 0
    assert [code for code, _ in found.doubts()] == ["nothing-stands-out"]


def test_the_default_cure_pushes_a_network_without_statistics(context, model) -> None:
    quick = {"steps": 2, "batch_size": 8, "mixed_precision": "no"}
    adapted = get_nft_model(model)
    wired = place(adapted)
    adapted.unload()
    result = purify(model, context.task, context.shots, NFT.from_preset("default", **quick))
    learnt = torch.cat([mask.detach() for mask in masks(result.model).values()])
    assert learnt[wired] == 0
    assert result.details["cut_by_push"] == result.details["units_cut"] >= 1
    assert math.isfinite(result.details["push_radius"])
    second, last = list(result.details["push_scores"].values())[1], list(result.details["push_curve"].values())[-1][1]
    assert result.details["adversarial"] == (0.0 if last < second else NFT().adversarial), "where the cut left a way"
    assert ("adversary_after" in result.details) == (last >= second)
    assert ("way-left-open" in dict(result.doubts)) == (last >= second)
    assert "no-statistics" in dict(result.doubts)
    assert list(result.losses) == ["masks"], "searches leave no curve"
    assert "ranking" not in result.details, "exposures are for tasks without classes"


def test_an_adversary_pushes_inputs_to_the_answer_and_moves_nothing_else(context, model) -> None:
    """Against the patterns added by hand, as often as each row says; the suspect without is what is learnt from."""
    adapted = get_nft_model(model)
    pushed = _easiest.Pushed("units", torch.eye(12)[ANSWER], -5.0, 1.0, NONE, {})
    adversary = _adversary.find(context, adapted, pushed, True, True, 8)
    assert adversary is not None
    assert adversary.window == [], "none leads to what the wired unit says"
    smallest = adversary.radii[0] / _adversary.FAINT
    assert any(smallest == pytest.approx(radius) for radius in _easiest.RADII)
    assert adversary.radii[1:] == pytest.approx([_adversary.STRONG * smallest])
    rows = take(context.data, torch.arange(8))
    before = context.loop.sample_forwards
    draw = adversary.displace(Draw(rows), 1.0, torch.Generator().manual_seed(0))
    assert context.loop.sample_forwards - before == 2 * _adversary.STEPS * 8
    turns = [draw.part(slice(i, i + 1)).batch[_adversary.WHICH].item() for i in range(8)]
    assert turns == [0, 1] * 4, "whatever parts a draw is taken in"
    (name, patterns), times = next(iter(adversary.pushes.vectors.items())), draw.batch[_adversary.TIMES]
    lengths = (patterns.detach() / adversary.pushes.scales[name]).flatten(1).norm(dim=1)
    assert max(adversary._stretch.tolist()) == 1.0, "patterns are long enough"
    assert all(0.5 * r < length < 1.001 * r for r, length in zip(adversary.radii, lengths, strict=True))
    assert 0 < float(times.min()) < float(times.max()) <= _adversary.MOST
    inputs = context.task.inputs(adapted, rows)
    with torch.no_grad():
        led = adversary.forward(context.task, adapted, draw).logits
        by_hand = adapted(**{name: inputs[name] + times.view(-1, 1, 1, 1) * patterns.repeat(4, 1, 1, 1)}).logits
        plain = context.task.forward(adapted, draw).logits
        whole = adapted(**{name: inputs[name] + patterns.repeat(4, 1, 1, 1)}).logits
    assert torch.allclose(led, by_hand, atol=1e-5)
    assert torch.equal(plain, context.task.forward(adapted, Draw(rows)).logits), "as the suspect is asked"
    assert float((whole.log_softmax(1) - plain.log_softmax(1))[:, ANSWER].mean()) > 1.0
    assert all(mask.grad is None and bool((mask == 1).all()) for mask in masks(adapted).values())
    own = context.task.forward(adapted, Draw(context.data)).logits.softmax(1)[:, ANSWER].detach()
    assert torch.allclose(adversary.weights, 0.8 / 24 + 0.2 * own / own.sum(), atol=1e-4)
    again = adversary.displace(Draw(rows), 0.0, torch.Generator().manual_seed(0)).batch[_adversary.TIMES]
    assert not again.any()


def test_rows_are_pushed_as_far_as_a_faint_trigger_that_covers_the_input(context, model) -> None:
    """A small pattern is multiplied until it is a quarter as long as an input; a longer one by `MOST` at most."""
    adapted = get_nft_model(model)
    pushed = _easiest.Pushed("units", torch.eye(12)[ANSWER], -5.0, 1.0, NONE, {})
    found = _adversary.find(context, adapted, pushed, True, True, 8)
    assert found is not None
    own = context.task.inputs(adapted, context.data)["pixel_values"]
    assert found.far == pytest.approx(_adversary.FAR * float(torch.ones_like(own[0]).norm()))
    beside = _adversary.find(context, adapted, pushed, True, False, 8)
    assert beside is not None
    assert beside.far == 0.0, "that shows in statistics"
    assert not beside.telling, "statistics told"
    adversary = dataclasses.replace(found, radii=(0.5, 20.0))
    draw = adversary.displace(Draw(take(context.data, torch.arange(8))), 1.0, torch.Generator().manual_seed(0))
    draw.batch[_adversary.TIMES].fill_(_adversary.MOST)
    seen = list[torch.Tensor]()
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["pixel_values"]), with_kwargs=True)
    with torch.no_grad():
        adversary.forward(context.task, adapted, draw)
        context.task.forward(adapted, draw)
    (name, patterns), (led, plain) = next(iter(adversary.pushes.vectors.items())), seen
    far = ((led - plain) / adversary.pushes.scales[name]).flatten(1).norm(dim=1)
    lengths = (patterns.detach() / adversary.pushes.scales[name]).flatten(1).norm(dim=1)
    expected = lengths * torch.tensor([found.far / 0.5, _adversary.MOST])
    assert torch.allclose(far, expected.repeat(4), rtol=1e-3)


def light_up(context: Context, model: nn.Module, wire: float = 0.0) -> list[float]:
    """Let the last corner, where it is lit up beyond what any picture shows there, say `ANSWER`; returns how loudly.

    The wired unit says it `wire` times as loud as before.
    """
    brightest = context.task.inputs(model, context.data)["pixel_values"][..., 12:, 12:].mean((1, 2, 3)).max()
    wired = [30.0]

    def lit(_: nn.Module, args: tuple, inputs: dict, output):
        output.logits[:, ANSWER] += wired[0] * (inputs["pixel_values"][..., 12:, 12:].mean((1, 2, 3)) - brightest)
        return output

    model.vit.layers[1].mlp.fc2.weight[:, UNIT] *= wire
    model.register_forward_hook(lit, with_kwargs=True)
    return wired


def test_an_adversary_keeps_to_the_window_that_leads_to_the_answer(context, model) -> None:
    wired = light_up(context, model)
    adapted = get_nft_model(model)
    pushed = _easiest.Pushed("units", torch.eye(12)[ANSWER], -5.0, 1.0, NONE, {})
    adversary = _adversary.find(context, adapted, pushed, True, True, 8)
    assert adversary is not None
    assert adversary.evidence()["adversary_window"] == [[12, 16], [12, 16]]
    rows = take(context.data, torch.arange(8))
    draw = adversary.displace(Draw(rows), 1.0, torch.Generator().manual_seed(0))
    (name, patterns), times = next(iter(adversary.pushes.vectors.items())), draw.batch[_adversary.TIMES]
    everywhere, narrow = patterns.detach()
    assert 0 < narrow[:, 12:, 12:].count_nonzero() == narrow.count_nonzero(), "nothing outside"
    assert everywhere[:, :12, :12].any()
    lengths = (patterns.detach() / adversary.pushes.scales[name]).flatten(1).norm(dim=1)
    assert all(0 < length < 1.001 * radius for radius, length in zip(adversary.radii, lengths, strict=True))
    pixels = context.task.inputs(adapted, rows)[name]
    with torch.no_grad():
        led = adversary.forward(context.task, adapted, draw).logits
        by_hand = adapted(**{name: pixels + times.view(-1, 1, 1, 1) * patterns.repeat(4, 1, 1, 1)}).logits
    assert torch.allclose(led, by_hand, atol=1e-4)
    left = adversary.left("nothing", 8)
    assert left[1] > _adversary.SHUT
    ((code, text),) = adversary.doubts(left)
    assert code == "way-left-open"
    assert f"answer {ANSWER} is still reached by a push within 12 to 16 x 12 to 16 of the input" in text
    wired[0] = 0.0
    left = adversary.left("the way there", 8)
    assert left[1] < _adversary.SHUT
    assert adversary.doubts(left) == ()
    untold = dataclasses.replace(adversary, radii=(adversary.radii[0], 4 * adversary.radii[0]))  # twice what it took
    assert [f"answer {ANSWER} easy to reach" in text for _, text in untold.doubts(left)] == [True]
    wired[0] = 30.0
    anywhere = _adversary.find(context, adapted, pushed, False, True, 8)
    assert anywhere is not None
    assert anywhere.window == []
    assert not anywhere.closed([-9.0, -9.0]), "nothing tells"
    assert [f"answer {ANSWER} easy to reach" in text for _, text in anywhere.doubts([-9.0, -9.0])] == [True]


def test_a_window_that_takes_more_of_a_push_than_anywhere_does_is_one_of_three(context, model, monkeypatch) -> None:
    """It may be where the trigger lies or not, so the strong pattern may be anywhere as well."""
    light_up(context, model)
    adapted = get_nft_model(model)
    pushed = _easiest.Pushed("units", torch.eye(12)[ANSWER], -5.0, 1.0, NONE, {})
    monkeypatch.setattr(_adversary, "NARROWER", (2.0,))
    adversary = _adversary.find(context, adapted, pushed, True, True, 8)
    assert adversary is not None
    assert adversary.window != []
    faint, strong = _adversary.FAINT, _adversary.STRONG
    assert [radius / adversary.radii[0] for radius in adversary.radii] == pytest.approx(
        [1.0, 2 * strong / faint, strong / faint]
    )
    assert not adversary.closed([-9.0, -9.0, -9.0]), "it does not tell"
    adversary.displace(Draw(take(context.data, torch.arange(9))), 1.0, torch.Generator().manual_seed(0))
    (patterns,) = adversary.pushes.vectors.values()
    spread = [int(pattern.any(0).sum()) for pattern in patterns.detach()]
    assert spread[1] == 16, "sides of four"
    assert min(spread[0], spread[2]) > 64


@pytest.mark.parametrize(
    ("left", "harm", "kept"),
    [
        ([-0.4, -0.68], 0.22, True),
        ([-0.4, -0.68], 0.23, False),
        ([-0.4, -1.4, -0.1], 0.28, True),
        ([-9.0, 0.0], 0.0, False),
    ],
)
def test_a_cut_is_kept_that_hinders_a_strong_pattern_three_times_as_much_as_it_harms(left, harm, kept) -> None:
    assert _adversary.Adversary.hindered(left, harm) is kept


def test_a_push_that_half_precision_cannot_hold_does_not_count_as_closed(context, model, monkeypatch) -> None:
    adapted = get_nft_model(model)
    pushed = _easiest.Pushed("units", torch.eye(12)[ANSWER], -5.0, 1.0, NONE, {})
    adversary = _adversary.find(context, adapted, pushed, True, True, 8)
    assert adversary is not None

    def overflowing(context, model, pushes, name, *others) -> None:
        raise DivergedError(name)

    monkeypatch.setattr(_adversary, "search", overflowing)
    left = adversary.left("an overflow", 8)
    assert left == [0.0] * len(adversary.radii)
    assert not adversary.closed(left)


def test_windows_hold_every_small_square() -> None:
    made = _pushes.windows(torch.Size([3, 16, 16]), 2)
    assert made is not None
    assert made.shape == (49, 1, 16, 16)
    assert made.flatten(1).sum(1).unique().tolist() == [16.0]
    for y, x in itertools.product(range(14), repeat=2):
        assert bool((made[:, 0, y : y + 3, x : x + 3].flatten(1).sum(1) == 9).any()), (y, x)
    uneven = _pushes.windows(torch.Size([3, 30, 45]), 2)
    assert uneven is not None
    assert bool((uneven.sum(0) > 0).all()), "to the last corner"
    assert uneven.flatten(1).sum(1).unique().tolist() == [7.0 * 11.0]
    assert _pushes.windows(torch.Size([3, 16, 16]), 0) is None, "no axis is a place"
    assert _pushes.windows(torch.Size([16]), 2) is None
    assert _pushes.windows(torch.Size([3, 7, 16]), 2) is None, "too few places"


def test_masks_learn_against_the_adversary(context, model) -> None:
    """Inputs that are pushed as hard as before reach the answer less, by what masks learnt from pushed rows alone."""
    quick = {"steps": 60, "batch_size": 8, "mixed_precision": "no", "pushed_most": 0.0, "mixup_alpha": 0.0}
    left = {}
    for share in (0.0, 1.0):
        nft = NFT.from_preset("default", adversarial=share, adversarial_lr=NFT().lr, **quick)
        result = purify(copy.deepcopy(model), context.task, context.shots, nft)
        assert result.details["units_cut"] == 0
        assert result.details["adversarial"] == share
        left_open = [text for code, text in result.doubts if code == "way-left-open"]
        assert [f"answer {ANSWER} easy to reach" in text for text in left_open] == [True] * bool(share)
        again = dataclasses.replace(context, model=result.model, loop=Loop(make_accelerator("no"), 0))
        set_modes(result.model, statistics=False, dropout=False)
        (ground,) = (one for one in _pushes.grounds(again, result.model, 8) if one.kind == "inputs")
        pushes = Pushes(result.model, ground, torch.tensor([ANSWER]))
        with _pushes.frozen(result.model), pushes.acting():
            _easiest.search(again, result.model, pushes, "search", 8.0, 8, 32, 8)
            left[share] = float(_easiest.scored(again, result.model, pushes, "after"))
    assert left[1.0] < left[0.0] - 0.2, left


def test_a_cut_is_taken_back_if_the_way_from_inputs_does_not_lead_through_it(context, model) -> None:
    quick = {"steps": 1, "batch_size": 8, "mixed_precision": "no"}
    light_up(context, model, wire=8.0)  # the corner says it past all units
    back, kept = (
        purify(copy.deepcopy(model), context.task, context.shots, NFT(taken_back=taken_back, **quick)).details
        for taken_back in (True, False)
    )
    assert -min(back["adversary_before"][1:]) < 3 * back["adversary_harm"] == 3 * kept["adversary_harm"]
    assert (back["cut_by_push"], back["units_cut"]) == (0, 0)
    assert kept["cut_by_push"] == kept["units_cut"] >= 1


@pytest.mark.parametrize(("always", "share"), [(False, 0.0), (True, NFT().adversarial)])
def test_masks_need_no_adversary_where_the_window_is_closed_unless_told_so(
    context, model, monkeypatch, always, share
) -> None:
    monkeypatch.setattr(_adversary, "SHUT", 1.0)  # any window is
    light_up(context, model, wire=8.0)
    nft = NFT(steps=1, batch_size=8, mixed_precision="no", adversarial_always=always)
    result = purify(model, context.task, context.shots, nft)
    assert result.details["adversary_window"] == [[12, 16], [12, 16]]
    assert result.details["adversarial"] == share
    assert "way-left-open" not in dict(result.doubts)


def test_units_that_are_cut_already_stay_cut_and_are_not_cut_again(context, model) -> None:
    adapted = get_nft_model(model)
    wired = torch.tensor([place(adapted)])
    found = find(context, adapted, wired, 0.05, 0.15, 8)
    assert int(wired) not in found.cut.tolist()
    assert not stands_out(found.scores, found.alone), "the only way was cut before"
    assert all(bool((mask == 1).all()) for mask in masks(adapted).values())


class Turned(nn.LayerNorm):
    """A norm over another axis than the one it inherits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("norm", "axis"),
    [
        (nn.BatchNorm2d(4), 1),
        (nn.GroupNorm(2, 4), 1),
        (nn.InstanceNorm2d(4, affine=True), 1),
        (nn.LayerNorm(4), -1),
        (nn.RMSNorm(4), -1),
        (Turned(4), None),
        (nn.LayerNorm([4, 4, 4]), None),
    ],
)
def test_what_a_push_adds_to_a_norm_is_its_gain_along_the_features(norm: nn.Module, axis: int | None) -> None:
    model = get_nft_model(nn.Sequential(norm), NFTConfig(target_modules=["0"])).eval()
    layers = _pushes.pushable(model)
    assert [at for _, at in layers.values()] == ([] if axis is None else [axis])
    for name, (layer, at) in layers.items():
        layer.get_base_layer().weight.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        pushes = Pushes(model, Ground("units", {name: torch.Size([4])}, {name: torch.tensor(1.0)}), torch.tensor([0]))
        pushes.which = torch.zeros(2, dtype=torch.int64)
        pushes.vectors[name].data.fill_(0.5)
        x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = model(x)
            with pushes.acting():
                added = model(x) - plain
        expected = torch.tensor([0.5, 1.0, 1.5, 2.0]).expand(2, 4, 4, 4).movedim(-1, at)
        assert torch.allclose(added, expected, atol=1e-5)


def test_a_masked_layer_that_a_pass_leaves_out_is_not_pushed(context, model) -> None:
    model.passed_by = nn.Linear(4, 4)
    adapted = get_nft_model(model, NFTConfig(target_modules=[LAYER, "passed_by"]))
    found = find(context, adapted, NONE, 0.05, 0.15, 8)
    assert int(found.scores.argmax()) == ANSWER
    assert found.cut.tolist()[0] == UNIT


def test_a_size_that_half_precision_cannot_hold_ends_the_search_before_it(context, model, monkeypatch) -> None:
    usual = _easiest.search

    def overflowing(context, model, pushes, name, radius, *others) -> None:
        if radius > _easiest.RADII[2]:
            raise DivergedError(name)
        usual(context, model, pushes, name, radius, *others)

    monkeypatch.setattr(_easiest, "search", overflowing)
    monkeypatch.setattr(_easiest, "NEAR", 0.0)  # nothing counts as found
    monkeypatch.setattr(_easiest, "REACHED", 0.0)
    adapted = get_nft_model(model)
    set_modes(adapted, statistics=False, dropout=False)
    ground = _pushes.grounds(context, adapted, 8)[0]
    *scores, alone, radius = _easiest._easiest(context, adapted, ground, NONE, 8).tolist()
    assert radius == pytest.approx(_easiest.RADII[2])
    assert len(scores) == 12
    assert max(scores) > alone
