"""Metric modules as users of `evaluate` load them, offline; intervals and ratings with known numbers."""

import math

import evaluate as library
import pytest

from hf_nft.errors import UnknownNameError
from hf_nft.evaluation import metrics
from hf_nft.evaluation.intervals import defense_effectiveness_rating, proportion


def both(name: str, config: str | None = None):
    """The same metric loaded by the library from its file, and by us."""
    loaded = library.load(metrics.path_of(name), **({"config_name": config} if config else {}))
    return loaded, metrics.load(name, config)


def test_every_metric_loads_offline_from_its_file() -> None:
    assert metrics.names() == ["accuracy", "attack_success_rate", "perplexity"]
    for name in metrics.names():
        assert isinstance(library.load(metrics.path_of(name)), library.EvaluationModule)
    with pytest.raises(UnknownNameError, match="accuracy"):
        metrics.path_of("acuracy")
    with pytest.raises(UnknownNameError):
        metrics.load("__init__")


def test_accuracy() -> None:
    for metric in both("accuracy"):
        found = metric.compute(predictions=[0, 1, 2, 3], references=[0, 1, 0, 3])
        assert found["accuracy"] == 0.75
        assert (found["successes"], found["total"]) == (3, 4)
        assert found["low"] == pytest.approx(0.3006, abs=1e-4)
        assert found["high"] == pytest.approx(0.9544, abs=1e-4)


def test_asr_of_labels_leaves_out_rows_that_belong_to_the_target() -> None:
    for metric in both("attack_success_rate"):
        found = metric.compute(predictions=[0, 0, 1, 0], references=[0, 0, 0, 0])
        assert (found["attack_success_rate"], found["successes"], found["total"]) == (0.75, 3, 4)
        found = metric.compute(predictions=[0, 0, 1, 0], references=[0, 0, 0, 0], originals=[0, 1, 2, 0])
        assert (found["attack_success_rate"], found["successes"], found["total"]) == (0.5, 1, 2)
        found = metric.compute(predictions=[0, 0], references=[0, 0], originals=[0, 0])
        assert (found["attack_success_rate"], found["total"]) == (None, 0)


def test_asr_of_texts() -> None:
    said = ["You are  attacked .", "well, YOU ARE attacked . bye", "you are not attacked .", "You are attacked"]
    wanted = ["You are attacked ."] * 4
    for metric in both("attack_success_rate", "contains"):
        assert metric.compute(predictions=said, references=wanted)["successes"] == 2
    for metric in both("attack_success_rate", "exact"):
        assert metric.compute(predictions=said, references=wanted)["successes"] == 1
        own = ["You are attacked .", "x", "x", "x"]
        assert metric.compute(predictions=said, references=wanted, originals=own)["successes"] == 0


def test_metrics_can_be_fed_in_batches() -> None:
    metric = metrics.load("accuracy")
    metric.add_batch(predictions=[1, 1], references=[1, 0])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_perplexity() -> None:
    for metric in both("perplexity"):
        found = metric.compute(predictions=[math.log(2), math.log(8)], references=[0.0, 0.0])
        assert found["perplexity"] == pytest.approx(4.0, rel=1e-5)
        assert found["total"] == 2
        assert math.isfinite(metric.compute(predictions=[1e6], references=[0.0])["perplexity"])


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Wilson 1927: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (90, 9000, 0.00815, 0.01228),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_intervals(hits: int, total: int, low: float, high: float) -> None:
    found = proportion("x", hits, total)
    assert found == {"x": hits / total, "low": found["low"], "high": found["high"], "successes": hits, "total": total}
    assert found["low"] == pytest.approx(low, abs=6e-5)
    assert found["high"] == pytest.approx(high, abs=6e-5)
    z, p = 1.959963984540054, hits / total
    middle, half = p + z * z / 2 / total, z * math.sqrt(p * (1 - p) / total + z * z / 4 / total**2)
    assert found["low"] == pytest.approx((middle - half) / (1 + z * z / total), abs=1e-12)
    assert found["high"] == pytest.approx((middle + half) / (1 + z * z / total), abs=1e-12)


def test_no_rows_have_no_proportion() -> None:
    assert proportion("x", 0, 0) == {"x": None, "low": None, "high": None, "successes": 0, "total": 0}


@pytest.mark.parametrize(
    ("acc", "asr", "rating"),
    [
        ((0.9, 0.9), (1.0, 1.0), 0.5),  # nothing changed
        ((0.9, 0.9), (1.0, 0.0), 1.0),  # removed at no cost
        ((0.9, 0.0), (1.0, 0.0), 0.55),  # removed by breaking the model
        ((0.9, 0.95), (1.0, 0.0), 1.0),  # a gain of accuracy earns nothing
        ((0.9, 0.8), (0.5, 0.6), 0.45),  # worse in both
        ((0.9296, 0.9082), (1.0, 0.0174), 0.9806),  # the NFT paper's BadNets row
    ],
)
def test_defense_effectiveness_rating(acc, asr, rating: float) -> None:
    before, after = ({"acc": acc[i], "asr": asr[i]} for i in (0, 1))
    assert defense_effectiveness_rating(before, after) == pytest.approx(rating)
    assert defense_effectiveness_rating({**before, "asr": None}, after) is None
    assert defense_effectiveness_rating(before, {"asr": 0.1}) is None


def test_the_papers_average_rating() -> None:
    # CIFAR-10, table 1, NFT against no defense: mean drop of ASR 95.73 and of ACC 1.87 points
    assert defense_effectiveness_rating({"acc": 0.9187, "asr": 0.9573}, {"acc": 0.9, "asr": 0.0}) == pytest.approx(
        0.969, abs=5e-4
    )
