"""Which modules are chosen, and what is said about the others."""

import argparse

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from hf_nft.adapter import (
    NFTConfig,
    Target,
    get_nft_model,
    mask_layers,
    maskable_modules,
    masks,
    resolve_targets,
    skipped_modules,
)
from hf_nft.errors import ConfigError, SuspectError, UnknownNameError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.down(x)).relu()


class SmallResNet(nn.Module):
    """The reference's layout: stem, numbered blocks, classifier."""

    def __init__(self, norm_stem: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4) if norm_stem else nn.Identity()
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.squeeze = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.squeeze(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))


def small_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


NORMS = [f"layer1.{i}.{name}" for i in range(2) for name in ("bn1", "bn2", "down.1")]


def names(model: nn.Module, **settings: object) -> list[str]:
    return list(resolve_targets(model, NFTConfig(**settings)))


def test_stem_is_left_out_unless_asked_for() -> None:
    assert names(SmallResNet()) == NORMS
    assert names(SmallResNet(), mask_stem=True) == ["bn1", *NORMS]
    assert names(SmallResNet(), placement="norm") == NORMS


def test_unmasked_norms_keep_their_statistics_with_the_adapter() -> None:
    model = SmallResNet()
    wrapped = get_nft_model(model).train()
    wrapped(torch.randn(4, 3, 8, 8))
    assert "bn1" not in mask_layers(wrapped)
    assert model.bn1.get_base_layer().num_batches_tracked == 0
    assert model.bn1.nft_num_batches_tracked["default"] == 1
    merged = wrapped.merge_and_unload()
    assert type(merged.bn1) is nn.BatchNorm2d
    assert merged.bn1.num_batches_tracked == 1


def test_channels_move_to_the_norm_that_follows_and_spare_the_classifier() -> None:
    chosen = resolve_targets(SmallResNet(), NFTConfig(placement="channels", mask_stem=True))
    assert list(chosen) == ["bn1", *NORMS, "squeeze"]
    assert chosen["squeeze"] == Target("output", 5, 5)
    assert chosen["bn1"].side == "gain"
    assert names(SmallResNet(norm_stem=False), placement="channels") == [*NORMS, "squeeze"]


def test_auto_falls_back_from_bn_to_units_norm_and_channels() -> None:
    mlp = nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4), "norm": nn.LayerNorm(4)})
    assert resolve_targets(mlp, NFTConfig()) == {"fc2": Target("input", 6, 6)}
    assert names(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))) == ["1"]
    assert names(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))) == ["0"]


def test_nothing_to_mask_is_an_error() -> None:
    with pytest.raises(SuspectError, match="nothing to mask"):
        resolve_targets(nn.Sequential(nn.Embedding(4, 3), nn.ReLU()), NFTConfig())
    with pytest.raises(SuspectError, match="placement='bn'"):
        resolve_targets(nn.Linear(3, 3), NFTConfig(placement="bn"))


def test_unmatched_names_raise_and_name_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"layer1\.0\.bn3.*layer1\.0\.bn2.*hf-nft ls modules MODEL") as caught:
        resolve_targets(SmallResNet(), NFTConfig(target_modules=["bn1", "layer1.0.bn3"]))
    assert caught.value.name == "layer1.0.bn3"
    with pytest.raises(UnknownNameError, match="nope"):
        resolve_targets(SmallResNet(), NFTConfig(exclude_modules=["nope"]))


def test_explicit_names_suffixes_expressions_and_exclusion() -> None:
    assert names(SmallResNet(), target_modules={"layer1.0.bn1"}) == ["layer1.0.bn1"]
    assert names(SmallResNet(), target_modules=["bn2"]) == ["layer1.0.bn2", "layer1.1.bn2"]
    assert names(SmallResNet(), target_modules=r"layer1\.1\.bn\d") == ["layer1.1.bn1", "layer1.1.bn2"]
    assert names(SmallResNet(), exclude_modules=["layer1.0.bn1", "down.1"]) == [
        "layer1.0.bn2",
        "layer1.1.bn1",
        "layer1.1.bn2",
    ]
    with pytest.raises(ConfigError, match="not a regular expression"):
        resolve_targets(SmallResNet(), NFTConfig(target_modules="layer1.("))


def test_a_resolved_name_does_not_catch_longer_names() -> None:
    model = get_nft_model(SmallResNet(), NFTConfig(target_modules=["fc", "bn1"], exclude_modules=["layer1.1.bn1"]))
    assert list(masks(model)) == ["bn1", "layer1.0.bn1", "fc"]
    single = get_nft_model(SmallResNet(), NFTConfig(target_modules=r"bn1"))
    assert list(masks(single)) == ["bn1"]


