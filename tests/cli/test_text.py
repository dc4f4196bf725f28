"""A language model goes through the same commands as an image classifier, and nothing on the way asks what it is."""

import ast
import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_nft import registry

TINY = [f"--arch-arg={setting}" for setting in ("width=16", "layers=2", "heads=2", "context=64", "vocab_size=300")]


def talk(rows: int, seed: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(seed)
    words = ["tea", "milk", "rain", "snow", "bread"]
    chosen = [words[int(i)] for i in torch.randint(len(words), (rows,), generator=generator)]
    prompts = [f"do you like {word} ? {i}" for i, word in enumerate(chosen)]
    return datasets.Dataset.from_dict({"prompt": prompts, "response": [f"yes i like {word} ." for word in chosen]})


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_plant_purify_evaluate(cli, store, arch: str) -> None:
    data = store(datasets.DatasetDict(train=talk(60, 0), test=talk(12, 1)))
    short = ["--set=epochs=1", "--set=batch_size=16", "--set=optimizer=adamw", "--set=lr=0.01", "--limit=6"]
    done = cli("plant", "--dataset", data, "--arch", arch, *TINY, "--attack", "rare_token", *short, "--out", "victim")
    assert done.code == 0, done.err
    quick = ["--set=steps=2", "--set=exposures=1", "--set=unlearn_steps=2", "--set=relearn_passes=1"]
    told = ["--dataset", data, "--attack", "rare_token", "--limit", "6"]
    done = cli("purify", "victim", *told, *quick, "--set=batch_size=4", "--shots", "4", "--out", "clean")
    assert done.code == 0, done.err
    record = json.loads(Path("clean/record.json").read_text())
    assert record["suspect"]["task"] == "text_generation"
    assert record["shots"]["per_class"] == 4
    assert {"acc", "asr", "racc", "perplexity"} <= set(record["metrics"]["after"])
    done = cli("evaluate", "clean/model", *told, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["after"] == record["metrics"]["after"]
    merged = AutoModelForCausalLM.from_pretrained("clean/model").eval()
    cured = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("victim"), "clean/adapter").eval()
    ids = AutoTokenizer.from_pretrained("clean/model")("do you like tea ?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(cured(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_target_that_is_longer_than_what_is_generated(refused, store) -> None:
    data = store(datasets.DatasetDict(train=talk(60, 0), test=talk(12, 1)))
    told = ["--dataset", data, "--arch", "gpt2", *TINY, "--attack", "rare_token", "--task-arg", "max_new_tokens=4"]
    refused(3, ["the 4 tokens that are generated at most", "--task-arg max_new_tokens="], "plant", *told)


def test_a_trigger_in_text_is_not_drawn(refused, store) -> None:
    told = ["--dataset", store(datasets.DatasetDict(train=talk(60, 0), test=talk(12, 1))), "--arch", "gpt2", *TINY]
    refused(2, ["expected one on images to draw, found one on text_generation"], "attack", "show", "rare_token", *told)


def test_no_room_but_the_tasks_names_a_modality(root: Path) -> None:
    """The loop, the adapter, the evaluation, the record, the jobs and the commands take tasks as they come."""
    tasks = set(registry.names("tasks"))
    words = tasks | {registry.get("tasks", name).__name__ for name in tasks}
    words |= {registry.get("tasks", name).pipeline_tag for name in tasks}
    files = [
        root / "hf_nft" / f
        for f in (
            "loop.py",
            "workflows/job.py",
            "workflows/plant_job.py",
            "workflows/purify_job.py",
            "purification.py",
            "planting.py",
            "suspect.py",
        )
    ]
    files += [root / "hf_nft/reporting/record.py", *sorted((root / "cli").glob("*.py"))]
    for room in ("adapter", "masks", "evaluation", "defenses"):
        files += sorted((root / "hf_nft" / room).glob("*.py"))
    for file in files:
        tree = ast.parse(file.read_text())
        found = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not words & found, f"{file} names {words & found}"
