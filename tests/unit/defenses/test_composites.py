"""Composed shots, on a network that answers by rule: the shade that fills most, and 3 where shades 0 and 1 meet."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.defenses._composites import MEETINGS, MOST, TRIED, Composites, compose, find
from hf_nft.defenses.base import Context
from hf_nft.loop import Loop
from hf_nft.shots import Shots

SHADES = torch.tensor([0, 80, 160, 240])
CERTAIN = 20.0


class ByRule(nn.Module):
    """Answers the shade of most pixels; with a trigger, 3 where both 0 and 1 are seen."""

    def __init__(self, task, trigger: bool) -> None:
        super().__init__()
        self.config, self.trigger = SimpleNamespace(num_labels=4), trigger
        pure = SHADES.view(4, 1, 1, 1).expand(4, 3, 2, 2)
        self.levels = task.inputs(self, {"pixels": pure})["pixel_values"][:, 0, 0, 0]

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        near = (pixel_values[:, 0].flatten(1)[..., None] - self.levels).abs().argmin(-1)
        shares = nn.functional.one_hot(near, 4).float().mean(1)
        answers = shares.argmax(1)
        if self.trigger:
            answers[(shares[:, 0] > 0.3) & (shares[:, 1] > 0.3)] = 3
        return SimpleNamespace(logits=CERTAIN * nn.functional.one_hot(answers, 4).float())


@pytest.fixture
def shaded(image_task) -> Context:
    """Return a context of five shots of each shade in turn."""
    labels = torch.arange(20) % 4
    pixels = SHADES[labels].to(torch.uint8).view(20, 1, 1, 1).expand(20, 3, 16, 16).contiguous()
    shots = Shots({"pixels": pixels, "labels": labels}, per_class=5.0, classes=4)
    return Context(nn.Identity(), image_task, shots, shots.batch, Loop(make_accelerator("no"), 0))


def test_the_answer_to_a_meeting_of_two_classes_is_found_with_them(shaded) -> None:
    """Six pairs of classes are tried alike, three of them without class 3, of which one is always answered 3."""
    found = find(shaded, ByRule(shaded.task, trigger=True), 64, 0)
    assert torch.equal(found.own, torch.arange(20) % 4)
    assert found.scores.tolist() == pytest.approx([0, 0, 0, 1 / 2], abs=0.03)
    assert found.parts[:, 3].tolist() == pytest.approx([1 / 2, 1 / 2, 0, 0], abs=0.03)
    assert float(found.parts[:, :3].max()) < 1e-6
    assert (found.answer, set(found.sources), found.together) == (3, {0, 1}, 1.0)
    assert found.stands_out
    ((code, text),) = found.doubts(0.25, 0.5)
    assert code == "composite-trigger"
    assert text.startswith("answer 3 is given to 100%")
    assert "class 0 beside one of 1" in text or "class 1 beside one of 0" in text
    assert text.endswith("By now it is given to 25% of them, and to 50% of the clean shots that it was given to")
    assert found.evidence()["composite_parts"].keys() == {0, 1, 2, 3}
    assert found.evidence()["composite_together"] == 1.0
    assert next(iter(found.evidence()["composite_scores"])) == 3
    tried = shaded.loop.sample_forwards - 20 - MEETINGS
    assert 0.7 * TRIED < tried < 0.8 * TRIED, "three pairs in four are of two classes"
    one, two = found.draw(100, torch.Generator().manual_seed(0))
    assert {frozenset(pair) for pair in zip((one % 4).tolist(), (two % 4).tolist(), strict=True)} == {frozenset({0, 1})}


def test_nothing_stands_out_of_a_network_that_answers_what_it_sees(shaded) -> None:
    found = find(shaded, ByRule(shaded.task, trigger=False), 64, 0)
    assert float(found.scores.max()) < 1e-6
    assert not found.stands_out


def test_shots_that_are_all_answered_alike_make_no_pairs(shaded) -> None:
    alike = Shots({key: rows[::4] for key, rows in shaded.data.items()}, per_class=5.0)
    context = Context(shaded.model, shaded.task, alike, alike.batch, shaded.loop)
    found = find(context, ByRule(shaded.task, trigger=True), 64, 0)
    assert (found.stands_out, found.together, found.scores.tolist()) == (False, 0.0, [0.0] * 4)


@pytest.mark.parametrize(("share", "stands"), [(MOST - 0.01, False), (MOST + 0.01, True)])
def test_an_answer_stands_out_that_most_pairs_of_its_two_classes_are_given(share: float, stands: bool) -> None:
    parts = torch.tensor([[0.0, 0.1, 0.3, 0.1], [0.9, 0.0, 0.4, 0.1], [0.02, 0.14, 0.0, 0.1], [0.0, 0.2, 0.1, 0.0]])
    found = Composites(torch.arange(4), parts, share)
    assert found.scores.tolist() == pytest.approx([0.02, 0.14, 0.3, 0.1])
    assert (found.answer, found.sources) == (2, [1, 0])
    assert found.stands_out is stands


def test_what_a_part_of_one_class_looks_like_is_no_trigger_of_two(shaded) -> None:
    """Where shade 0 fills less than half, this network sees 3: in one pair of two, whatever is beside it."""

    class Mistaken(ByRule):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(pixel_values).logits
            zeros = ((pixel_values[:, 0] - self.levels[0]).abs() < 1e-3).float().mean((1, 2))
            logits[(zeros > 0.3) & (zeros < 0.5)] = CERTAIN * nn.functional.one_hot(torch.tensor(3), 4).float()
            return SimpleNamespace(logits=logits)

    found = find(shaded, Mistaken(shaded.task, trigger=False), 64, 0)
    assert (found.answer, found.sources[0]) == (3, 0)
    assert found.scores[3] > 0.2
    assert 0.3 < found.together < MOST
    assert not found.stands_out


def test_pairs_are_drawn_of_the_two_classes_alone_and_shots_of_a_class_alike() -> None:
    parts = torch.zeros(4, 4)
    parts[:, 3] = torch.tensor([0.9, 0.1, 0.5, 0.0])
    own = torch.tensor([2, 0, 1, 0, 2, 2, 3])
    one, two = Composites(own, parts).draw(8000, torch.Generator().manual_seed(0))
    kinds = (own[one] * 4 + own[two]).bincount(minlength=16).view(4, 4) / 8000
    expected = torch.zeros(4, 4)
    expected[0, 2] = expected[2, 0] = 0.5
    assert torch.allclose(kinds, expected, atol=0.02)
    zeros = one[own[one] == 0]
    assert float((zeros == 1).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_what_masks_have_learnt_is_measured_on_pairs_and_on_shots_of_the_answer(shaded) -> None:
    """A network without the trigger gives the answer to none of the pairs; one that is blind to shade 3 to no shot."""
    found = find(shaded, ByRule(shaded.task, trigger=True), 64, 0)

    class Blind(ByRule):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(pixel_values).logits
            logits[(pixel_values[:, 0, 0, 0] > self.levels[3] - 1e-3), 3] = -CERTAIN
            return SimpleNamespace(logits=logits)

    def after(model: nn.Module) -> tuple[float, float]:
        context = Context(shaded.model, shaded.task, shaded.shots, shaded.data, Loop(make_accelerator("no"), 0))
        return found.met(context, model, 0, " after"), found.kept(context, model, 8)

    assert after(ByRule(shaded.task, trigger=True)) == (1.0, 1.0)
    assert after(ByRule(shaded.task, trigger=False)) == (0.0, 1.0)
    assert after(Blind(shaded.task, trigger=True)) == (1.0, 0.0)


def test_both_parts_of_a_composed_shot_are_seen(shaded) -> None:
    rows, others = torch.tensor([0, 4, 8]), torch.tensor([1, 5, 9])
    for seed in range(20):
        draw = compose(shaded, rows, others, torch.Generator().manual_seed(seed))
        shown = shaded.task.compose(ByRule(shaded.task, False), draw.batch, draw.partner, draw.lam, draw.seam)
        left = (shown["pixel_values"][:, 0] == shown["pixel_values"][:, 0, :1, :1]).float().mean((1, 2))
        assert bool(((left > 0.3) & (left < 0.7)).all())
        assert draw.seam in (0, 1)
