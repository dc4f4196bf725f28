"""Descriptions of the masks."""

import pytest
import torch
from torch import nn

from hf_nft.adapter import get_nft_model, masks
from hf_nft.errors import ConfigError, SuspectError
from hf_nft.masks import difference, floors, most_suppressed, project_, summarize


def model_with(first: list[float], second: list[float]) -> nn.Module:
    model = get_nft_model(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(2)))
    for mask, values in zip(masks(model).values(), (first, second), strict=True):
        mask.data.copy_(torch.tensor(values))
    return model


def test_rows() -> None:
    model = model_with([1.0, 0.95, 0.1, 0.0], [0.55, 0.5])
    first, second = summarize(model)
    assert (first.name, first.side, first.units) == ("0", "gain", 4)
    assert first.histogram == (1, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    assert (second.mean, second.min) == pytest.approx((0.525, 0.5))
    assert second.at_floor is None


def test_masks_at_the_floor_are_counted_after_projection() -> None:
    model = model_with([1.0, 0.95, 0.1, 0.0], [0.55, 0.5])
    bounds = floors(model)
    project_(masks(model), bounds)
    assert [row.at_floor for row in summarize(model, bounds)] == [2, 0]


def test_most_suppressed_units_come_first() -> None:
    model = model_with([1.0, 0.3, 0.1, 1.0], [0.3, 0.2])
    assert [(layer, unit) for layer, unit, _ in most_suppressed(model, 4)] == [("0", 2), ("1", 1), ("0", 1), ("1", 0)]
    assert most_suppressed(model, 1)[0][2] == pytest.approx(0.1)
    assert len(most_suppressed(model, 99)) == 6
    with pytest.raises(ConfigError, match="k must be"):
        most_suppressed(model, 0)
    with pytest.raises(SuspectError):
        most_suppressed(nn.Linear(2, 2), 1)


def test_difference_needs_the_same_layers() -> None:
    a = masks(model_with([1.0, 0.5, 0.1, 1.0], [0.3, 0.2]))
    b = masks(model_with([1.0, 0.0, 0.1, 1.0], [0.3, 0.3]))
    delta = difference(a, b)
    torch.testing.assert_close(delta["0"], torch.tensor([0.0, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(delta["1"], torch.tensor([0.0, -0.1]))
    with pytest.raises(ConfigError, match=r"'1' is in one.*shapes \(4,\) and \(3,\)"):
        difference(a, {"0": torch.ones(3)})
