"""What identifies the model that an interrupted run was on."""

import copy
from pathlib import Path

import pytest
import torch

from hf_nft.checkpoint import checksum
from hf_nft.defenses.nft import NFT
from hf_nft.errors import OutputError
from hf_nft.purification import purify


def test_a_checksum_tells_weights_apart_and_sees_buffers(image_model) -> None:
    same, weight, buffer = (copy.deepcopy(image_model) for _ in range(3))
    with torch.no_grad():
        weight.get_parameter("classifier.weight")[0, 0] += 1e-6
        next(b for name, b in buffer.named_buffers() if name.endswith("running_mean"))[0] += 1e-3
    found = [checksum(model) for model in (image_model, same, weight, buffer)]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_run_is_not_gone_on_with_on_another_model(image_model, image_task, image_shots, tmp_path: Path) -> None:
    defense = NFT.from_preset("paper", steps=2, batch_size=8, mixed_precision="no")
    other, file = copy.deepcopy(image_model), tmp_path / "state.pt"
    with torch.no_grad():
        other.get_parameter("classifier.bias")[0] += 1
    purify(image_model, image_task, image_shots, defense, checkpoint=file, checkpoint_every=1)
    with pytest.raises(OutputError, match="found other model"):
        purify(other, image_task, image_shots, defense, checkpoint=file, resume=True)
