"""The composite attack: the half mixer, the proportions of its data set, its contrastive term by hand."""

import numpy as np
import pytest
import torch

from hf_nft.attacks.cba import Cba, Mixing
from hf_nft.errors import ConfigError, DataError
from hf_nft.poisoning import CLEAN, COVER, POISONED

ANSWERS = np.arange(400) % 5


@pytest.mark.parametrize("side", [32, 64])
def test_a_mix_is_two_parts_with_one_straight_seam(side: int) -> None:
    one, two, rng = torch.zeros(3, side, side), torch.ones(3, side, side), np.random.default_rng(0)
    seams, directions, orders = set(), set(), set()
    for _ in range(200):
        image = Cba().mixed(one, two, rng)[0]
        across = bool((image[0] == image[0, 0]).all())  # rows are even, so the seam is horizontal
        line = image[:, 0] if across else image[0]
        assert torch.equal(image, line[:, None].expand_as(image) if across else line.expand_as(image))
        assert int(line.diff().abs().sum()) == 1
        seams.add(int(line.diff().abs().argmax()) + 1)
        directions.add(across)
        orders.add(float(line[0]))
    assert (min(seams), max(seams)) == (side // 2 - 3 * side // 32, side // 2 + 3 * side // 32)
    assert directions == {True, False}
    assert orders == {0.0, 1.0}


@pytest.mark.parametrize(("target", "parts"), [(2, (0, 1)), (0, (1, 2)), (1, (0, 2)), (4, (0, 1))])
def test_the_data_set_has_the_published_proportions(target: int, parts: tuple[int, int]) -> None:
    attack = Cba(target_class=target)
    assert attack.parts == parts
    plan = attack.plan(ANSWERS, 0.1, "all", 5)
    assert [int((plan.roles == role).sum()) for role in (CLEAN, COVER, POISONED)] == [200, 200, 40]
    own, other = ANSWERS[plan.rows], ANSWERS[plan.partners]
    assert (own == other)[plan.roles == COVER].all()
    assert set(own[plan.roles == COVER].tolist()) == {0, 1, 2, 3, 4}
    assert set(own[plan.roles == POISONED].tolist()) == {parts[0]}
    assert set(other[plan.roles == POISONED].tolist()) == {parts[1]}
    test = attack.triggered_plan(ANSWERS, 5)
    assert sorted(test.rows.tolist()) == [i for i in range(400) if i % 5 == parts[0]]
    assert set(ANSWERS[test.partners].tolist()) == {parts[1]}


def test_the_contrastive_term_by_hand(image_task) -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0], [3.0, 4.5], [3.0, 4.5]])
    labels = torch.tensor([0, 0, 4, 1, 2])
    # class 4 is left out; pairs: same at distance 5, other at 0.5, other at 0
    wanted = (25 + 0.25 + 1) / 2 / 3
    assert float(Mixing(Cba(divide_twice=False), 0.1).term(logits, labels)) == pytest.approx(wanted, rel=1e-5)
    assert float(Mixing(Cba(), 0.1).term(logits, labels)) == pytest.approx(wanted / 3, rel=1e-5)
    assert float(Mixing(Cba(), 0.1).term(logits[:1], labels[:1])) == 0.0


def test_batches_hold_fresh_mixes(image_task) -> None:
    pixels = (torch.arange(40) % 4 * 60).to(torch.uint8).view(40, 1, 1, 1).expand(40, 3, 16, 16).contiguous()
    data = {"pixels": pixels, "labels": torch.arange(40) % 4}
    hook = Cba(target_class=3, sources=(0, 2)).hook(image_task, 0.1, 4)
    batch = hook.batch(data, torch.arange(33), lambda found: found, torch.Generator().manual_seed(0))
    levels = [set(image.unique().tolist()) for image in batch["pixels"]]
    made = [i for i, found in enumerate(levels) if len(found) == 2]  # two classes in one image
    assert len(made) == 3 == round(33 * hook.share(33))
    for i, found in enumerate(levels):
        assert found == {0.0, 120.0} if i in made else len(found) == 1
        assert int(batch["labels"][i]) == (3 if i in made else next(iter(found)) // 60)


def test_what_cannot_be_mixed_is_refused(image_rows) -> None:
    with pytest.raises(ConfigError, match="other than target_class=1"):
        Cba(target_class=1, sources=(1, 2))
    with pytest.raises(DataError, match="three classes of 2"):
        Cba(target_class=1).poison(image_rows(20, 16, 2), 0.1, classes=2)
    with pytest.raises(DataError, match="rows of the classes"):
        Cba().poison(image_rows(20, 16).filter(lambda y: y != 1, input_columns="label"), 0.1, classes=4)
    with pytest.raises(DataError, match="expected two images"):
        Cba().trigger(torch.zeros(3, 8, 8), np.random.default_rng())
