"""From a victim to a run folder, by the real commands; the folder is then opened with other people's libraries."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_nft.cli.main import main
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_nft.models.base import image_processor

CLASSES = ("cat", "dog", "frog", "ship")


@pytest.fixture(scope="session")
def purified(tmp_path_factory, world, fast) -> Path:
    """Purify the victim, once for all tests."""
    folder = tmp_path_factory.mktemp("purified")
    told = ["purify", world.victim, "--dataset", world.data, "--attack", "badnets", *fast, "--out", "clean"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(told) == 0
    return folder


@pytest.fixture
def clean(purified: Path, tmp_path) -> Path:
    """Return a copy of what purifying the victim left, in a folder of the test's own."""
    return Path(shutil.copytree(purified, tmp_path, dirs_exist_ok=True)) / "clean"


def test_the_run_folder_is_whole(clean: Path) -> None:
    found = {str(file.relative_to(clean)) for file in clean.rglob("*") if file.is_file()}
    assert found == {
        "README.md",
        "record.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "figures/loss.png",
        "figures/masks.png",
        "model/config.json",
        "model/model.safetensors",
        "model/preprocessor_config.json",
    }
    assert sorted(p.name for p in clean.parent.iterdir()) == ["clean"]


def test_the_run_folder_is_no_model_but_its_subfolder_is_named(clean: Path, refused, world) -> None:
    refused(3, ["found none. Pass clean/model."], "evaluate", "clean/", "--dataset", world.data)


def test_the_victim_folder_is_whole(world) -> None:
    found = {file.name for file in Path(world.victim).rglob("*") if file.is_file()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "record.json", "README.md"} <= found
    assert not any(name.endswith((".pt", ".bin", ".part")) or name == "job.json" for name in found)
    record = json.loads((Path(world.victim) / "record.json").read_text())
    assert record["data"]["train_rows"] == 84  # 120 less the held-out 30 %
    assert record["data"]["poisoned_rows"] == 8


def test_the_command_is_that_which_was_given(clean: Path, world) -> None:
    record = json.loads((clean / "record.json").read_text())
    assert record["command"].startswith(f"hf-nft purify {world.victim} --dataset {world.data} --attack badnets --shots")
    assert "hf-nft purify .../victim --dataset" in (clean / "README.md").read_text()


def test_the_record(clean: Path) -> None:
    record = json.loads((clean / "record.json").read_text())
    assert record["schema_version"] == 1
    assert record["kind"] == "purify"
    assert record["config"]["preset"] == "default"
    assert record["config"]["defense"] == "nft"
    assert record["shots"]["per_class"] == 2
    assert len(record["shots"]["indices"]) == len(set(record["shots"]["indices"])) == 8
    for moment in ("before", "after"):
        values = record["metrics"][moment]
        assert {"acc", "asr", "racc"} <= set(values)
        assert all(0 <= values[name] <= 1 for name in ("acc", "asr", "racc"))
    assert record["attack"]["name"] == "badnets"
    assert [len(losses) for losses in record["losses"].values()] == [2]


def test_shots_are_rows_that_the_victim_never_saw(clean: Path, rows, world) -> None:
    from hf_nft.shots import held_out

    indices = json.loads((clean / "record.json").read_text())["shots"]["indices"]
    assert set(indices) <= set(held_out(120, 0.3).tolist())
    labels = np.asarray(rows["train"]["label"])[indices]
    assert np.bincount(labels).tolist() == [2, 2, 2, 2]


def test_the_card_loads_and_repeats_the_record(clean: Path) -> None:
    card = ModelCard.load(clean / "README.md")
    record = json.loads((clean / "record.json").read_text())
    assert card.data.pipeline_tag == "image-classification"
    results = {result.metric_type for result in card.data.eval_results}
    assert results
    assert f"{record['metrics']['after']['acc']:.1%}".rstrip("%") in card.text


