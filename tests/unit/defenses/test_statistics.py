"""Excess variance: planted in a network's own statistics it is found; chance is not."""

import copy
import dataclasses

import pytest
import torch

from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import get_nft_model, masks
from hf_nft.defenses._statistics import FURTHER, OUTLIER, Excess, excess_variance
from hf_nft.defenses.base import Context
from hf_nft.defenses.nft import NFT
from hf_nft.loop import Loop
from hf_nft.purification import PurifyResult, purify
from hf_nft.shots import Shots
from hf_nft.tasks.image_classification import ImageClassification
from hf_nft.types import take

NORM = "stages.1.0.bn2"


class Unaugmented(ImageClassification):
    """Images that are only ever seen as they are."""

    augmentations = ("none",)


@pytest.fixture
def plain_task(image_task) -> Unaugmented:
    return Unaugmented(image_task.processor)


def excess(model, task, shots, passes: int = 1) -> tuple[Excess, list[str]]:
    loop = Loop(make_accelerator("no"), 0)
    adapted = get_nft_model(model)
    found = excess_variance(Context(model, task, shots, shots.batch, loop), adapted, 8, passes)
    kinds = len(set(task.augmentations) - {"none"})
    assert loop.sample_forwards == (passes * kinds + 1) * len(shots)  # under each, and once as they are
    return found, list(masks(adapted))


def test_scores_are_the_share_of_variance_that_shots_leave_unexplained(image_model, plain_task, image_shots) -> None:
    """Against a plain computation of one layer's input variance, over all rows at once."""
    norm = image_model.get_submodule(NORM)
    with torch.no_grad():
        norm.weight.mul_(torch.linspace(0.5, 1.5, len(norm.weight)))
        norm.running_var.mul_(torch.linspace(0.5, 4.0, len(norm.weight)))
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        image_model(**plain_task.inputs(image_model, image_shots.batch))
    hook.remove()
    (x,) = seen
    between = x.mean((2, 3)).var(0, unbiased=False) / (len(x) - 1)
    variance = x.var((0, 2, 3), unbiased=False) + between
    expected = norm.weight.detach() ** 2 * (norm.running_var - variance) / norm.running_var
    found, names = excess(image_model, plain_task, image_shots)
    own = found.scores[found.layers == names.index(NORM)]
    assert torch.allclose(own, expected, atol=1e-4)


def test_the_variance_of_few_shots_is_not_too_small(image_model, plain_task, image_shots) -> None:
    """Two shots, many pairs: the mean of the corrected variance is that over all shots."""

    def score(rows: list[int]) -> torch.Tensor:
        part = Shots(take(image_shots.batch, torch.tensor(rows)), per_class=1)
        found, names = excess(copy.deepcopy(image_model), plain_task, part)
        return found.scores[found.layers == names.index(NORM)]

    pairs = torch.stack([score([i, j]) for i in range(6) for j in range(i)]).mean(0)
    assert torch.allclose(pairs, score(list(range(6))), atol=2e-3)


def test_a_dead_channel_leaves_nothing_unexplained(image_model, plain_task, image_shots) -> None:
    """It varies neither in training nor on the shots, so its gain says nothing."""
    with torch.no_grad():
        image_model.get_submodule("stages.1.0.conv1").weight[3] = 0.0
        norm = image_model.get_submodule("stages.1.0.bn2")
        norm.running_mean[3] = norm.running_var[3] = 0.0
        norm.weight[3] = 5.0
    found, names = excess(image_model, plain_task, image_shots)
    assert float(found.scores[found.layers == names.index(NORM)][3]) == 0.0


def test_shots_of_frequent_classes_count_more(image_model, plain_task, image_shots) -> None:
    """Against variances over rows that are there as often as they weigh; 20 shots, the last 5 of them triple."""
    rows = torch.arange(len(image_shots)).repeat_interleave(torch.tensor([1] * 15 + [3] * 5))
    norm, weights = image_model.get_submodule(NORM), torch.tensor([2 / 3] * 15 + [2.0] * 5)
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        image_model(**plain_task.inputs(image_model, take(image_shots.batch, rows)))
    hook.remove()
    weighed = dataclasses.replace(image_shots, weights=weights)
    assert weighed.effective == pytest.approx(30**2 / (15 * 1 + 5 * 9))
    between = seen[0].mean((2, 3)).var(0, unbiased=False) / (weighed.effective - 1)
    variance = seen[0].var((0, 2, 3), unbiased=False) + between
    expected = norm.weight.detach() ** 2 * (norm.running_var - variance) / norm.running_var
    found, names = excess(image_model, plain_task, weighed)
    assert torch.allclose(found.scores[found.layers == names.index(NORM)], expected, atol=1e-4)


