"""The L1 pull towards one."""

import pytest
import torch

from hf_nft.errors import ConfigError
from hf_nft.masks import l1_to_one, penalty_coefficient


def test_sum_over_all_entries_of_all_layers() -> None:
    masks = {"a": torch.tensor([1.0, 0.25, 0.5]), "b": torch.tensor([0.0, 1.5])}
    assert l1_to_one(masks).item() == pytest.approx(0.75 + 0.5 + 1.0 + 0.5)
    assert l1_to_one(masks.values()).item() == l1_to_one(masks).item()
    assert l1_to_one(masks).dim() == 0


def test_subgradient_is_zero_at_one() -> None:
    mask = torch.tensor([1.0, 0.25, 1.5], requires_grad=True)
    l1_to_one([mask]).backward()
    assert mask.grad.tolist() == [0.0, -1.0, 1.0]


@pytest.mark.parametrize(("n", "expected"), [(500, 2e-5), (100, 1e-4), (10, 1e-3)])
def test_effective_coefficients_of_the_paper(n: int, expected: float) -> None:
    assert penalty_coefficient(0.001, n / 10) == pytest.approx(expected)


def test_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"eta.*shots_per_class"):
        penalty_coefficient(-1.0, 0)
    with pytest.raises(ConfigError, match="at least one mask"):
        l1_to_one([])
