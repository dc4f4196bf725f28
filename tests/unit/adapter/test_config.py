"""Settings: checks, storage, and independence of a loaded adapter from the placement rules."""

import dataclasses
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from hf_nft.adapter import NFTConfig, get_nft_model, masks
from hf_nft.adapter.config import add_peft_type
from hf_nft.errors import ConfigError, UnknownNameError


def test_every_own_field_has_help() -> None:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(NFTConfig) if field.name not in inherited]
    assert len(own) >= 10
    assert [field.name for field in own if not field.metadata.get("help")] == []


def test_all_problems_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        NFTConfig(placement="everywhere", init_mask=0.0, exclude_modules=[])
    for name in ("placement", "init_mask", "exclude_modules"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="contradict"):
        NFTConfig(placement="bn", target_modules=["a"])


def test_the_enum_member_is_real_and_unique() -> None:
    assert add_peft_type("NFT") is PeftType.NFT is PeftType("NFT")
    assert PeftType.NFT.value == "NFT"
    assert list(PeftType).count("NFT") == 1


def test_the_user_s_config_is_not_changed_and_fits_several_models() -> None:
    config = NFTConfig()
    get_nft_model(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), config)
    assert config == NFTConfig()
    other = get_nft_model(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), config)
    assert list(masks(other)) == ["0"]


def test_saved_config_holds_what_was_resolved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = get_nft_model(nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4)}), NFTConfig(init_mask=0.5))
    assert torch.equal(masks(model)["fc2"], torch.full((6,), 0.5))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "NFT"
    assert (stored["resolved_placement"], stored["resolved_modules"]) == ("units", ["fc2"])
    assert stored["input_units"] == {"fc2": 6}
    assert stored["hf_nft_version"]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), NFTConfig)


def test_loading_does_not_ask_the_placement_rules(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = get_nft_model(nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4)}))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"placement": "norm"}))  # would find nothing
    loaded = PeftModel.from_pretrained(nn.ModuleDict({"fc1": nn.Linear(4, 6), "fc2": nn.Linear(6, 4)}), tmp_path)
    assert list(masks(loaded)) == ["fc2"]
    with pytest.raises(UnknownNameError, match="another model"):
        PeftModel.from_pretrained(nn.ModuleDict({"first": nn.Linear(4, 6)}), tmp_path)


def test_peft_s_own_front_door() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), NFTConfig())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["base_model.model.1.nft_mask.default"]


def test_wrapping_keeps_the_mode() -> None:
    model = get_nft_model(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).eval())
    assert not any(module.training for module in model.modules() if not isinstance(module, nn.ParameterDict))
