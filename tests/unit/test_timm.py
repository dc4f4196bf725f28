"""timm's models: their own config layout, their transform, and what their config must not lead to.

timm needs torchvision and is in no extra of ours: what needs it runs where it is installed.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_nft.errors import DataError, SuspectError, UnsafeModelError
from hf_nft.suspect import load_suspect
from hf_nft.tasks._pixels import from_timm
from hf_nft.tasks.image_classification import ImageClassification

SQUARE = {"input_size": (3, 32, 32), "crop_pct": 0.8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
CONFIG = {
    "architecture": "test_resnet",
    "num_classes": 3,
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {**SQUARE, "interpolation": "bicubic"},
}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_the_transform_is_timms() -> None:
    """Shorter side to floor(32 / 0.8) = 40, then the middle 32 x 32, then (x / 255 - mean) / std."""
    processor = from_timm({**SQUARE, "interpolation": "bilinear"})
    pixels = np.asarray(NOISE.resize((56, 40), Image.Resampling.BILINEAR))[4:36, 12:44] / 255
    expected = ((pixels - SQUARE["mean"]) / SQUARE["std"]).transpose(2, 0, 1)
    assert np.allclose(processor(NOISE, return_tensors="np")["pixel_values"][0], expected, atol=1e-6)
    squashed = from_timm({**SQUARE, "interpolation": "bilinear", "crop_mode": "squash"})
    pixels = np.asarray(NOISE.resize((40, 40), Image.Resampling.BILINEAR))[4:36, 4:36] / 255
    expected = ((pixels - SQUARE["mean"]) / SQUARE["std"]).transpose(2, 0, 1)
    assert np.allclose(squashed(NOISE, return_tensors="np")["pixel_values"][0], expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{"crop_mode": "border"}, {"input_size": (3, 32, 48)}, {"interpolation": "odd"}])
def test_another_transform_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises((ValueError, LookupError)):
        from_timm({**SQUARE, **changes})


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_without_timm_the_way_out_is_named(folder: Path) -> None:
    with pytest.raises(SuspectError, match="pip install timm"):
        load_suspect(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "hf-hub:org/other"},
        {"architecture": "local-dir:/tmp/x"},
        {"model_args": 5},
        *({"model_args": {key: "x"}} for key in ("checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir")),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_config_leads_to_no_other_weights(folder: Path, inside: bool, changes: dict[str, object]) -> None:
    config = {**CONFIG, **changes}
    if inside:
        config = {"model_type": "hf_nft_trojannet", "backbone": {**config, "model_type": "timm_wrapper"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeModelError, match="architecture of timm"):
        load_suspect(str(folder))


@pytest.mark.parametrize("broken", [{"mean": 3}, {"input_size": []}, {"crop_mode": "border"}])
def test_a_broken_transform_is_an_error_of_the_data(tmp_path: Path, broken: dict[str, object]) -> None:
    pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "pretrained_cfg": {**SQUARE, **broken}}))
    with pytest.raises(DataError, match="expected an image processor"):
        ImageClassification.load_processor(str(tmp_path))


def test_a_model_of_timm_loads_and_is_masked(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=3).eval()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    suspect = load_suspect(str(tmp_path))
    assert suspect.task.name == "image_classification"
    transform = timm.data.create_transform(**timm.data.resolve_data_config(CONFIG["pretrained_cfg"]))
    pixels = suspect.task.processor(NOISE, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], transform(NOISE))
    assert torch.allclose(suspect.model(pixel_values=pixels).logits, model(pixels), atol=1e-6)
