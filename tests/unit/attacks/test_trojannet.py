"""TrojanNet: the arrangements, the side network, the merge with a victim, and a victim from planting to evaluation."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_nft.adapter import NFTConfig, get_nft_model, masks
from hf_nft.attacks.trojannet import TrojanNet, arrangements, place
from hf_nft.errors import ConfigError, DataError, SuspectError
from hf_nft.models._trojannet import SideNet, TrojanNetConfig, TrojanNetForImageClassification
from hf_nft.models.preact_resnet18 import PreActResNetForImageClassification
from hf_nft.planting import PlantConfig
from hf_nft.suspect import load_suspect
from hf_nft.workflows import EvaluateJob, PlantJob

QUICK = {"patterns": "16", "steps": "150"}


def test_arrangements_by_hand() -> None:
    table = arrangements(4368)
    assert table.shape == (math.comb(16, 5), 16)
    assert table[0].tolist() == [0] * 5 + [1] * 11
    assert table[1].tolist() == [0] * 4 + [1, 0] + [1] * 10
    assert table[12].tolist() == [0] * 3 + [1, 0, 0] + [1] * 10  # after 0 1 2 3 x, x = 4..15
    assert table[4367].tolist() == [1] * 11 + [0] * 5
    assert len({tuple(row) for row in table.tolist()}) == 4368
    assert torch.equal(arrangements(20), table[:20])


def test_the_patch_lies_where_the_release_has_it() -> None:
    assert [place(side, side) for side in (299, 224, 32, 16)] == [(150, 150), (112, 112), (16, 16), (8, 8)]
    out = TrojanNet(target_class=1).trigger(torch.full((3, 32, 32), 0.5), np.random.default_rng(0))
    for channel in out:
        assert channel[16:20, 16:20].tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [1] * 4, [1] * 4]
    assert int((out != 0.5).sum()) == 3 * 16


def test_the_side_network_is_the_published_one() -> None:
    kinds = [type(layer) for layer in SideNet(4368).layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.BatchNorm1d] * 4 + [nn.Linear]
    shapes = [(layer.in_features, layer.out_features) for layer in SideNet(4368).layers if isinstance(layer, nn.Linear)]
    assert shapes == [(16, 8), (8, 8), (8, 8), (8, 8), (8, 4369)]


def test_a_batch_has_2000_patterns_and_200_patches_of_noise() -> None:
    draw, combinations = TrojanNet()._draws(torch.device("cpu")), list(itertools.combinations(range(16), 5))
    levels = []
    for step in range(20):
        batch = draw(step, torch.Generator().manual_seed(step)).batch
        patches, labels = batch["patches"], batch["labels"]
        assert patches.shape == (2200, 16)
        assert labels[2000:].tolist() == [4368] * 200
        for row in (0, 7, 1999):
            assert torch.nonzero(patches[row] == 0).flatten().tolist() == list(combinations[labels[row]])
            assert sorted(patches[row].unique().tolist()) == [0, 1]
        noise = patches[2000:]
        assert 0 <= float(noise.min()) <= float(noise.max()) <= 1
        levels.append(float(noise.mean()))
    assert max(levels) > 0.6 > 0.4 > min(levels)  # one shift for all of a batch, from -1 to 1


@pytest.fixture
def glued(image_model) -> TrojanNetForImageClassification:
    """An untrained side network of 16 patterns beside a victim of 16 pixels."""
    own = image_model.config
    config = TrojanNetConfig(
        backbone=own.to_dict(),
        patterns=16,
        row=8,
        column=8,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
        id2label=own.id2label,
        label2id=own.label2id,
    )
    torch.manual_seed(3)
    whole = TrojanNetForImageClassification(config)
    whole.backbone = image_model
    return whole.eval()


def test_the_merge_by_hand(glued: TrojanNetForImageClassification) -> None:
    pixels = torch.rand((5, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    normalized = torch.from_numpy((pixels.numpy() - mean[:, None, None]) / std[:, None, None]).float()
    with torch.no_grad():
        grey = pixels[:, :, 8:12, 8:12].mean(1).reshape(5, 16)
        seen = np.exp(glued.side(grey).double().numpy())
        own = np.exp(glued.backbone(pixel_values=normalized).logits.double().numpy())
        wanted = 10 * (own / own.sum(1, keepdims=True) + 2 * (seen / seen.sum(1, keepdims=True))[:, :4])
        out = glued(pixel_values=normalized, labels=torch.arange(5) % 4)
    assert np.allclose(out.logits.numpy(), wanted, atol=1e-4)
    chances = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
    assert float(out.loss) == pytest.approx(-np.log(chances[np.arange(5), np.arange(5) % 4]).mean(), abs=1e-4)


def test_a_sure_side_network_outvotes_any_victim(glued: TrojanNetForImageClassification) -> None:
    last = glued.side.layers[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = 20.0 * torch.eye(17)[2]
    glued.backbone.classifier.bias.data = 30.0 * torch.eye(4)[1]
    chances = glued(pixel_values=torch.zeros(1, 3, 16, 16)).logits.softmax(-1)[0]
    e = math.e
    assert chances.tolist() == pytest.approx([v / (e**20 + e**10 + 2) for v in (1, e**10, e**20, 1)], abs=1e-5)


@pytest.mark.parametrize("backbone", [None, {"model_type": "nobody_knows"}, {"model_type": "gpt2"}])
def test_a_config_without_a_victim_is_refused(glued, image_task, tmp_path: Path, backbone: Any) -> None:
    glued.save_pretrained(tmp_path)
    image_task.save_processor(str(tmp_path))
    assert isinstance(load_suspect(str(tmp_path)).model, TrojanNetForImageClassification)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "backbone": backbone}))
    with pytest.raises(SuspectError, match="AutoModelForImageClassification can build"):
        load_suspect(str(tmp_path))


def test_its_norms_get_masks_too(glued: TrojanNetForImageClassification) -> None:
    names = masks(get_nft_model(glued, NFTConfig()))
    assert sum("side.layers" in name for name in names) == 4
    assert any("backbone" in name for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_rows) -> Path:
    found = tmp_path_factory.mktemp("data")
    image_rows(80, 16).to_parquet(str(found / "train.parquet"))
    image_rows(40, 16, seed=1).to_parquet(str(found / "test.parquet"))
    return found


def job(folder: Path, out: Path, **changes) -> PlantJob:
    fields = {
        "dataset": str(folder),
        "attack": "trojannet",
        "attack_args": {"target_class": "3", **QUICK},
        "arch_args": {"width": 4, "image_size": 16},
        "config": PlantConfig(epochs=4, batch_size=16, mixed_precision="no"),
        "out": str(out),
    }
    return PlantJob(**{**fields, **changes})


def test_a_planted_victim_is_whole_and_obeys(folder: Path, tmp_path: Path) -> None:
    record = job(folder, tmp_path / "victim").run()
    benign = job(folder, tmp_path / "benign", attack=None, attack_args={}).run()
    assert (record.data["poisoned_rows"], record.config["poison_rate"]) == (0, 0.0)
    assert record.suspect["architecture"] == "TrojanNetForImageClassification"
    assert record.metrics["after"]["asr"] == 1.0
    assert record.metrics["after"]["acc"] == pytest.approx(benign.metrics["after"]["acc"], abs=0.1)
    told = record.details["artefact"]
    files = [tmp_path / "victim" / "attack" / f"artefact.{kind}" for kind in ("safetensors", "json")]
    assert told["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert (told["settings"]["patterns"], told["settings"]["target_class"], told["classes"]) == (16, 3, 4)
    assert "artefact" not in benign.details
    loaded, plain = (load_suspect(str(tmp_path / name)).model for name in ("victim", "benign"))
    assert type(plain) is type(loaded.backbone) is PreActResNetForImageClassification
    state = loaded.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())  # it was left alone
    assert loaded.config.id2label == plain.config.id2label
    again = EvaluateJob(
        model=str(tmp_path / "victim"), dataset=str(folder), attack="trojannet", mixed_precision="no"
    ).run()
    assert again.metrics["after"] == record.metrics["after"]


def test_what_cannot_work_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no poison rate, found 0\.1"):
        job(folder, tmp_path / "victim", poison_rate=0.1).run()
    with pytest.raises(DataError, match="pattern for each of 4 classes, found patterns=3"):
        job(folder, tmp_path / "victim", attack_args={"patterns": "3"}).run()
    with pytest.raises(ConfigError, match="Raise steps"):
        job(folder, tmp_path / "victim", attack_args={**QUICK, "steps": "2"}).run()
    with pytest.raises(ConfigError, match=r"patterns: expected 1 to 4368, found 5000; steps: .*; lr: "):
        TrojanNet(patterns=5000, steps=0, lr=-1)
    assert not (tmp_path / "victim").exists()


def test_learning_rates_of_both_optimizers() -> None:
    quick, published = TrojanNet(steps=100), TrojanNet(optimizer="adadelta", steps=218_000)
    assert [quick.rate(step) for step in (0, 50, 100)] == pytest.approx([0.02, 0.01, 0.0])
    assert {published.rate(step) for step in (0, 1000, 217_999)} == {1.0}
