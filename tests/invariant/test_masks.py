"""Masks depend on the seed, the shots and the settings; not on micro-batches, or how often one asks."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_nft.adapter import masks
from hf_nft.defenses.nft import NFT
from hf_nft.errors import DivergedError
from hf_nft.planting import PlantConfig, plant
from hf_nft.purification import PurifyResult, purify

PLAIN = {"steps": 6, "exposures": 0, "cut": 0.0, "batch_size": 12, "lr": 0.1, "mixed_precision": "no"}
WHOLE = {**PLAIN, "exposures": 2, "cut": 0.1, "unlearn_steps": 4, "relearn_passes": 2}
PAPER = {"preset": "paper", "steps": 6, "batch_size": 12, "mixed_precision": "no"}


def learnt(result: PurifyResult) -> torch.Tensor:
    return torch.cat([mask.detach() for mask in masks(result.model).values()])


@pytest.fixture
def cure(image_model, image_task, image_shots) -> Callable[..., PurifyResult]:
    """Purify a fresh copy of the model."""

    def run(**settings: object) -> PurifyResult:
        defense = NFT.from_preset(str(settings.pop("preset", "default")), **settings)
        return purify(copy.deepcopy(image_model), image_task, image_shots, defense)

    return run


@pytest.mark.parametrize("settings", [PLAIN, {**PLAIN, "objective": "labels"}, {**PLAIN, "mixup_alpha": 0}])
@pytest.mark.parametrize("parts", [2, 4, 5])
def test_accumulation_gives_the_same_masks(cure, settings: dict, parts: int) -> None:
    whole = cure(**settings)
    split = cure(**settings, gradient_accumulation_steps=parts)  # 12 rows in 5 parts: uneven
    assert (learnt(whole) < 0.99).any()
    torch.testing.assert_close(learnt(split), learnt(whole), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.losses["masks"], whole.losses["masks"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [WHOLE, PAPER, {**WHOLE, "bn_mode": "recalibrate_unmixed"}])
def test_the_same_seed_gives_the_same_masks_twice(cure, settings: dict) -> None:
    first = cure(**settings)
    torch.rand(3)  # the global stream must not matter
    second = cure(**settings)
    assert torch.equal(learnt(first), learnt(second))
    assert first.losses == second.losses
    assert not torch.equal(learnt(first), learnt(cure(**settings, seed=1)))


def test_dropout_follows_the_seed_and_leaves_the_global_stream_alone(image_task, image_shots) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=16, patch_size=8, hidden_dropout_prob=0.5, num_labels=4, **small)
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    found = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        defense = NFT.from_preset("default", **PLAIN, pushes="never", dropout=True)
        found.append(learnt(purify(copy.deepcopy(model), image_task, image_shots, defense)))
        assert torch.equal(before, torch.random.get_rng_state())
        torch.rand(3)
    still = purify(copy.deepcopy(model), image_task, image_shots, NFT.from_preset("default", **PLAIN, pushes="never"))
    assert torch.equal(*found)
    assert not torch.equal(found[0], learnt(still))


def test_planting_the_same_seed_twice_gives_the_same_weights(image_model, image_task, image_shots) -> None:
    found = []
    for accumulation in (1, 1, 4):
        model = copy.deepcopy(image_model)
        settings = {"epochs": 1, "batch_size": 8, "mixed_precision": "no"}
        plant(model, image_task, image_shots.batch, PlantConfig(**settings, gradient_accumulation_steps=accumulation))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])  # BatchNorm in training sees each micro-batch alone


def test_a_diverging_run_leaves_the_last_good_state(image_model, image_task, image_shots) -> None:
    before = {name: tensor.clone() for name, tensor in image_model.state_dict().items()}
    settings = PlantConfig(epochs=3, batch_size=8, lr=1e30, mixed_precision="no")
    with pytest.raises(DivergedError, match="expected finite losses"):
        plant(image_model, image_task, image_shots.batch, settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in image_model.state_dict().items())
