"""There and back: a victim is planted and pushed, purified by its Hub id and pushed, loaded by others, and verified."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hub_store import Blob
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save
from transformers import AutoModelForImageClassification

from hf_nft.reporting.record import RunRecord

TINY = ["--arch-arg=width=4", "--arch-arg=image_size=16", "--set=max_steps=2", "--set=batch_size=16"]


def test_a_planted_model_there_and_back(hub, cli, data, short) -> None:
    told = ["--dataset", data, "--attack", "badnets"]
    done = cli("plant", *told, *TINY, "--out", "victim", "--push-to", "me/toy-backdoored")
    assert done.code == 0, done.err
    assert hub.store.repos["model", "me/toy-backdoored"].gated == "auto"
    done = cli("purify", "me/toy-backdoored", *told, *short, "--out", "clean", "--push-to", "me/toy-purified", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["suspect"]["revision"] == hub.store.repos["model", "me/toy-backdoored"].head.sha
    card = ModelCard.load("me/toy-purified")
    assert card.data.base_model == "me/toy-backdoored"
    assert "backdoored" not in card.data.tags
    assert "import hf_nft.models.preact_resnet18" in card.text
    done = cli("verify", "me/toy-purified", "--dataset", data)
    assert done.code == 0, done.err
    total = len(load_file("clean/model/model.safetensors"))
    assert f"{total} of {total} tensors equal bit by bit" in done.out
    assert done.out.count("recorded") == 6  # ACC, ASR and R-ACC, before and after
    assert json.loads(cli("inspect", "me/toy-purified", "--json").out)["refused"] == []


def test_what_an_attack_learnt_goes_there_and_back(hub, cli, data, short) -> None:
    troj = ["--attack", "troj", "--dataset", data, "--limit", "20"]
    quick = ["--attack-arg=steps=2", "--attack-arg=surrogate_epochs=1"]
    done = cli("plant", *troj, *quick, *TINY, "--out", "victim", "--push-to", "me/toy-backdoored")
    assert done.code == 0, done.err
    told = ["purify", "me/toy-backdoored", *troj, *short, "--out", "clean", "--push-to", "me/toy-purified"]
    assert "--attack-arg artefact=" in cli(*told).err  # a stranger's is not opened unasked
    done = cli(*told, "--attack-arg=artefact=me/toy-backdoored")
    assert done.code == 0, done.err
    done = cli("verify", "me/toy-purified", "--dataset", data, "--attack-arg=artefact=me/toy-purified")
    assert done.code == 0, done.err
    assert done.out.count("recorded") == 6


def test_others_load_what_was_pushed(hub, purified, child) -> None:
    """The card's own lines; the first part in a process that knows nothing of this package."""
    model_lines, adapter_lines = re.findall(r"```python\n(.*?)```", ModelCard.load("me/purified").text, re.DOTALL)
    seen = child(
        "import json, sys, torch\n"
        f"{model_lines}\n"
        "from transformers import pipeline\n"
        "from PIL import Image\n"
        "named = pipeline(model='me/purified')\n"
        "labels = sorted(row['label'] for row in named(Image.new('RGB', (16, 16))))\n"
        "logits = model.eval()(torch.ones(1, 3, 16, 16)).logits.tolist()\n"
        "assert 'hf_nft' not in sys.modules\n"
        "print(json.dumps([type(model).__name__, named.task, labels, logits]))\n",
        **hub.environment,
    )
    *named, logits = json.loads(seen.splitlines()[-1])
    assert named == ["ResNetForImageClassification", "image-classification", ["cat", "dog", "frog", "ship"]]
    told: dict[str, torch.nn.Module] = {}
    exec(adapter_lines, told)
    found = told["model"].eval()(torch.ones(1, 3, 16, 16)).logits
    assert torch.allclose(found, torch.tensor(logits), atol=1e-5)
    with told["model"].disable_adapter():
        before = told["model"](torch.ones(1, 3, 16, 16)).logits
    assert not torch.allclose(before, torch.tensor(logits), atol=1e-5)