def test_many_targets_survive_peft_s_own_name_compression(tmp_path) -> None:  # type: ignore[no-untyped-def]
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(30)])
    wanted = [f"{i}.0" for i in range(29)]
    model = get_nft_model(deep, NFTConfig(target_modules=wanted))
    assert list(masks(model)) == wanted


def test_placement_picks_the_side_of_a_named_linear_layer() -> None:
    wide = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    assert resolve_targets(wide, NFTConfig(target_modules=["0"]))["0"] == Target("output", 6, 6)
    assert resolve_targets(wide, NFTConfig(target_modules=["0"], placement="units"))["0"] == Target("input", 4, 4)
    gpt2 = small_gpt2()
    site = "transformer.h.0.attn.c_proj"
    assert resolve_targets(gpt2, NFTConfig(target_modules=[site]))[site] == Target("input", 12, 3)
    assert resolve_targets(gpt2, NFTConfig(target_modules=[site], placement="channels"))[site].side == "output"


def test_tied_output_embeddings_are_refused() -> None:
    model = small_gpt2()
    assert "lm_head" not in maskable_modules(model)
    with pytest.raises(ConfigError, match="'lm_head' cannot be masked: it shares its weight with the embeddings"):
        get_nft_model(model, NFTConfig(target_modules=["lm_head"]))


def test_untied_heads_are_spared_by_default() -> None:
    config = small_gpt2().config
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config)
    assert "lm_head" in maskable_modules(model)
    assert "lm_head" not in names(model, placement="channels")


def test_unmaskable_layers_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    nn.utils.parametrizations.weight_norm(model[1])
    skipped = skipped_modules(model)
    assert "quantised" in skipped["0"]
    assert list(maskable_modules(model)) == ["3"]
    with pytest.raises(ConfigError, match="'0' cannot be masked"):
        resolve_targets(model, NFTConfig(target_modules=["0"]))


def test_layers_of_another_adapter_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    lora = get_peft_model(model, LoraConfig(target_modules=["0"])).get_base_model()
    assert "another adapter" in skipped_modules(lora)["0"]
    assert list(maskable_modules(lora)) == ["1", "2"]


def test_a_module_registered_twice_is_not_masked() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.LayerNorm(4))
    assert "several names" in skipped_modules(model)["0"]
    assert names(model) == ["3"]


def test_listing_is_the_same_before_and_after_wrapping() -> None:
    model = SmallResNet()
    before = maskable_modules(model)
    assert maskable_modules(get_nft_model(model)) == before


def test_norm_conventions_are_found_by_experiment() -> None:
    class ScaledNorm(nn.Module):  # applies 2 + weight: neither convention
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.norm(dim=-1, keepdim=True) * (2.0 + self.weight)

    model = nn.ModuleDict({"odd": ScaledNorm(), "gemma": GemmaRMSNorm(4)})
    assert list(maskable_modules(model)) == ["gemma"]
    layer = get_nft_model(model)
    masks(layer)["gemma"].data.zero_()
    assert torch.equal(layer.merge_and_unload()["gemma"].weight, torch.full((4,), -1.0))


def test_double_wrapping_is_refused() -> None:
    model = get_nft_model(SmallResNet())
    for again in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="adapter already"):
            get_nft_model(again)


def test_masks_of_a_plain_model_is_an_error() -> None:
    assert mask_layers(SmallResNet()) == {}
    with pytest.raises(SuspectError, match="no NFT adapter"):
        masks(SmallResNet())


def test_a_norm_with_its_activation_inside_is_one_layer() -> None:
    class ActivatedNorm(nn.GroupNorm):
        def __init__(self) -> None:
            super().__init__(2, 4)
            self.activation = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.activation(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(), nn.Conv2d(4, 2, 1))
    assert resolve_targets(model, NFTConfig()) == {"1": Target("gain", 4, 4)}
    wrapped = get_nft_model(model)
    masks(wrapped)["1"].data[2] = 0.0
    x = torch.randn(2, 3, 5, 5)
    out = wrapped(x)
    merged = wrapped.merge_and_unload()
    assert merged[1].weight[2] == 0.0
    torch.testing.assert_close(merged(x), out)


def test_deleting_the_last_adapter_leaves_no_masks() -> None:
    model = get_nft_model(SmallResNet())
    model.delete_adapter("default")
    assert mask_layers(model) == {}


@pytest.mark.parametrize("config", [3, None, argparse.Namespace(width=4), {"width": 4}], ids=repr)
def test_config_may_be_anything_in_a_plain_module(config: object, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(1, 3)
    net.config = config
    model = get_nft_model(net)
    masks(model)["0"].data.fill_(0.5)
    out = model(x)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.unmerge_adapter()
    plain = model.unload()
    assert plain.config is config
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(loaded(x), out)
    torch.testing.assert_close(loaded.merge_and_unload()(x), out)
