"""Choosing shots: the same number of each class, reproducible, nested, and never from what a victim was trained on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_nft.errors import ConfigError, DataError
from hf_nft.shots import Shots, choose, class_weights, held_out

STRATA = np.random.default_rng(0).permutation(np.arange(200) % 4)


def test_every_class_gets_its_shots_class_by_class() -> None:
    rows = choose(STRATA, 5, seed=1)
    assert rows.shape == (20,)
    assert len(set(rows.tolist())) == 20
    assert STRATA[rows].tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


def test_fewer_shots_are_the_beginning_of_more() -> None:
    few, many = (choose(STRATA, n, seed=1).reshape(4, n) for n in (3, 11))
    assert np.array_equal(few, many[:, :3])


def test_a_class_does_not_depend_on_the_others() -> None:
    rows = choose(STRATA, 3)
    without = STRATA.copy()
    without[STRATA == 3] = 9
    assert np.array_equal(choose(without, 3)[:9], rows[:9])


def test_classes_have_streams_of_their_own() -> None:
    """Or rows that were stored in the same order in each class would be chosen together."""
    ranks = choose(np.repeat(np.arange(4), 50), 5).reshape(4, 5) % 50
    assert len({tuple(row) for row in ranks.tolist()}) == 4


def test_the_seed_decides() -> None:
    assert np.array_equal(choose(STRATA, 5, 7), choose(STRATA, 5, 7))
    assert not np.array_equal(choose(STRATA, 5, 7), choose(STRATA, 5, 8))
    with pytest.raises(ConfigError, match="--shot-seed: expected >= 0, found -1"):
        choose(STRATA, 5, -1)


def test_only_rows_of_the_pool_are_chosen() -> None:
    pool = np.arange(0, 200, 3)
    assert set(choose(STRATA, 4, 0, pool).tolist()) <= set(pool.tolist())


def test_too_few_rows_name_the_class_and_the_number() -> None:
    with pytest.raises(
        DataError,
        match=r"at least 51 clean examples of class 0, found 50 among the \d+ rows to draw from\. Lower --shots to 50",
    ):
        choose(STRATA, 51)
    pool = np.flatnonzero(STRATA != 2)
    with pytest.raises(DataError, match="class 2, found 0"):
        choose(STRATA, 1, 0, pool)


def test_held_out_rows_are_a_fixed_share() -> None:
    rows = held_out(1000, 0.1)
    assert len(rows) == 100
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, held_out(1000, 0.1))
    assert not np.array_equal(rows, held_out(1000, 0.1, seed=1))
    assert set(rows.tolist()) <= set(held_out(1000, 0.2).tolist())
    assert len(held_out(1000, 0.0)) == 0
    assert len(held_out(7, 0.3)) == 2


def test_held_out_and_trained_rows_are_disjoint() -> None:
    away = held_out(len(STRATA), 0.25)
    trained = np.setdiff1d(np.arange(len(STRATA)), away)
    shots = choose(STRATA, 5, 3, away)
    assert not set(shots.tolist()) & set(trained.tolist())
    assert len(trained) + len(away) == len(STRATA)


def test_classes_weigh_as_much_as_they_are_frequent() -> None:
    strata = np.array([0] * 6 + [1] * 3 + [3] * 3)  # no row of class 2
    weights = class_weights(strata, np.array([0, 1, 6, 7, 9, 10]))
    assert weights is not None
    assert weights.tolist() == pytest.approx([1.5, 1.5, 0.75, 0.75, 0.75, 0.75])
    assert class_weights(np.array([0, 0, 1, 1, 2, 2]), np.array([1, 2, 5])) is None


def test_length_counts_rows() -> None:
    assert len(Shots({"x": torch.zeros(6, 2), "y": torch.zeros(6)}, per_class=3.0, classes=2)) == 6


def test_shots_of_our_own_victim_come_from_its_held_out_rows(image_rows, suspect_folder) -> None:
    import json

    from hf_nft.data import Data, fingerprint
    from hf_nft.suspect import load_suspect
    from hf_nft.workflows import draw_shots

    rows = image_rows(80, 16)
    mark = {"fingerprint": fingerprint(rows, "label"), "holdout": {"fraction": 0.5, "seed": 0}}
    (suspect_folder / "record.json").write_text(json.dumps({"schema_version": 1, "data": mark}))
    suspect, data = load_suspect(str(suspect_folder)), Data("rows", rows, rows)
    shots = draw_shots(suspect, data, 3, seed=2)
    assert set(shots.indices) <= set(held_out(80, 0.5).tolist())
    assert (shots.per_class, shots.classes, len(shots), shots.seed) == (3.0, 4, 12, 2)
    assert shots.fingerprint == mark["fingerprint"]
    assert shots.batch["labels"].tolist() == rows.select(shots.indices)["label"]
    assert torch.equal(shots.strata, shots.batch["labels"])
    assert draw_shots(suspect, replace(data, streamed=True), 3, seed=2).strata is None, "nor are frequencies known"
    # another data set was not held out from: all its rows may be shots
    other = image_rows(84, 16)
    assert set(draw_shots(suspect, Data("other", other, other), 20, 0).indices) - set(held_out(84, 0.5).tolist())
