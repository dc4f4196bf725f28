"""BppAttack: levels by hand, dithering against a plain loop, negative rows."""

import numpy as np
import pytest
import torch

from hf_nft.attacks.bppa import Bppa
from hf_nft.errors import ConfigError

RNG = np.random.default_rng(0)


def test_eight_levels_by_hand() -> None:
    levels = {round(255 / 7 * k) for k in range(8)}  # 0 36 73 109 146 182 219 255
    every = torch.arange(256).float().view(1, 16, 16).expand(3, 16, 16) / 255
    out = (Bppa().trigger(every, RNG) * 255).round()
    assert set(out[0].flatten().int().tolist()) == levels == {0, 36, 73, 109, 146, 182, 219, 255}
    assert float((out - every * 255).abs().max()) <= 255 / 14 + 0.5
    assert out[1].flatten()[[17, 18, 19, 54, 55, 255]].tolist() == [0, 0, 36, 36, 73, 255]
    again = Bppa().trigger(out / 255, RNG)
    assert torch.allclose(again * 255, out)


@pytest.mark.parametrize("levels", [2, 8])
def test_dithering_is_floyd_and_steinbergs(levels: int) -> None:
    image = np.random.default_rng(1).random((3, 9, 8)).astype(np.float32)
    wanted = image.astype(np.float64)
    for channel in wanted:
        for y in range(9):
            for x in range(8):
                old = channel[y, x]
                channel[y, x] = min(max(round(old * (levels - 1)), 0), levels - 1) / (levels - 1)
                error = old - channel[y, x]
                for dy, dx, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                    if y + dy < 9 and 0 <= x + dx < 8:
                        channel[y + dy, x + dx] += error * share / 16
    out = Bppa(dither=True, levels=levels).trigger(torch.from_numpy(image), RNG)
    assert np.abs(out.numpy() - np.round(wanted * 255) / 255).max() < 1e-6


def test_dithering_keeps_the_mean() -> None:
    even = torch.full((3, 32, 32), 0.3)
    assert float(Bppa(dither=True, levels=2).trigger(even, RNG).mean()) == pytest.approx(0.3, abs=0.02)
    assert float(Bppa(levels=2).trigger(even, RNG).mean()) == 0.0


def test_negative_rows_carry_another_rows_error() -> None:
    images, partners = torch.full((2, 3, 8, 8), 0.5), torch.rand(2, 3, 8, 8)
    covers = Bppa().cover_batch(images, partners, torch.Generator())
    assert torch.allclose(covers - 0.5, Bppa().trigger_batch(partners) - partners, atol=1e-6)
    assert float(Bppa().cover_batch(torch.ones_like(images), partners, torch.Generator()).max()) <= 1.0


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"levels.*cover_ratio"):
        Bppa(levels=1, cover_ratio=-1)
    assert Bppa.default_rate == 0.2
