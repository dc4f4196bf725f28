"""The numbers of a change, by hand."""

import math

import numpy as np
import pytest

from hf_nft.reporting.triggers import change, grid, mean_change


def test_numbers_by_hand() -> None:
    before = np.full((4, 4, 3), 100, dtype=np.uint8)
    after = before.copy()
    after[0, 0] = (103, 100, 96)
    after[1, 1, 2] = 100
    found = change(before, after)
    assert found.linf == 4
    assert found.l2 == pytest.approx(5.0)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / (25 / 48)))
    assert found.pixels == 1 / 16
    none = change(before, before)
    assert (none.linf, none.l2, none.psnr, none.pixels) == (0, 0, math.inf, 0)
    mean = mean_change([found, change(before, before - 1)])
    assert (mean.linf, mean.pixels) == (4, pytest.approx((1 / 16 + 1) / 2))


def test_large_images_are_not_enlarged() -> None:
    images = [np.zeros((130, 200, 3), dtype=np.uint8)] * 2
    assert grid(images, images).size == (2 * 200 + 2, 3 * 130 + 4)
