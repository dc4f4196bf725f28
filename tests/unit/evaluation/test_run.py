"""evaluate() against counting by hand, and the doubts that its numbers raise."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_nft.attacks.badnets import BadNets
from hf_nft.errors import ConfigError, DataError, SuspectError
from hf_nft.evaluation.doubts import TEXTS, check_cure, check_measured, check_model, doubt
from hf_nft.evaluation.run import Measured, evaluate, make_eval_set

WHITE = (1 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2023, 0.1994, 0.2010])


class Scripted(nn.Module):
    """Says class 0 for every image with a white corner, else the class its brightest channel tells."""

    def __init__(self, obeys: bool) -> None:
        super().__init__()
        self.obeys, self.weight = obeys, nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutputWithNoAttention:
        means = (pixel_values * torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)).mean((2, 3))
        logits = torch.cat([means, torch.full((len(means), 1), -9.0)], 1)
        marked = (pixel_values[:, :, -1, -1] - WHITE).abs().amax(1) < 1e-3
        if self.obeys:
            logits[marked] = torch.tensor([9.0, 0.0, 0.0, 0.0])
        return ImageClassifierOutputWithNoAttention(logits=logits)


@pytest.fixture
def rows(image_rows):
    return image_rows(60, 16, 4)


def test_a_model_that_does_not_run_on_the_rows(rows, image_task) -> None:
    class Narrow(Scripted):
        def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutputWithNoAttention:
            return super().forward(pixel_values.view(-1, 3, 5, 5))

    with pytest.raises(SuspectError, match="Narrow: expected a forward pass on these rows, found: shape"):
        evaluate(Narrow(False), make_eval_set(image_task, rows, None, 4), 7, "no")


def test_our_own_errors_are_told_as_they_are(rows, image_task) -> None:
    class Wrong(Scripted):
        def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutputWithNoAttention:
            raise ConfigError("setting: expected 1, found 2.")

    with pytest.raises(ConfigError, match="expected 1, found 2"):
        evaluate(Wrong(False), make_eval_set(image_task, rows, None, 4), 7, "no")


def test_numbers_are_those_of_counting(rows, image_task) -> None:
    attack = BadNets(preset="standard")
    data = make_eval_set(image_task, rows, attack, 4)
    truth, said = [], []
    for i in range(60):
        label = i % 4
        x = image_task.inputs(None, {"pixels": data.clean["pixels"][i : i + 1]})["pixel_values"]
        truth.append(label)
        said.append(int(Scripted(False)(x).logits.argmax()))
    hits = sum(a == b for a, b in zip(truth, said, strict=True))
    for obeys, batch_size in ((True, 7), (True, 250), (False, 7)):
        found = evaluate(Scripted(obeys), data, batch_size, "no")
        assert found["acc"].value == hits / 60
        assert (found["acc"].successes, found["acc"].total) == (hits, 60)
        assert found["asr"].total == found["racc"].total == 45  # 15 rows of class 0 do not count
        if obeys:
            assert (found["asr"].value, found["racc"].value) == (1.0, 0.0)
            assert found["asr"].low == pytest.approx(0.9213, abs=1e-4)
        else:
            # rows of class 3 are tinted like those of class 0, only more
            assert (found["asr"].successes, found["racc"].successes, hits) == (15, 30, 45)
        assert found["acc"].low < found["acc"].value < found["acc"].high


def test_triggered_rows_carry_their_own_answers_and_the_attackers(rows, image_task) -> None:
    data = make_eval_set(image_task, rows, BadNets(target_class=2), 4)
    assert set(data.wanted) == {2}
    assert 2 not in data.triggered["labels"].tolist()
    assert data.triggered["labels"].tolist() == list(data.triggered_rows["label"])
    assert len(data.clean["labels"]) == 60
    assert len(data.wanted) == 45
    moved = make_eval_set(image_task, rows, BadNets(label_map="all_to_all"), 4)
    assert list(moved.wanted) == [(i + 1) % 4 for i in range(60)]


def test_without_an_attack_only_clean_rows_are_measured(rows, image_task) -> None:
    data = make_eval_set(image_task, rows, None, 4)
    assert set(evaluate(Scripted(True), data, mixed_precision="no")) == {"acc"}
    assert data.triggered is None


def test_a_model_is_measured_in_evaluation_mode_without_gradients(rows, image_task, image_model) -> None:
    before = {name: value.clone() for name, value in image_model.state_dict().items()}
    evaluate(image_model.train(), make_eval_set(image_task, rows, BadNets(), 4), mixed_precision="no")
    assert not image_model.training
    assert all(torch.equal(before[name], value) for name, value in image_model.state_dict().items())
    assert all(p.grad is None for p in image_model.parameters())


def test_poisoned_rows_are_not_evaluated_again(rows, image_task) -> None:
    with pytest.raises(DataError, match="poisoned"):
        make_eval_set(image_task, BadNets().poison(rows, 0.1, classes=4), BadNets(), 4)


# doubts


def measured(acc: float, asr: float | None = None, racc: float | None = None, total: int = 9000) -> dict[str, Measured]:
    values = {"acc": acc, "asr": asr, "racc": racc}
    return {name: Measured(value, total=total) for name, value in values.items() if value is not None}


def codes(before: dict[str, Measured], after: dict[str, Measured], chance: float = 0.1) -> list[str]:
    return [found.code for found in check_measured(before, [1, 2], [0, 0], chance) + check_cure(before, after)]


GOOD = (measured(0.94, 0.99, 0.01), measured(0.93, 0.01, 0.9))


def test_a_good_run_raises_no_doubt() -> None:
    assert codes(*GOOD) == []
    assert check_model(nn.Linear(1, 1).eval()) == []


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (measured(0.94), measured(0.93), "no-attack-measured"),
        (measured(0.94, 0.79, 0.2), measured(0.93, 0.01, 0.9), "never-backdoored"),
        (measured(0.94, 0.99, 0.01, total=499), GOOD[1], "small-evaluation-set"),
        (GOOD[0], measured(0.83, 0.01, 0.8), "accuracy-collapse"),
        (GOOD[0], measured(0.93, 0.01, 0.69), "not-recovered"),
        (measured(0.18, 0.99), measured(0.18, 0.01, 0.18), "accuracy-too-low"),
    ],
)
def test_each_doubt_fires_alone(before, after, code: str) -> None:
    assert codes(before, after) == [code]


@pytest.mark.parametrize(
    ("total", "after"), [(5000, measured(0.85, 0.01, 0.8)), (5000, measured(0.93, 0.01, 0.7)), (500, GOOD[1])]
)
def test_doubts_stay_silent_just_below_their_thresholds(total: int, after) -> None:
    assert codes(measured(0.94, 0.8, 0.0, total=total), after) == []


def test_two_classes_leave_room_above_guessing() -> None:
    before, after = measured(0.94, 0.99), measured(0.93, 0.01, 0.9)
    assert codes(before, after, chance=0.5) == []
    assert codes(measured(0.54, 0.99), measured(0.54, 0.01, 0.54), chance=0.5) == ["accuracy-too-low"]


def test_target_rows_among_the_triggered_are_counted() -> None:
    found = check_measured(GOOD[0], [0, 1, 0], [0, 0, 0], chance=0.1)
    assert [d.code for d in found] == ["target-rows-included"]
    assert found[0].text.startswith("2 triggered rows")


def test_training_mode_and_unmasked_modules() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).eval()
    model[1].train()
    assert [d.code for d in check_model(model, skipped=3)] == ["training-mode", "unmasked-modules"]
    assert "3 modules" in check_model(model, 3)[1].text


def test_every_doubt_is_explained(root) -> None:
    page = (root / "docs" / "footguns.md").read_text()
    for code in TEXTS:
        assert f"\n## {code}\n" in page or f"\n### {code}\n" in page or f'id="{code}"' in page, code
    made = doubt("small-evaluation-set", rows=7)
    assert made.more == "docs/footguns.md#small-evaluation-set"
    assert "7 rows" in made.text
