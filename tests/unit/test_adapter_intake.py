"""A suspect that comes as a LoRA on a base model: merged, and nothing it names is trusted."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_nft.errors import ConfigError, HFNFTError, NetworkError, SuspectError, UnsafeModelError
from hf_nft.suspect import load_suspect
from hf_nft.workflows import InspectJob


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The adapter's folder, and what PEFT itself makes of base and adapter."""
    torch.manual_seed(1)
    model = ViTForImageClassification.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()}


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_is_merged_into_its_base(lora, base: Path) -> None:
    folder, merged = lora
    suspect = load_suspect(str(folder))
    found = suspect.model.state_dict()
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], value) for name, value in merged.items())
    plain = load_suspect(str(base)).model.state_dict()
    assert not torch.equal(found["classifier.weight"], plain["classifier.weight"])
    assert type(suspect.model) is ViTForImageClassification
    assert suspect.provenance()["base"] == {"name": str(base), "revision": None}
    assert suspect.provenance()["name"] == str(folder)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"peft_type": "IA3"}, SuspectError, "expected a LoRA adapter, found 'IA3'"),
        ({"peft_type": None}, SuspectError, "expected a LoRA adapter"),
        ({"base_model_name_or_path": None}, SuspectError, "expected the name of a base model"),
        ({"base_model_name_or_path": ["a"]}, SuspectError, "expected the name of a base model"),
        ({"base_model_name_or_path": "/no/such/base"}, SuspectError, "expected a folder or a Hub id"),
        ({"base_model_name_or_path": "org/base"}, NetworkError, "org/base"),
        ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, UnsafeModelError, "plain LoRA"),
        ({"layer_replication": [[0, 10**9]]}, UnsafeModelError, "plain LoRA"),
        ({"r": 10**9}, SuspectError, "expected an adapter that fits ViTForImageClassification"),
        ({"r": "many"}, SuspectError, "expected an adapter that fits"),
        ({"target_modules": ["no_such_layer"]}, SuspectError, "expected an adapter that fits"),
        ({"target_modules": ["q_proj", "fc1", "fc2"]}, SuspectError, "expected an adapter that fits"),
    ],
    ids=str,
)
def test_an_adapter_that_is_refused(lora, changes: dict[str, object], error: type[Exception], text: str) -> None:
    edit(lora[0], **changes)
    with pytest.raises(error, match=text):
        load_suspect(str(lora[0]))


def test_adapter_weights_of_another_shape(lora) -> None:
    file = lora[0] / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    save_file({**weights, name: torch.zeros(7, 3)}, file)
    with pytest.raises(SuspectError, match=r"expected an adapter that fits .* size mismatch for"):
        load_suspect(str(lora[0]))


def test_a_classifier_for_other_labels_is_named(lora) -> None:
    file = lora[0] / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "base_model.model.classifier.weight": torch.zeros(7, 16)}, file)
    told = r"whose classifier\.weight is \(4, 16\), found one that replaces it by \(7, 16\), as for other labels"
    with pytest.raises(SuspectError, match=told):
        load_suspect(str(lora[0]))
    (refused,) = InspectJob(model=str(lora[0])).run().refused
    assert "as for other labels" in refused


def test_a_missing_adapter_weight(lora) -> None:
    file = lora[0] / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "lora_A" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(SuspectError, match="expected an adapter that fits"):
        load_suspect(str(lora[0]))


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("allow", [False, True])
def test_a_pickled_adapter_is_never_loaded(lora, tmp_path: Path, allow: bool) -> None:
    (lora[0] / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "ran")}, lora[0] / "adapter_model.bin")
    with pytest.raises(ConfigError if allow else UnsafeModelError):
        load_suspect(str(lora[0]), allow_pickle=allow)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_base_is_never_loaded(lora, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "ran")}, base / "pytorch_model.bin")
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin, a pickle file"):
        load_suspect(str(lora[0]))
    assert not (tmp_path / "ran").exists()


def test_an_adapter_on_an_adapter(lora, tmp_path: Path) -> None:
    edit(lora[0], base_model_name_or_path=str(lora[0]))
    with pytest.raises(HFNFTError, match="expected a whole model as its base, found the adapter"):
        load_suspect(str(lora[0]))