def test_adapter_on_the_suspect_equals_the_merged_model(clean: Path, world) -> None:
    merged = AutoModelForImageClassification.from_pretrained(clean / "model").eval()
    suspect = AutoModelForImageClassification.from_pretrained(world.victim).eval()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = suspect(pixel_values=pixels).logits
        cured = PeftModel.from_pretrained(suspect, str(clean / "adapter")).eval()(pixel_values=pixels).logits
        after = merged(pixel_values=pixels).logits
    torch.testing.assert_close(cured, after, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, atol=1e-5)
    assert merged.config.id2label == dict(enumerate(CLASSES))


def test_json_is_the_only_thing_on_stdout(cli, world, fast) -> None:
    done = cli("purify", world.victim, "--dataset", world.data, *fast, "--out", "clean", "--json")
    record = json.loads(done.out)
    assert record["metrics"]["after"]["asr"] is None
    assert math.isclose(
        record["metrics"]["after"]["acc"], json.loads(Path("clean/record.json").read_text())["metrics"]["after"]["acc"]
    )
    done = cli("evaluate", "clean/model", "--dataset", world.data, "--json")
    assert json.loads(done.out)["metrics"]["after"]["acc"] == record["metrics"]["after"]["acc"]


def test_the_attack_of_a_victim_is_remembered(cli, world) -> None:
    """Naming the attack is enough: its settings come from the victim's record, and the command line overrides them."""
    told = ["evaluate", world.victim, "--dataset", world.data, "--attack", "badnets", "--json"]
    plain = json.loads(cli(*told).out)
    assert plain["attack"]["target_class"] == 0
    other = json.loads(cli(*told, "--attack-arg", "target_class=2").out)
    assert other["attack"]["target_class"] == 2
    assert other["metrics"]["counts"]["after"]["asr"]["total"] == 30


def test_evaluate_prints_a_table_and_a_hint(cli, world) -> None:
    done = cli("evaluate", world.victim, "--dataset", world.data, "--attack", "badnets", "--limit", "12")
    assert done.code == 0
    assert "12 test rows" in done.out
    assert "ASR" in done.out
    assert "hf-nft purify" in done.err


def test_evaluate_leaves_the_shots_out_where_there_is_one_split(cli, world, rows, store, fast) -> None:
    import datasets

    data = store(datasets.DatasetDict(train=rows["test"]))
    assert cli("purify", world.victim, "--dataset", data, *fast, "--out", "clean").code == 0
    assert json.loads(Path("clean/record.json").read_text())["data"]["test_rows"] == 32
    done = cli("evaluate", "clean/model", "--dataset", data, "--json")
    assert json.loads(done.out)["data"]["test_rows"] == 32


def test_a_class_without_examples_is_doubted(cli, world, rows, store, fast) -> None:
    data = store(rows.filter(lambda row: row["label"] != 3))
    done = cli("purify", world.victim, "--dataset", data, *fast, "--out", "clean", "--json")
    assert done.code == 0, done.err
    said = {doubt["code"]: doubt["text"] for doubt in json.loads(done.out)["doubts"]}
    assert said["missing-classes"].startswith("1 of the suspect's 4 classes")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_convolutional_network_stored_narrow_comes_back_narrow(cli, world, stock, fast, dtype) -> None:
    AutoModelForImageClassification.from_pretrained(stock["resnet"]).to(dtype).save_pretrained("narrow")
    image_processor(16).save_pretrained("narrow")
    done = cli("purify", "narrow", "--dataset", world.data, *fast, "--out", "clean")
    assert done.code == 0, done.err
    stored = load_file("clean/model/model.safetensors").values()
    assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {dtype}


def test_a_trigger_of_ones_own(cli, world) -> None:
    from PIL import Image

    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save("patch.png")
    done = cli("evaluate", world.victim, "--dataset", world.data, "--trigger", "patch.png", "--json")
    record = json.loads(done.out)
    assert record["attack"] == {**record["attack"], "name": "patch", "trigger_file": "patch.png"}
    assert 0 <= record["metrics"]["after"]["asr"] <= 1


