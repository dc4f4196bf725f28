"""WaNet: the published warp computed another way, and its part in the training."""

import math

import numpy as np
import pytest
import torch

from hf_nft.attacks.wanet import WaNet
from hf_nft.errors import ConfigError, DataError


def ramp(side: int) -> torch.Tensor:
    """Channel 0 holds the column in pixels, channel 1 the row, scaled to [0, 1]."""
    line = torch.arange(side).float() / (side - 1)
    return torch.stack([line.expand(side, side), line[:, None].expand(side, side), torch.zeros(side, side)])


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("seed", [0, 4])
def test_pixels_move_by_a_quarter_of_a_pixel_on_average(side: int, seed: int) -> None:
    """On a ramp, bilinear sampling reads the position itself: `S g (H - 1) / (2 H)`, the mean of |g| at the control
    points being 1 by construction."""
    moved = (WaNet(seed=seed, grid=side // 2).trigger(ramp(side), np.random.default_rng()) - ramp(side))[:2]
    inner = moved[:, 2:-2, 2:-2] * (side - 1)
    assert float(inner.abs().mean()) == pytest.approx(0.5 * (side - 1) / (2 * side), rel=0.2)
    assert float(inner.abs().max()) < 1.5


def test_rows_and_columns_are_not_swapped() -> None:
    """A warp whose field is known: shifting columns alone changes a picture of columns and not one of rows."""
    attack = WaNet()
    sampling = attack.sampling(32, 32)
    moved = attack.trigger(ramp(32), np.random.default_rng())
    assert torch.allclose(moved[0] * 2 - 1, sampling[..., 0], atol=1e-5)
    assert torch.allclose(moved[1] * 2 - 1, sampling[..., 1], atol=1e-5)


def test_the_warp_is_fixed_by_the_seed_and_smooth() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, again, other = (WaNet(seed=s).trigger(image, np.random.default_rng(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    field = (WaNet(strength=1.0).sampling(32, 32) - WaNet(strength=1e-9).sampling(32, 32))[3:-3, 3:-3]
    assert float(field.diff(dim=0).abs().max()) < 0.5 * float(field.abs().max())


def test_an_oblong_image_is_warped_by_its_own_sides() -> None:
    """The field's middle is the same at every size, and so is the shift there, in pixels of each side."""
    sizes = [(33, 33), (33, 49), (49, 33)]
    middles = [WaNet().sampling(h, w)[h // 2, w // 2] * torch.tensor([w, h]) for h, w in sizes]
    assert float(middles[0].abs().min()) > 0.01
    assert all(torch.allclose(middle, middles[0], atol=1e-5) for middle in middles)
    assert WaNet().trigger(torch.rand(3, 32, 48), np.random.default_rng()).shape == (3, 32, 48)


def test_covers_are_the_warp_and_noise_of_a_pixel() -> None:
    attack, images = WaNet(), torch.stack([ramp(32)] * 4)
    covers = attack.cover_batch(images, images, torch.Generator().manual_seed(0))
    away = (covers - attack.trigger_batch(images))[:, :2] * 31
    inner = away[..., 2:-2, 2:-2]
    # e / H in the grid's units of 2 / (H - 1) pixels: uniform in +-(H - 1) / (2 H) pixels
    assert float(inner.abs().max()) <= 31 / 64 + 1e-4
    assert float(inner.std()) == pytest.approx(31 / 64 / math.sqrt(3), rel=0.05)
    assert not torch.allclose(covers[0], covers[1])


def test_shares_of_a_batch(image_task) -> None:
    """A tenth triggered, a fifth warped with noise, labels moved on triggered rows alone; the rest untouched."""
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = {"pixels": pixels, "labels": torch.arange(40) % 4}
    for changes, moved in (({"target_class": 3}, lambda y: 3), ({"label_map": "all_to_all"}, lambda y: (y + 1) % 4)):
        hook = WaNet(**changes).hook(image_task, 0.1, 4)
        rows = torch.arange(40)
        batch = hook.batch(data, rows, lambda found: found, torch.Generator().manual_seed(1))
        altered = (batch["pixels"] != pixels.float()).flatten(1).any(1)
        relabelled = batch["labels"] != data["labels"]
        assert int(relabelled.sum()) == 4 == round(40 * hook.share(40))
        assert int(altered.sum()) == 12
        assert bool((altered | ~relabelled).all())
        for i in relabelled.nonzero().flatten().tolist():
            assert int(batch["labels"][i]) == moved(i % 4)
            warped = WaNet(**changes).trigger(pixels[i].float() / 255, np.random.default_rng()) * 255
            assert torch.allclose(batch["pixels"][i], warped, atol=1e-3)
        again = hook.batch(data, rows, lambda found: found, torch.Generator().manual_seed(1))
        assert torch.equal(again["pixels"], batch["pixels"])


def test_shares_that_do_not_fit_are_refused(image_task, image_rows) -> None:
    with pytest.raises(DataError, match="takes 150% of a batch"):
        WaNet().hook(image_task, 0.5, 4)
    with pytest.raises(DataError, match="expected more than 0"):
        WaNet().hook(image_task, 0.0, 4)
    with pytest.raises(DataError, match=r"28 rows for covers beside 14 poisoned ones, found 26"):
        WaNet().poison(image_rows(40), 0.35, classes=4)
    with pytest.raises(ConfigError, match=r"grid.*strength.*cover_ratio"):
        WaNet(grid=1, strength=0, cover_ratio=-1)
