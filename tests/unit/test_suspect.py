"""Loading a model that nobody should trust: what is refused, what each refusal says, and that nothing ran meanwhile."""

import io
import json
import os
import pickle
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_nft.errors import (
    ConfigError,
    DataError,
    HFNFTError,
    NetworkError,
    SuspectError,
    UnknownNameError,
    UnsafeModelError,
)
from hf_nft.intake import read_object
from hf_nft.models.gpt2 import Gpt2
from hf_nft.suspect import load_suspect, task_of
from hf_nft.tasks.text_generation import TextGeneration
from hf_nft.workflows.job import save_model

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\n"


def edit(folder: Path, file: str = "config.json", **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def to_pickle(folder: Path, content: object = None) -> None:
    """Replace the safetensors file by a pickle, of the same weights or of something else."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights if content is None else content, folder / "pytorch_model.bin")


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_folder_loads_with_task_and_provenance(suspect_folder: Path, image_model) -> None:
    suspect = load_suspect(str(suspect_folder))
    assert not suspect.model.training
    assert suspect.task.name == "image_classification"
    assert suspect.labels == 4
    assert not suspect.is_hub_id
    assert suspect.record is None
    assert suspect.provenance() == {
        "name": str(suspect_folder),
        "revision": None,
        "architecture": "PreActResNetForImageClassification",
        "task": "image_classification",
        "task_settings": {},
        "pipeline_tag": "image-classification",
        "parameters": sum(p.numel() for p in image_model.parameters()),
    }
    mine, theirs = image_model.state_dict(), suspect.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


# pickles


def test_a_pickle_is_refused_unless_allowed(suspect_folder: Path, image_model) -> None:
    to_pickle(suspect_folder)
    with pytest.raises(UnsafeModelError, match=r"pytorch_model\.bin, a pickle file.*--allow-pickle"):
        load_suspect(str(suspect_folder))
    loaded = load_suspect(str(suspect_folder), allow_pickle=True).model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in image_model.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pt", "x.pth", "model.ckpt", "model.pkl"])
def test_every_kind_of_pickle_is_called_one(suspect_folder: Path, name: str) -> None:
    (suspect_folder / "model.safetensors").rename(suspect_folder / name)
    with pytest.raises(UnsafeModelError, match=name):
        load_suspect(str(suspect_folder))


def test_a_pickle_that_runs_code_does_not_run_it(suspect_folder: Path, tmp_path: Path) -> None:
    to_pickle(suspect_folder, {"stem.weight": Evil(tmp_path / "ran")})
    with pytest.raises((UnsafeModelError, SuspectError)):
        load_suspect(str(suspect_folder), allow_pickle=True)
    (suspect_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises((UnsafeModelError, SuspectError)):
        load_suspect(str(suspect_folder), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_a_decoy_in_safetensors_does_not_let_a_pickle_in(suspect_folder: Path) -> None:
    to_pickle(suspect_folder)
    save_file({"x": torch.zeros(1)}, suspect_folder / "decoy.safetensors")
    with pytest.raises((UnsafeModelError, SuspectError)):
        load_suspect(str(suspect_folder))


def test_an_index_that_names_a_pickle_does_not_let_it_in(suspect_folder: Path) -> None:
    names = list(load_file(suspect_folder / "model.safetensors"))
    to_pickle(suspect_folder)
    (suspect_folder / "pytorch_model.bin").rename(suspect_folder / "part.bin")
    save_file({"x": torch.zeros(1)}, suspect_folder / "decoy.safetensors")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.bin")})
        (suspect_folder / index).write_text(text)
        with pytest.raises((UnsafeModelError, SuspectError)):
            load_suspect(str(suspect_folder))


# remote code


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_weights": "pytorch_model.bin"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"transformers_weights": "other.safetensors"},
        {"attn_implementation": "evil/kernel"},
        {"backbone_config": {"_attn_implementation": {"": "evil/kernel"}}},
    ],
    ids=str,
)
def test_a_config_leads_to_no_other_weights_nor_code(suspect_folder: Path, changes: dict[str, object]) -> None:
    weights = load_file(suspect_folder / "model.safetensors")
    torch.save(weights, suspect_folder / "pytorch_model.bin")
    save_file(weights, suspect_folder / "other.safetensors", metadata={"format": "pt"})
    edit(suspect_folder, **changes)
    with pytest.raises(UnsafeModelError, match="expected its own weights"):
        load_suspect(str(suspect_folder))


def test_remote_code_is_refused(suspect_folder: Path, tmp_path: Path) -> None:
    (suspect_folder / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    edit(suspect_folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(UnsafeModelError, match=r"'evil', which brings its own code.*--trust-remote-code"):
        load_suspect(str(suspect_folder))
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_architecture_does_not_run(suspect_folder: Path, tmp_path: Path) -> None:
    (suspect_folder / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    remote = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    edit(suspect_folder, auto_map=remote)
    assert load_suspect(str(suspect_folder)).labels == 4
    assert not (tmp_path / "ran").exists()


def test_code_of_a_processor_does_not_run_nor_asks_to(
    suspect_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (suspect_folder / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    remote = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    edit(suspect_folder, "preprocessor_config.json", **remote)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # a user in a hurry
    try:
        load_suspect(str(suspect_folder))
    except HFNFTError:
        pass  # either a processor of our own is used, or an error of ours says that there is none
    assert "Do you wish" not in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_an_adapter_does_not_lead_to_another_model(suspect_folder: Path) -> None:
    redirect = {"base_model_name_or_path": "org/other", "peft_type": "LORA"}
    (suspect_folder / "adapter_config.json").write_text(json.dumps(redirect))
    with pytest.raises(SuspectError, match=r"expected a whole model or an adapter, found adapter_config\.json beside"):
        load_suspect(str(suspect_folder))


# weights


def test_a_missing_weight_is_named(suspect_folder: Path) -> None:
    weights = load_file(suspect_folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, suspect_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SuspectError, match=r"missing_keys: .*classifier\.bias"):
        load_suspect(str(suspect_folder))


def test_a_missing_statistic_is_named(suspect_folder: Path) -> None:
    weights = load_file(suspect_folder / "model.safetensors")
    del weights["stages.1.0.bn1.running_var"]
    save_file(weights, suspect_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SuspectError, match=r"stages\.1\.0\.bn1\.running_var"):
        load_suspect(str(suspect_folder))


def test_weights_that_are_no_numbers_are_named(suspect_folder: Path, image_model) -> None:
    with torch.no_grad():
        image_model.classifier.weight[1, 2] = float("nan")
    image_model.save_pretrained(str(suspect_folder))
    with pytest.raises(SuspectError, match=r"expected finite weights, found others in classifier\.weight"):
        load_suspect(str(suspect_folder))


def test_a_weight_of_another_shape_is_named(suspect_folder: Path) -> None:
    weights = load_file(suspect_folder / "model.safetensors")
    weights["classifier.weight"] = torch.zeros(7, 32)
    save_file(weights, suspect_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SuspectError, match=r"classifier\.weight"):
        load_suspect(str(suspect_folder))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "header"])
def test_a_corrupt_file_is_named(suspect_folder: Path, damage: str) -> None:
    file = suspect_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[:-100], "empty": b"", "garbage": b"x" * 500, "header": b"\xff" * 8 + whole[8:]}[damage]
    )
    with pytest.raises(SuspectError, match=r"model\.safetensors: expected a safetensors file.*Download it again"):
        load_suspect(str(suspect_folder))


def test_no_weights_at_all(suspect_folder: Path) -> None:
    (suspect_folder / "model.safetensors").unlink()
    with pytest.raises(SuspectError, match="expected model weights"):
        load_suspect(str(suspect_folder))


# config and processor


def test_a_corrupt_config(suspect_folder: Path) -> None:
    for text, expected in (("{", "expected JSON"), ("[1]", "expected an object, found list")):
        (suspect_folder / "config.json").write_text(text)
        with pytest.raises(SuspectError, match=expected):
            load_suspect(str(suspect_folder))
    (suspect_folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SuspectError, match="expected JSON"):
        read_object(suspect_folder / "config.json")
    (suspect_folder / "config.json").unlink()
    with pytest.raises(SuspectError, match=r"config\.json, found none"):
        load_suspect(str(suspect_folder))


def test_an_architecture_without_a_task(suspect_folder: Path) -> None:
    edit(suspect_folder, architectures=["ViTForMaskedImageModeling"])
    with pytest.raises(SuspectError, match=r"\*ForImageClassification.*ViTForMaskedImageModeling"):
        load_suspect(str(suspect_folder))
    for odd in (None, [], "nothing"):
        with pytest.raises(SuspectError, match="hf-nft ls tasks"):
            task_of({"architectures": odd}, "x")


def test_a_model_type_nobody_knows(suspect_folder: Path) -> None:
    for kind in ("no_such_type", None):
        edit(suspect_folder, model_type=kind)
        with pytest.raises(SuspectError, match="expected a model type that transformers knows"):
            load_suspect(str(suspect_folder))


def test_a_missing_processor(suspect_folder: Path) -> None:
    (suspect_folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="image processor"):
        load_suspect(str(suspect_folder))


# names


@pytest.mark.parametrize("name", ["org/no-such-model", "no-such-model"])
def test_a_hub_id_offline_is_a_network_error(name: str) -> None:
    with pytest.raises(NetworkError, match=f"model '{name}': expected a folder, or a Hub that can be reached"):
        load_suspect(name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "runs/nothing", "a/b/c", "", "-x/y", "https://x.y/z"])
def test_a_name_that_is_no_hub_id_never_reaches_the_hub(name: str) -> None:
    with pytest.raises(SuspectError):
        load_suspect(name)


# our own records


@pytest.mark.parametrize("nothing", [None, "", 0, []])
def test_a_record_may_leave_out_what_is_not_known(suspect_folder: Path, nothing: object) -> None:
    record = {"schema_version": 1, "suspect": nothing, "data": nothing}
    (suspect_folder / "record.json").write_text(json.dumps(record))
    assert load_suspect(str(suspect_folder)).task.settings() == {}


def test_the_record_beside_a_victim_or_above_a_cure_is_read(suspect_folder: Path) -> None:
    record = {"schema_version": 1, "attack": {"name": "badnets"}}
    (suspect_folder / "record.json").write_text(json.dumps(record))
    assert load_suspect(str(suspect_folder)).record == record
    (suspect_folder / "record.json").rename(suspect_folder.parent / "record.json")
    assert load_suspect(str(suspect_folder)).record is None  # a record one folder up belongs to `model/` only
    suspect_folder.rename(suspect_folder.parent / "model")
    assert load_suspect(str(suspect_folder.parent / "model")).record == record


def test_a_task_keeps_the_settings_of_the_record_unless_told(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a b"], "response": ["c d"]})
    model, tokenizer = Gpt2(width=8, layers=1, heads=2).build(rows, 0)
    save_model(model, TextGeneration(tokenizer), tmp_path)
    assert load_suspect(str(tmp_path)).task.settings() == {"max_length": 128, "max_new_tokens": 24, "separator": "\n"}
    told = {"schema_version": 1, "suspect": {"task_settings": {"max_length": 64, "max_new_tokens": 5}}}
    (tmp_path / "record.json").write_text(json.dumps(told))
    task = load_suspect(str(tmp_path), task_args={"max_length": "32"}).task
    assert task.settings() == {"max_length": 32, "max_new_tokens": 5, "separator": "\n"}
    with pytest.raises(UnknownNameError, match=r"'max_len'.*max_length.*hf-nft ls tasks text_generation"):
        load_suspect(str(tmp_path), task_args={"max_len": "32"})
    with pytest.raises(ConfigError, match="max_new_tokens: expected 1 to 4, found 5"):
        load_suspect(str(tmp_path), task_args={"max_length": 5})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "[]",
            "{}",
            '{"attack": 1}',
            '{"schema_version": 1, "suspect": {"task_settings": 1}}',
            "\x00",
            '{"schema_version": 1, "x": ' + "[" * 100_000,
        ),
        *(f'{{"schema_version": 1, "data": {{"holdout": {held}}}}}' for held in ('["x"]', '{"fraction": "x"}')),
        '{"schema_version": 1, "data": {"holdout": {"fraction": 0.5, "seed": -1}}}',
        *(f'{{"schema_version": 1, "shots": {{"indices": {rows}}}}}' for rows in ('"abc"', '["x"]', "[1e400]")),
        '{"schema_version": 1, "shots": {"indices": [99999999999999999999]}}',
    ],
)
def test_a_file_that_is_no_record_is_not_believed(suspect_folder: Path, text: str) -> None:
    (suspect_folder / "record.json").write_text(text)
    assert load_suspect(str(suspect_folder)).record is None
