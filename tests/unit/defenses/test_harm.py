"""How far a cut may go, on a model whose answers are known."""

import dataclasses

import pytest
import torch

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import get_nft_model, masks
from hf_nft.defenses._harm import ceilings, harmless
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


def test_the_curve_is_the_divergence_and_the_cut_ends_where_it_grew_too_much(adapted) -> None:
    context, model = adapted
    units = sum(mask.numel() for mask in masks(model).values())
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    always, ranked = order[:2], order[2:42]
    _, whole = harmless(context, model, (always, ranked), 0, 1e9, 8)
    assert list(whole) == list(range(0, 41, 2))
    for size in (0, 10, 40):
        expected = divergence(context, model, torch.cat([always, ranked[:size]]))
        assert whole[size] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    grown = {size: value - whole[0] for size, value in whole.items()}
    harm = sorted(grown.values())[10]
    first = next(size for size, value in grown.items() if value > harm)
    again = dataclasses.replace(context, loop=Loop(make_accelerator("no"), 0))
    kept, curve = harmless(again, model, (always, ranked), 0, harm, 8)
    assert max(curve) == first, "the first that is too much is the last that is tried"
    assert kept == max(size for size in curve if grown[size] <= harm)
    assert all(bool((mask == 1).all()) for mask in masks(model).values())


def test_what_is_sure_is_cut_whatever_the_harm(adapted) -> None:
    context, model = adapted
    ranked = torch.arange(30)
    assert harmless(context, model, (NONE, ranked), 30, 0.0, 8) == (30, {})
    assert context.loop.steps == 0
    kept, curve = harmless(context, model, (NONE, ranked), 20, 0.0, 8)
    assert kept >= 20
    assert set(curve) - {0, 20} <= set(range(21, 31))
