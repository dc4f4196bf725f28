"""How far a cut may go, on a model whose answers are known."""

import dataclasses
from typing import Any

import pytest
import torch

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import get_nft_model, masks
from hf_nft.defenses._harm import ceilings, choose, harmless
from hf_nft.defenses._statistics import Excess
from hf_nft.defenses.base import Context
from hf_nft.loop import Loop

NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def adapted(image_model, image_task, image_shots):
    """Return a context and its model with masks."""
    loop = Loop(make_accelerator("no"), 0)
    context = Context(image_model, image_task, image_shots, image_shots.batch, loop)
    return context, get_nft_model(image_model)


def divergence(context: Context, model: torch.nn.Module, cut: torch.Tensor) -> float:
    """Mean over the shots of KL(suspect || cut), in one pass and plain torch."""
    inputs = context.task.inputs(model, context.shots.batch)
    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits.softmax(1)
        for name, ceiling in ceilings(model, cut).items():
            masks(model)[name].copy_(ceiling)
        after = model(**inputs).logits.softmax(1)
        for mask in masks(model).values():
            mask.fill_(1.0)
    return float((before * (before / after).log()).sum(1).mean())


def test_the_curve_is_the_divergence_and_the_cut_ends_where_it_is_too_much(adapted) -> None:
    context, model = adapted
    units = sum(mask.numel() for mask in masks(model).values())
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    always, line = order[:2], order[2:42]
    _, whole = harmless(context, model, always, line, 1e9, 8)
    assert list(whole) == list(range(0, 41, 2))
    for size in (0, 10, 40):
        expected = divergence(context, model, torch.cat([always, line[:size]]))
        assert whole[size] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    harm = sorted(whole.values())[10]
    first = next(size for size, value in whole.items() if value > harm)
    again = dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0))
    kept, curve = harmless(again, model, always, line, harm, 8)
    assert max(curve) == first, "the first that is too much is the last that is tried"
    assert kept == max(size for size in curve if whole[size] <= harm)
    assert all(bool((mask == 1).all()) for mask in masks(model).values())


def test_nothing_more_is_cut_where_what_is_sure_is_too_much(adapted) -> None:
    context, model = adapted
    assert harmless(context, model, NONE, NONE, 1.0, 8) == (0, {})
    assert context.loop.steps == 0
    kept, curve = harmless(context, model, torch.arange(30), torch.arange(30, 40), 0.0, 8)
    assert (kept, list(curve)) == (0, [0])


@pytest.mark.parametrize("shots", [49, 50])
def test_what_is_sure_is_cut_and_outliers_follow_as_far_as_enough_shots_allow(adapted, shots: int) -> None:
    """One layer scores high, five units of others stand out: chosen as by hand, at no harm and at any."""
    context, model = adapted
    sizes = [mask.numel() for mask in masks(model).values()]
    layers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = [0.01 * torch.special.ndtri(torch.linspace(0.01, 0.99, size)) for size in sizes]
    stream = torch.Generator().manual_seed(0)
    values = torch.cat([part[torch.randperm(len(part), generator=stream)] for part in noise])
    values[layers == layers[-1]] += 1.0
    far = [int((layers == layer).nonzero()[0]) for layer in range(5)]
    values[far] = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    excess, two = Excess(values, layers, shots), 2.2 / len(layers)
    sure = {*excess.largest(two).tolist(), *excess.outliers(two).tolist()}
    assert (len(sure), set(excess.largest(two).tolist()) & set(far)) == (4, set())
    whole = {*sure, *excess.further(0.5).tolist()}
    assert set(far) <= whole

    def chosen(harm: float) -> tuple[set[int], dict[str, Any]]:
        again = dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0))
        cut, told, _ = choose(again, model, excess, (two, two), 1e9, 0.5, harm, 8)
        assert len(cut) == len(cut.unique())
        return set(cut.tolist()), told

    cut, told = chosen(0.0)
    assert cut == (sure if shots == 50 else whole), "few shots have no say"
    assert (told["cut_by_size"], told["cut_as_outliers"], told["cut_further"]) == (2, 2, len(cut) - 4)
    cut, told = chosen(1e9)
    assert (cut, list(told["harm"])[-1]) == (whole, len(whole) - 4)


@pytest.mark.parametrize("needed", [False, True])
def test_what_clean_examples_need_is_not_cut_for_its_size(adapted, needed: bool) -> None:
    """The limit lies just above the harm of the largest units, or just below it."""
    context, model = adapted
    total = sum(mask.numel() for mask in masks(model).values())
    values = 0.001 * torch.special.ndtri(torch.linspace(0.01, 0.99, total))
    values[: total // 2] += 1.0
    excess = Excess(values, torch.zeros(total, dtype=torch.int64), 50)
    large = excess.largest(0.4)
    assert len(large) == round(0.4 * total)
    harm = divergence(context, model, large)
    assert harm > 0
    limit = harm * (0.9 if needed else 1.1)
    cut, told, doubts = choose(context, model, excess, (0.4, 0.0), limit, 0.0, 0.1, 8)
    assert set(cut.tolist()) == (set() if needed else set(large.tolist()))
    assert told["cut_by_size"] == len(cut)
    assert [code for code, _ in doubts] == ["needed-units"] * needed
    assert all(bool((mask == 1).all()) for mask in masks(model).values())


@pytest.mark.parametrize("shots", [49, 50])
@pytest.mark.parametrize("noticed", [False, True])
def test_what_is_in_doubt_is_not_cut_if_enough_shots_notice(adapted, shots: int, noticed: bool) -> None:
    """Two outliers, with one as far below: no more than chance. The limit lies just above their harm, or just below."""
    context, model = adapted
    total = sum(mask.numel() for mask in masks(model).values())
    values = 0.001 * torch.special.ndtri(torch.linspace(0.01, 0.99, total))
    values[:3] = torch.tensor([1.0, 1.0, -1.0])
    excess = Excess(values, torch.zeros(total, dtype=torch.int64), shots)
    few = excess.outliers(2.2 / total)
    assert set(few.tolist()) == {0, 1}
    assert dict(excess.doubts()).keys() == {"nothing-stands-out"}
    harm = divergence(context, model, few)
    assert harm > 0
    cut, told, _ = choose(context, model, excess, (0.0, 2.2 / total), 1e9, 0.0, harm * (0.9 if noticed else 1.1), 8)
    spared = noticed and shots == 50
    assert set(cut.tolist()) == (set() if spared else {0, 1})
    assert told["cut_as_outliers"] == len(cut)