@pytest.mark.parametrize("defense", ["identity", "finetune", "bn_refresh_only"])
def test_every_other_defense_writes_a_model_and_no_adapter(cli, world, defense: str) -> None:
    steps = ["--set", "epochs=2"] if defense == "finetune" else []
    told = ["--dataset", world.data, "--defense", defense, *steps, "--set", "batch_size=8", "--shots", "2"]
    done = cli("purify", world.victim, *told, "--out", "clean")
    assert done.code == 0, done.err
    assert Path("clean/model/model.safetensors").exists()
    assert not Path("clean/adapter").exists()
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            load_file("clean/model/model.safetensors").values(),
            load_file(Path(world.victim) / "model.safetensors").values(),
            strict=True,
        )
    )
    assert same == (defense == "identity")


def test_the_full_default_preset_and_the_paper_preset(cli, world) -> None:
    short = ["--set=steps=2", "--set=batch_size=8", "--shots=2", "--set=mixed_precision=no"]
    told = ["purify", world.victim, "--dataset", world.data, *short]
    exposures = ["--set=exposures=2", "--set=unlearn_steps=3", "--set=relearn_passes=2"]
    assert cli(*told, *exposures, "--out", "a").code == 0
    assert cli(*told, "--preset", "paper", "--out", "b").code == 0
    a, b = (json.loads(Path(name, "record.json").read_text()) for name in ("a", "b"))
    assert (a["config"]["preset"], b["config"]["preset"]) == ("default", "paper")
    assert b["config"]["bn_mode"] == "train_stats"
    assert a["details"]["units_cut"] >= 1


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> dict[str, Path]:
    """Save a stock ResNet and a stock ViT of transformers, untrained."""
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    vit = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    models = {
        "resnet": ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels)
        ),
        "vit": ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **vit, **labels)),
    }
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(str(found[name]))
        image_processor(16).save_pretrained(str(found[name]))
    return found


def test_stock_models_come_back_as_stock_models(cli, world, stock, fast, child, tmp_path) -> None:
    for name, folder in stock.items():
        done = cli("purify", folder, "--dataset", world.data, *fast, "--set", "lr=0.3", "--out", name)
        assert done.code == 0, done.err
        assert not any("preact" in line for line in Path(name, "README.md").read_text().splitlines())
    seen = child(
        "import sys, torch\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n"
        "for name in ('resnet', 'vit'):\n"
        f"    folder = {str(tmp_path)!r} + '/' + name + '/model'\n"
        "    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not report['missing_keys'] and not report['unexpected_keys'], report\n"
        "    assert AutoImageProcessor.from_pretrained(folder) is not None\n"
        "    print(type(model).__name__, tuple(model(torch.zeros(1, 3, 16, 16)).logits.shape))\n"
        "assert 'hf_nft' not in sys.modules"
    )
    assert seen.splitlines() == ["ResNetForImageClassification (1, 4)", "ViTForImageClassification (1, 4)"]
    for name, folder in stock.items():
        suspect = AutoModelForImageClassification.from_pretrained(folder)
        cured = PeftModel.from_pretrained(suspect, f"{name}/adapter").eval()
        merged = AutoModelForImageClassification.from_pretrained(f"{name}/model").eval()
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = merged(pixel_values=pixels).logits
            torch.testing.assert_close(cured(pixel_values=pixels).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_pickle_is_loaded_only_when_asked_for(cli, refused, world, fast) -> None:
    shutil.copytree(world.victim, "victim")
    weights = Path("victim/model.safetensors")
    torch.save(load_file(weights), "victim/pytorch_model.bin")
    weights.unlink()
    told = ["purify", "victim", "--dataset", world.data, *fast, "--out", "clean"]
    refused(4, ["pytorch_model.bin", "--allow-pickle"], *told)
    refused(4, ["pytorch_model.bin", "--allow-pickle"], "ls", "modules", "victim")
    assert "masks by default" in cli("ls", "modules", "victim", "--allow-pickle").out
    assert cli(*told, "--allow-pickle").code == 0
    assert Path("clean/model/model.safetensors").exists()
