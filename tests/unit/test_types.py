"""How rows are drawn."""

import pytest
import torch

from hf_nft.types import shuffled


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (12, 12), (12, 1), (13, 4)])
def test_every_row_is_seen_once_in_every_epoch(rows: int, size: int) -> None:
    per_epoch = rows // size
    epochs = []
    for epoch in range(3):
        steps = [shuffled(epoch * per_epoch + i, rows, size, seed=1) for i in range(per_epoch)]
        seen = torch.cat(steps).tolist()
        assert len(set(seen)) == len(seen) == per_epoch * size
        epochs.append(seen)
    if rows > 1:
        assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = shuffled(5, 100, 10, 3).tolist()
    torch.manual_seed(1)
    assert shuffled(5, 100, 10, 3).tolist() == first
    assert shuffled(5, 100, 10, 4).tolist() != first
