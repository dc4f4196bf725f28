"""Configs that ask for what the files do not hold: refused before memory or time is spent on them."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_nft.blueprint import LARGEST_COUNT, check_counts, check_size, draw
from hf_nft.errors import SuspectError
from hf_nft.intake import locate
from hf_nft.suspect import load_suspect, task_of
from hf_nft.weights import Stored, stored_tensors, weight_files


def edit(folder: Path, **changes: object) -> None:
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(content))


def blueprint(folder: Path) -> nn.Module:
    source = locate(str(folder))
    config = source.read_json("config.json")
    return draw(source, task_of(config, "x"), config, stored_tensors(source, weight_files(source)))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A small GPT-2 without tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_shapes_without_data(suspect_folder: Path) -> None:
    model = blueprint(suspect_folder)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = load_file(suspect_folder / "model.safetensors")
    assert found == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert nn.Linear(1, 1).weight.device.type == "cpu"
    assert len(nn.modules.module._global_parameter_registration_hooks) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks": [10**9, 1, 1, 1]},
        {"blocks": [1, 1, 1, 50_000]},
        {"width": 10**7},
        {"width": 10**30},
        {"width": -4},
        {"width": "wide"},
        {"num_labels": 10**9},
        {"id2label": {str(10**9): "x"}, "num_labels": 10**8},
        {"image_size": None, "blocks": None},
    ],
    ids=str,
)
def test_absurd_values(suspect_folder: Path, changes: dict[str, object]) -> None:
    edit(suspect_folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SuspectError):
        load_suspect(str(suspect_folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_layer": 10**9}, "found n_layer = 1e"),
        ({"n_layer": 90_000}, "found one for more than 1"),
        ({"n_head": 10**12}, "found n_head = 1e"),
        ({"vocab_size": 10**8}, "numbers in its files, found one for"),
        ({"n_positions": 10**9}, "numbers in its files, found one for"),
        ({"n_embd": 2**40}, "expected a config"),
        ({"task_specific_params": {"x": {"num_hidden_layers": 10**10}}}, "found num_hidden_layers = 1e"),
    ],
    ids=str,
)
def test_absurd_values_of_a_language_model(text_folder: Path, changes: dict[str, object], text: str) -> None:
    assert blueprint(text_folder).config.n_layer == 2
    edit(text_folder, **changes)
    with pytest.raises(SuspectError, match=text):
        blueprint(text_folder)


def test_a_class_that_does_not_exist(suspect_folder: Path) -> None:
    edit(suspect_folder, architectures=["NoSuchNetForImageClassification"])
    with pytest.raises(SuspectError, match=r"expected the class PreActResNetForImage.*'NoSuchNetForImageClassific"):
        load_suspect(str(suspect_folder))


def test_counts_at_the_limit() -> None:
    check_counts("x", {"num_layers": LARGEST_COUNT, "vocab_size": 10**12, "n": {"depths": [1, True, None, "9" * 99]}})
    for config in ({"num_layers": LARGEST_COUNT + 1}, {"depths": [1, 2.0e5]}, {"a": [{"num_labels": -(10**6)}]}):
        with pytest.raises(SuspectError, match="Do not load it"):
            check_counts("x", config)


def test_size_against_the_files() -> None:
    with torch.device("meta"):
        model = nn.Linear(40_000, 40_000, bias=False)  # 1.6e9
    held = {"weight": Stored("F32", (40_000, 40_000), "x")}
    check_size("x", model, {}, held)
    codes = {"weight": Stored("I32", (40_000, 5_000), "x")}
    check_size("x", model, {"quantization_config": {"bits": 4}}, codes)
    with pytest.raises(SuspectError, match="200,000,000 numbers in its files, found one for 1,600,000,000"):
        check_size("x", model, {}, codes)
