"""Floors against the published table, depths of real layouts, and the projection."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from hf_nft.adapter import NFTConfig, get_nft_model, mask_layers, masks
from hf_nft.errors import ConfigError, SuspectError, UnknownNameError
from hf_nft.masks import SCHEDULES, active_bounds, depths, floors, lower_bound, project_

PUBLISHED = {1: 0.485, 2: 0.294, 3: 0.179, 4: 0.108, 5: 0.066, 6: 0.040, 8: 0.0147, 10: 0.0054}


class Backwards(nn.Module):
    """Runs its layers in another order than it registers them; one is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.unused, self.first = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(("depth", "floor"), PUBLISHED.items())
def test_exponential_schedule_gives_the_published_table(depth: int, floor: float) -> None:
    # the table prints three decimals, or three significant digits
    assert lower_bound("exponential", depth, 19) == pytest.approx(floor, abs=5.1e-4 if depth <= 6 else 5.1e-5)


def test_other_schedules_by_hand() -> None:
    values = {name: [lower_bound(name, depth, 5, alpha=0.6) for depth in (1, 2, 3, 5)] for name in SCHEDULES}
    assert values["linear"] == pytest.approx([0.6, 0.45, 0.3, 0.0])
    assert values["cosine"] == pytest.approx([0.6, 0.3 * (1 + math.sqrt(0.5)), 0.3, 0.0])
    assert values["constant"] == [0.6] * 4
    assert values["none"] == [0.0] * 4
    assert [lower_bound(name, 1, 1, alpha=0.6) for name in ("linear", "cosine")] == pytest.approx([0.6, 0.6])


def test_wrong_settings_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"alpha.*beta.*depth"):
        lower_bound("exponential", 0, 3, alpha=1.5, beta=-1)
    with pytest.raises(ConfigError, match="alpha"):
        lower_bound("constant", 1, 1, alpha=float("nan"))
    with pytest.raises(UnknownNameError, match="exponential"):
        lower_bound("exponental", 1, 1)


def test_ordinal_follows_registration_and_execution_the_forward_pass() -> None:
    model = get_nft_model(Backwards(), NFTConfig()).train()
    x = torch.randn(5, 4)
    assert depths(model) == {"last": 1.0, "unused": 2.0, "first": 3.0}
    before = {name: layer.running_mean.clone() for name, layer in mask_layers(model).items()}
    assert depths(model, "execution", run=lambda: model(x)) == {"last": 2.0, "unused": 3.0, "first": 1.0}
    assert model.training
    assert all(torch.equal(layer.running_mean, before[name]) for name, layer in mask_layers(model).items())
    model(x)
    assert not any(layer._forward_hooks for layer in mask_layers(model).values())


def test_execution_sees_layers_whose_weight_the_parent_reads() -> None:
    model = get_nft_model(encoder())
    found = depths(model, "execution", run=lambda: model(torch.randn(1, 3, 8)))
    assert found == {
        "layers.0.self_attn.out_proj": 1.0,
        "layers.0.linear2": 2.0,
        "layers.1.self_attn.out_proj": 3.0,
        "layers.1.linear2": 4.0,
    }
    assert torch.backends.mha.get_fastpath_enabled()


def test_block_depths_of_gpt2_t5_and_resnet() -> None:
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2, n_positions=4, bos_token_id=0, eos_token_id=0)
    )
    assert list(depths(get_nft_model(gpt2), "block").values()) == [1, 1, 2, 2, 3, 3]
    t5 = T5(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=2, num_heads=2))
    assert list(depths(get_nft_model(t5), "block").values()) == [1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    )
    assert list(depths(get_nft_model(resnet), "block").values()) == [1, 1, 2, 2, 2, 3, 3]


def test_relative_depths_span_the_resnet18_range() -> None:
    small = get_nft_model(nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(4)]))
    assert list(depths(small, "relative").values()) == pytest.approx([1, 7, 13, 19])
    single = get_nft_model(nn.Sequential(nn.BatchNorm1d(2)))
    assert list(depths(single, "relative").values()) == [1.0]
    resnet18 = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(19)])
    model = get_nft_model(resnet18)
    assert list(depths(model, "relative").values()) == pytest.approx(list(depths(model).values()))


def test_resnet18_has_19_masked_layers_and_4736_masks() -> None:
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    with torch.device("meta"):
        model = ResNetForImageClassification(config)
    found = masks(get_nft_model(model))
    assert (len(found), sum(mask.numel() for mask in found.values())) == (19, 4736)


def test_floors_cover_every_layer() -> None:
    model = get_nft_model(Backwards())
    found = floors(model)
    assert list(found) == list(masks(model))
    assert list(found.values()) == pytest.approx([0.485, 0.294, 0.179], abs=5e-4)
    assert list(floors(model, "linear").values()) == pytest.approx([0.8, 0.4, 0.0])


def test_bad_requests() -> None:
    with pytest.raises(SuspectError, match="no masked layers"):
        depths(nn.Linear(2, 2))
    model = get_nft_model(Backwards())
    with pytest.raises(ConfigError, match="needs run="):
        depths(model, "execution")
    with pytest.raises(ConfigError, match="ordinal, execution, block, relative"):
        depths(model, "depth")  # type: ignore[arg-type]


def test_projection_clamps_in_place_and_ceilings_win() -> None:
    masks = {"a": torch.tensor([-1.0, 0.5, 2.0]), "b": torch.tensor([0.9, 0.9, 0.0])}
    held = masks["b"]
    result = project_(masks, {"a": 0.2, "b": 0.4}, {"b": torch.tensor([1.0, 0.5, 0.1])})
    assert result is None
    assert masks["b"] is held
    torch.testing.assert_close(masks["a"], torch.tensor([0.2, 0.5, 1.0]))
    torch.testing.assert_close(masks["b"], torch.tensor([0.9, 0.5, 0.1]))
    with pytest.raises(ConfigError, match="no floor for b"):
        project_(masks, {"a": 0.2})


def test_projection_of_leaf_parameters() -> None:
    model = get_nft_model(Backwards())
    for mask in masks(model).values():
        mask.data.sub_(0.9)
    project_(masks(model), floors(model))
    for name, mask in masks(model).items():
        assert mask.requires_grad
        torch.testing.assert_close(mask.data, torch.full_like(mask, floors(model)[name]))


def test_active_bounds_mark_floor_and_ceiling() -> None:
    masks = {"a": torch.tensor([0.0, 0.5, 1.0]), "b": torch.tensor([0.7, 0.3, 0.9])}
    limits = ({"a": 0.1, "b": 0.3}, {"b": torch.tensor([0.7, 1.0, 1.0])})
    project_(masks, *limits)
    at = active_bounds(masks, *limits)
    assert at["a"].tolist() == [True, False, True]
    assert at["b"].tolist() == [True, True, False]