def test_verify_and_what_it_finds(hub, cli, purified, data) -> None:
    repo = hub.store.repos["model", "me/purified"]
    weights, record = repo.head.files["model.safetensors"].content, repo.head.files["record.json"].content
    done = cli("verify", "me/purified", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["tensors"] == found["equal"] == len(load(weights))
    assert found["suspect_revision"] == hub.store.repos["model", "org/suspect"].head.sha
    # the suspect moves on: the recorded revision is what counts
    hub.store.repos["model", "org/suspect"].write({"model.safetensors": Blob(weights, lfs=True)}, "moved")
    assert cli("verify", "me/purified").code == 0
    # somebody changes one weight by a little
    tensors = load(weights)
    name = next(name for name in tensors if name.endswith("convolution.weight"))
    tensors[name][0] *= 1.001
    repo.write({"model.safetensors": Blob(save(tensors, {"format": "pt"}), lfs=True)}, "tampered")
    done = cli("verify", "me/purified", "--dataset", data)
    assert (done.code, name in done.message, len(done.message.splitlines())) == (8, True, 1), done.err
    # somebody claims better numbers
    claimed = json.loads(record)
    claimed["metrics"]["after"]["acc"] = 1.0
    claimed["metrics"]["counts"]["after"]["acc"] |= {"low": 0.9, "high": 1.0}
    files = {"model.safetensors": Blob(weights, lfs=True), "record.json": Blob(json.dumps(claimed).encode())}
    repo.write(files, "boasted")
    done = cli("verify", "me/purified", "--dataset", data)
    assert (done.code, "ACC after is" in done.message, "recorded was 100.0 %" in done.message) == (8, True, True)
    assert cli("verify", "me/purified").code == 0, "the weights are as they were"


def test_a_suspect_that_is_an_adapter(hub, cli, data, short, resnet, tmp_path) -> None:
    base = hub.store.add("org/base", resnet)
    model = get_peft_model(
        AutoModelForImageClassification.from_pretrained(resnet), LoraConfig(r=2, target_modules=["classifier.1"])
    )
    torch.nn.init.normal_(model.base_model.model.classifier[1].lora_B["default"].weight)
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    hub.store.add("org/lora", tmp_path / "lora")
    done = cli("purify", "org/lora", "--dataset", data, *short, "--out", "clean")
    assert done.code == 0, done.err
    weights = load(base.head.files["model.safetensors"].content)
    moved = {name: tensor + 1 for name, tensor in weights.items()}
    first = base.head.sha
    base.write({"model.safetensors": Blob(save(moved, {"format": "pt"}), lfs=True)}, "moved")
    done = cli("verify", "clean")
    assert done.code == 0, done.err
    _, adapter_lines = re.findall(r"```python\n(.*?)```", ModelCard.load("clean/README.md").text, re.DOTALL)
    assert first in adapter_lines
    told: dict[str, torch.nn.Module] = {}
    exec(adapter_lines.replace("REPOSITORY_OR_FOLDER", "clean"), told)
    cured = AutoModelForImageClassification.from_pretrained("clean/model").eval()
    pixels = torch.ones(1, 3, 16, 16)
    assert torch.allclose(told["model"].eval()(pixels).logits, cured(pixels).logits, atol=1e-5)


def test_verify_a_run_folder(hub, cli, purified, resnet) -> None:
    assert cli("verify", purified).code == 0
    assert cli("verify", purified, "--suspect", resnet).code == 0
    (purified / "adapter/adapter_model.safetensors").unlink()
    done = cli("verify", purified)
    assert (done.code, "expected NFT masks" in done.message) == (3, True)


@pytest.mark.parametrize(
    ("changes", "code", "phrase"),
    [
        ({"suspect": {"name": "clean", "revision": None, "task": "image_classification"}}, 3, "--suspect"),
        ({"suspect": {"name": "/", "revision": "main"}}, 3, "--suspect"),
        ({"suspect": {"name": "org/gone", "revision": "main"}}, 3, "org/gone"),
        ({"suspect": []}, 3, "expected a readable record"),
        ({"suspect": {"name": "org/suspect", "revision": 5}}, 3, "expected a readable record"),
        ({"suspect": {"name": "org/suspect", "revision": "main", "base": "x"}}, 3, "expected a readable record"),
        ({"metrics": {"before": ["acc"], "after": {}}}, 3, "expected a readable record"),
        ({"shots": {"indices": ["a"]}}, 3, "expected a readable record"),
        ({"schema_version": "x"}, 3, "expected a run record"),
        ({"metrics": {"before": {}, "after": {"acc": 0.5}, "counts": {"after": 3}}}, 8, "ACC after"),
        ({"kind": "plant"}, 3, "nothing to verify"),
    ],
)
def test_records_of_strangers(hub, cli, purified, data, changes, code, phrase) -> None:
    repo = hub.store.repos["model", "me/purified"]
    record = dataclasses.asdict(RunRecord.load(purified / "record.json")) | changes
    repo.write({"record.json": Blob(json.dumps(record).encode())}, "strange")
    measured = ["--dataset", data] if code == 8 else []
    done = cli("verify", "me/purified", *measured)
    assert (done.code, phrase in done.message, "Traceback" in done.err) == (code, True, False), done.err


@pytest.mark.parametrize(
    ("route", "what", "code", "phrase"),
    [
        ("storage", "truncate", 0, "as claimed"),
        ("storage", "corrupt", 7, "expected what the Hub lists"),
        ("info", 401, 7, "hf auth login"),
        ("info", 403, 7, "hf auth login"),
        ("info", 404, 7, "refused (404)"),
        ("info", 500, 7, "refused (500)"),
        ("info", "reset", 7, "network"),
        ("resolve", 403, 7, "hf auth login"),
        ("resolve", "slow", 0, "as claimed"),
    ],
)
def test_verify_where_the_hub_fails(hub, cli, purified, waits, route, what, code, phrase) -> None:
    hub.fail(route, what, times=1 if code == 0 else 1000, match="" if route == "storage" else "me/purified")
    repo = hub.store.repos["model", "me/purified"]
    repo.commits[repo.head.sha].files["extra.txt"] = Blob(b"x")  # nothing of this commit is cached
    done = cli("verify", "me/purified")
    assert (done.code, phrase in done.err, "Traceback" in done.err) == (code, True, False), done.err


def test_a_push_that_is_refused_is_refused_before_the_work(hub, cli, data, resnet, short) -> None:
    hub.store.add("me/taken", {"LICENSE": b"mit"})
    told = ["purify", resnet, "--dataset", data, *short, "--out", "clean"]
    done = cli(*told, "--push-to", "me/taken")
    assert (done.code, "--update" in done.message) == (6, True)
    assert not Path("clean").exists()
    for flag in ("--public", "--create-pr", "--update"):
        done = cli(*told, flag)
        assert (done.code, f"{flag}: expected --push-to" in done.message) == (2, True)
    done = cli("plant", "--dataset", data, "--attack", "badnets", *TINY, "--out", "victim", "--push-to", "me/toy")
    assert (done.code, "backdoored" in done.message) == (2, True)
    assert not Path("victim").exists()


def test_a_push_that_fails_leaves_the_run_whole(hub, cli, data, resnet, short, waits) -> None:
    hub.fail("commit", 500, times=1000)
    done = cli("purify", resnet, "--dataset", data, *short, "--out", "clean", "--push-to", "me/purified")
    assert (done.code, "hf-nft push clean me/purified" in done.message) == (7, True), done.err
    hub.faults.clear()
    assert cli("verify", "clean", "--suspect", resnet).code == 0
    assert cli("push", "clean", "me/purified").code == 0
    done = cli("verify", "me/purified")
    assert (done.code, "--suspect" in done.message) == (3, True), "the record names a folder"
    assert cli("verify", "me/purified", "--suspect", resnet).code == 0
    stored = b"".join(blob.content for blob in hub.store.repos["model", "me/purified"].head.files.values())
    assert str(resnet.parent).encode() not in stored