@pytest.mark.parametrize("larger", [1.0, 1.4])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_the_augmentation_that_explains_the_statistics_is_used(
    image_model, image_task, image_shots, augment, larger
) -> None:
    """Statistics gathered under one augmentation are compared with shots under that one, though nobody says which.

    Means tell it, so that it does not matter by how much a trigger made variances larger.
    """
    stream = torch.Generator().manual_seed(0)
    norms = [module for module in image_model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        image_model.train()
        for _ in range(20):
            batch = image_task.augment(image_shots.batch, stream, augment)
            image_model(**image_task.inputs(image_model, batch))
        image_model.eval()
        for norm in norms:
            norm.running_var.mul_(larger)
    found, _ = excess(image_model, image_task, image_shots, passes=5)
    assert found.augment == augment
    assert found.evidence()["statistics_augment"] == augment


def scores(planted: dict[int, float], shots: int = 100) -> Excess:
    """Four layers of 50 units whose scores are normal, symmetric about 0, but for those planted."""
    half = 0.1 * torch.special.ndtri(torch.linspace(0.51, 0.99, 25))
    noise = torch.cat([-half, half]).repeat(4)
    for unit, value in planted.items():
        noise[unit] = value
    return Excess(noise, torch.arange(4).repeat_interleave(50), shots)


def test_what_chance_explains_is_not_cut() -> None:
    nothing = scores({})
    assert len(nothing.largest(0.05)) == len(nothing.outliers(0.05)) == 0
    planted = {20: 1.0, 70: 0.9, 120: 0.8}
    found = scores(planted)
    assert found.largest(0.05).tolist() == [20, 70, 120]  # with a fourth one by chance, it would be a third of them
    assert set(found.outliers(0.01).tolist()) <= set(planted)
    assert len(found.outliers(0.01)) == 2  # a hundredth of 200


def test_nothing_stands_out_of_few_units_either() -> None:
    """A hundredth of them is less than one."""
    nothing = torch.linspace(-1.0, 1.0, 48)
    layer = torch.zeros(48, dtype=torch.int64)
    assert dict(Excess(nothing, layer, 100).doubts()).keys() == {"nothing-stands-out"}
    assert not Excess(nothing.index_fill(0, torch.tensor(3), 2.0), layer, 100).doubts()


def test_few_shots_leave_more_to_chance() -> None:
    """Five planted, and two decoys that reach as high as the weaker three: one for each two, or for each ten."""
    planted = {20: 1.0, 70: 0.9, 120: 0.6, 121: 0.6, 122: 0.6, 30: -0.7, 31: -0.7}
    assert [len(scores(planted, shots).largest(0.025)) for shots in (49, 50)] == [5, 2]


def test_an_outlier_is_one_of_its_own_layer() -> None:
    """In the last layer everything is high; a lower score stands out where nothing else does."""
    layered = scores({i: 0.9 + i / 1000 for i in range(150, 200)} | {20: 0.6})
    assert 20 in layered.outliers(0.01).tolist()
    assert 20 not in layered.largest(0.2).tolist()


def test_further_outliers_stand_out_a_little_less() -> None:
    planted = {20: 1.0, 70: 0.9, 120: 0.8, 121: 0.28}
    found = scores(planted)
    assert OUTLIER > float(found.relative[121]) > FURTHER
    assert set(found.outliers(0.05).tolist()) == {20, 70, 120}
    assert set(found.outliers(0.05, FURTHER).tolist()) == {20, 70, 120, 121}
    assert found.outliers(0.01, FURTHER).tolist() == [20, 70]
    assert scores(planted, shots=49).further(0.5).tolist() == [20, 70, 120, 121]
    assert found.further(0.1).tolist() == found.relative.argsort(descending=True)[:20].tolist(), "shots will judge"
    assert len(scores({}).further(0.5)) == len(scores({20: 1.0, 21: -1.0}).further(0.5)) == 0


def test_a_layer_of_mostly_silent_units_has_no_outliers() -> None:
    """More than half of the gains are 0, so any other unit would be infinitely far from the median."""
    silent = scores({i: 0.0 for i in range(30)} | {40: 0.01, 170: 1.0})
    assert silent.outliers(0.05).tolist() == [170]
    assert silent.relative[:50].abs().max() == 0


@pytest.mark.parametrize(("shots", "cut"), [(49, 2), (50, 0)])
def test_few_shots_cannot_tell_chance_and_many_can(shots: int, cut: int) -> None:
    """As many units far below their layer's median as above it: with enough shots that is chance."""
    both = scores({20: 1.0, 70: 0.9, 21: -1.0, 71: -0.9}, shots)
    assert len(both.outliers(0.05)) == cut


def test_a_network_without_running_statistics_has_no_scores(image_task, image_shots) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    loop = Loop(make_accelerator("no"), 0)
    adapted = get_nft_model(model)
    assert excess_variance(Context(model, image_task, image_shots, {}, loop), adapted, 8, 1) is None
    assert loop.steps == 0


@pytest.mark.parametrize(("own", "believed"), [(0.1, True), (0.5, True), (None, True), (0.997, False)])
def test_statistics_of_the_last_batch_alone_are_not_believed(
    image_model, image_task, image_shots, own: float | None, believed: bool
) -> None:
    for module in image_model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = own
    nft = NFT(batch_size=8, steps=1, mixed_precision="no", composed=0.0, pushes="never", exposures=0, cut=0.0)
    for switch, found in ((nft, believed), (dataclasses.replace(nft, statistics_momentum=1.0), True)):
        result = purify(copy.deepcopy(image_model), image_task, image_shots, switch)
        assert ("excess" in result.details) is found
        assert ("no-statistics" in dict(result.doubts)) is not found


def test_a_planted_unit_is_cut_and_recorded(image_model, image_task, image_shots) -> None:
    with torch.no_grad():
        norm = image_model.get_submodule(NORM)
        norm.weight[3] = 3.0
        norm.running_var[3] *= 50
    result = purify(
        image_model, image_task, image_shots, NFT(steps=1, batch_size=8, mixed_precision="no", exposures=0, cut=0.0)
    )
    learnt = {name.removesuffix(".base_layer"): mask for name, mask in masks(result.model).items()}
    assert float(learnt[NORM].detach()[3]) == 0.0
    assert sum(result.details["cut_by_layer"].values()) == result.details["units_cut"]
    assert result.details["excess"][0] == pytest.approx(9 * 0.98, abs=0.18)  # gain squared
    assert result.details["excess"] == sorted(result.details["excess"], reverse=True)


def test_weights_have_a_switch(image_model, image_task, image_shots) -> None:
    weighed = dataclasses.replace(image_shots, weights=torch.tensor([0.1] * 10 + [1.9] * 10))

    def scores(shots: Shots, **changes: bool) -> list[float]:
        told = NFT(steps=0, mixed_precision="no", exposures=0, cut=0.0, **changes)
        return purify(copy.deepcopy(image_model), image_task, shots, told).details["excess"]

    assert scores(weighed, class_prior=False) == scores(image_shots)
    assert scores(weighed) != scores(image_shots)


def know_nothing_else(model, task, shots) -> None:
    """Let a model's statistics be those of the shots themselves."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(**task.inputs(model, shots.batch))


def test_statistics_that_show_nothing_are_not_the_last_word(image_model, plain_task, image_shots, monkeypatch) -> None:
    """A network that was trained on clean data after it learnt a backdoor is pushed like one without statistics."""
    know_nothing_else(image_model, plain_task, image_shots)

    def cured(**changes: str) -> PurifyResult:
        nft = NFT(steps=0, batch_size=8, mixed_precision="no", exposures=0, cut=0.0, adversarial=0.0, **changes)
        return purify(copy.deepcopy(image_model), plain_task, image_shots, nft)

    assert "push_scores" not in cured().details, "too few shots"
    monkeypatch.setattr("hf_nft.defenses._finding.ENOUGH", len(image_shots))
    pushed = cured()
    told = [code for code, _ in pushed.doubts]
    assert set(pushed.details["push_scores"]) == {0, 1, 2, 3}, "every answer is aimed at"
    assert told.count("nothing-stands-out") == ("composite_scores" in pushed.details), "said of both, or of neither"
    assert "push_scores" not in cured(pushes="never").details
    with torch.no_grad():
        image_model.get_submodule(NORM).running_var.mul_(50)
    seen = cured()
    assert seen.details["units_cut"] > 0
    assert "push_scores" in seen.details, "whether the cut left a way"
    assert seen.details["cut_by_push"] == 0, "statistics told what to cut"


def test_masks_learn_against_an_answer_that_a_cut_by_statistics_leaves_within_reach(
    image_model, plain_task, image_shots, monkeypatch
) -> None:
    """The last corner, lit up beyond what any picture shows there, says answer 2, whatever is cut."""
    monkeypatch.setattr("hf_nft.defenses._finding.ENOUGH", len(image_shots))
    know_nothing_else(image_model.eval(), plain_task, image_shots)
    with torch.no_grad():
        image_model.get_submodule(NORM).running_var.mul_(50)
        image_model.classifier.weight.mul_(0.1)  # nothing else leads anywhere
    brightest = plain_task.inputs(image_model, image_shots.batch)["pixel_values"][..., 12:, 12:].mean((1, 2, 3)).max()

    def lit(_: torch.nn.Module, args: tuple, inputs: dict, output):
        output.logits[:, 2] += 30 * (inputs["pixel_values"][..., 12:, 12:].mean((1, 2, 3)) - brightest)
        return output

    image_model.register_forward_hook(lit, with_kwargs=True)

    def cured(**changes: str) -> PurifyResult:
        nft = NFT(steps=4, batch_size=8, mixed_precision="no", **changes)
        return purify(copy.deepcopy(image_model), plain_task, image_shots, nft)

    led, alone = cured(), cured(pushes="never")
    assert next(iter(led.details["push_scores"])) == 2
    assert led.details["adversary_window"] == [[12, 16], [12, 16]]
    assert (led.details["adversarial"], alone.details["adversarial"]) == (NFT().adversarial_beside, 0.0)
    assert led.details["units_cut"] == alone.details["units_cut"] > 0
    assert led.details["cut_by_push"] == 0, "statistics told what to cut"
    assert not {"nothing-stands-out", "no-statistics", "way-left-open"} & dict(led.doubts).keys()


def test_what_does_not_stand_out_is_doubted(image_model, plain_task, image_shots) -> None:
    """Statistics that were gathered on the shots themselves hold nothing else; those of a trigger do."""
    know_nothing_else(image_model, plain_task, image_shots)
    told = {"steps": 0, "mixed_precision": "no", "exposures": 0, "cut": 0.0, "pushes": "never"}

    def doubts(**changes: float) -> dict[str, str]:
        result = purify(copy.deepcopy(image_model), plain_task, image_shots, NFT(**{**told, **changes}))
        found = dict(result.doubts)
        assert ("composite_scores" in result.details) == ("nothing-stands-out" in found), "tried where all else failed"
        met = found.pop("composite-trigger", None)  # what an untrained network says is chance
        assert result.details["composed"] == (0.75 if met else 0.0)
        return found

    assert list(doubts()) == ["few-shots", "nothing-stands-out"]
    assert doubts()["few-shots"].startswith(f"{len(image_shots)} clean examples")
    assert doubts(excess=0.0, outliers=0.0) == {}  # nothing was looked for
    with torch.no_grad():
        image_model.get_submodule(NORM).running_var.mul_(50)
    assert list(doubts()) == ["few-shots"]
    assert list(doubts(excess=0.001)) == ["few-shots"], "what is there counts, not how much of it may be cut"


def test_what_no_row_reaches_has_no_scores(image_model, image_task, image_shots) -> None:
    """An auxiliary head would have statistics, and nothing to compare them with."""
    found, _ = excess(copy.deepcopy(image_model), image_task, image_shots, passes=2)
    image_model.auxiliary = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5))
    image_model.auxiliary[1].running_var.fill_(100.0)
    more, names = excess(image_model, image_task, image_shots, passes=2)
    unreached = more.layers == names.index("auxiliary.1")
    assert unreached.sum() == 5
    assert more.scores[unreached].tolist() == [0.0] * 5
    assert torch.equal(more.scores[~unreached], found.scores)
    assert more.augment == found.augment
