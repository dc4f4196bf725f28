"""How far a cut may go, on a model whose answers are known."""

import dataclasses

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
    _, whole = harmless(context, model, "whole", always, line, 1e9, 8)
    assert list(whole) == list(range(0, 41, 2))
    for size in (0, 10, 40):
        expected = divergence(context, model, torch.cat([always, line[:size]]))
        assert whole[size] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    harm = sorted(whole.values())[10]
    first = next(size for size, value in whole.items() if value > harm)
    kept, curve = harmless(context, model, "part", always, line, harm, 8)
    assert max(curve) == first, "the first that is too much is the last that is tried"
    assert kept == max(size for size in curve if whole[size] <= harm)
    assert all(bool((mask == 1).all()) for mask in masks(model).values())


def test_nothing_more_is_cut_where_what_is_sure_is_too_much(adapted) -> None:
    context, model = adapted
    assert harmless(context, model, "none", NONE, NONE, 1.0, 8) == (0, {})
    assert context.loop.steps == 0
    kept, curve = harmless(context, model, "some", torch.arange(30), torch.arange(30, 40), 0.0, 8)
    assert (kept, list(curve)) == (0, [0])


def test_a_line_goes_on_where_the_one_before_ended(adapted) -> None:
    """Every unit of one layer scores high, and a few of another stand out: chosen as by hand, at no harm and at any."""
    context, model = adapted
    sizes = [mask.numel() for mask in masks(model).values()]
    layers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    noise = 0.01 * torch.special.ndtri(torch.linspace(0.01, 0.99, len(layers)))
    values = noise[torch.randperm(len(layers), generator=torch.Generator().manual_seed(0))]
    last = (layers == layers[-1]).nonzero()[:, 0]
    values[last] += 1.0
    firsts = [int((layers == layer).nonzero()[0]) for layer in (1, 3, 5)]
    values[firsts] = torch.tensor([0.5, 0.45, 0.4])
    excess = Excess(values, layers, 100)
    shares = ((0.02, 0.01), (0.5, 0.05), 0.25)
    sure, _ = choose(context, model, excess, *shares, 0.0, 8)
    large, within = excess.largest(0.02, 0.5, 0.25)
    assert set(sure.tolist()) == {*large[:within].tolist(), *excess.outliers(0.01).tolist()}
    again = dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0))
    whole, evidence = choose(again, model, excess, *shares, 1e9, 8)
    assert set(whole.tolist()) == {*large.tolist(), *excess.outliers(0.01).tolist(), *excess.further(0.05).tolist()}
    assert len(whole) == len(whole.unique())
    outliers, further = evidence["harm_of_outliers"], evidence["harm_of_large"]
    assert further[0] == pytest.approx(outliers[max(outliers)]), "the second line begins with what the first one cut"
    assert (evidence["cut_by_size"], evidence["cut_as_outliers"] >= len(excess.further(0.05))) == (len(large), True)
