"""`hf-nft inspect` on real folders, and what strangers wrote on its way to a terminal."""

import json
import shutil
from pathlib import Path

import pytest

UNUSABLE = 3


@pytest.fixture
def folder(world, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("suspect") / "model"
    shutil.copytree(world.victim, copy)
    return copy


def edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def test_a_planted_model(cli, world) -> None:
    done = cli("inspect", world.victim)
    assert (done.code, done.err) == (0, "")
    lines = {line[:14].strip(): line[15:] for line in done.out.splitlines()}
    assert lines["architecture"] == "PreActResNetForImageClassification"
    assert lines["task"] == "image_classification"
    assert lines["refused"] == "nothing"
    assert "bn " in lines["units to mask"]
    assert "order of magnitude" in lines["estimate"]


def test_json_agrees_with_the_record(cli, world) -> None:
    found = json.loads(cli("inspect", world.victim, "--json").out)
    record = json.loads(Path(world.victim, "record.json").read_text())
    assert found["parameters"] == record["suspect"]["parameters"]
    assert found["architecture"] == record["suspect"]["architecture"]
    assert found["files"]["model.safetensors"] == Path(world.victim, "model.safetensors").stat().st_size
    assert found["size"] == sum(found["files"].values()) == sum(found["formats"].values())
    modules = [line.split() for line in cli("ls", "modules", world.victim).out.splitlines()]
    assert found["units"]["bn"] == sum(int(words[words.index("masks") - 1]) for words in modules if "masks" in words)
    more = json.loads(cli("inspect", world.victim, "--json", "--shots", "100").out)["estimate"]
    assert more["purify_flop"] > found["estimate"]["purify_flop"]
    assert more["forward_flop"] == found["estimate"]["forward_flop"] > 0


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda f: edit(f, architectures=["BertForMaskedLM"]), "expected an architecture named"),
        (lambda f: edit(f, architectures=["NoSuchForImageClassification"]), "expected the class PreActResNet"),
        (lambda f: edit(f, blocks=[10**9, 1, 1, 1]), "expected at most 100000 in config.json, found blocks"),
        (lambda f: edit(f, model_type="odd", auto_map={"AutoConfig": "odd.Odd"}), "--trust-remote-code"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "--allow-pickle"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "expected a safetensors file"),
        (lambda f: (f / "config.json").write_text("{"), "expected JSON"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), "expected an image processor"),
        (lambda f: edit(f, id2label={"7": "a"}), "number the labels from 0"),
    ],
)
def test_what_would_be_refused_is_told(cli, folder: Path, change, phrase: str) -> None:
    change(folder)
    done = cli("inspect", folder)
    assert done.code == 0
    assert any(line.startswith("refused") and phrase in line for line in done.out.splitlines())
    assert "Traceback" not in done.err


def test_several_faults_are_told_together(cli, folder: Path) -> None:
    edit(folder, architectures=["BertForMaskedLM"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert len(json.loads(cli("inspect", folder, "--json").out)["refused"]) == 2


def test_a_model_that_is_not_there(refused, tmp_path_factory) -> None:
    refused(UNUSABLE, ["expected a folder or a Hub id"], "inspect", "./nothing")
    refused(UNUSABLE, ["empty repository or folder"], "inspect", tmp_path_factory.mktemp("empty"))


# what strangers wrote

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202eevil\u200b\r\n[bold]x[/bold]"


def test_a_terminal_sees_text_alone(cli, refused, folder: Path) -> None:
    edit(folder, architectures=[ESCAPES + "ForImageClassification"])
    (folder / "README.md").write_text(f"---\ndatasets: {json.dumps([ESCAPES])}\n---\n")
    shown = cli("inspect", folder).out
    told = refused(UNUSABLE, ["expected the class"], "purify", folder, "--dataset", "x", "--out", "new").err
    for text in (shown, told):
        assert "evil" in text
        assert not {"\x1b", "\x07", "\u202e", "\u200b", "\r"} & set(text)
        assert "[bold]x[/bold]" in text


@pytest.mark.filterwarnings("default:labels matched by id")
def test_labels_with_control_characters(refused, world, folder: Path) -> None:
    names = {str(i): f"\x1b[31mred{i}\x07" for i in range(4)}
    edit(folder, id2label=names, label2id={name: int(i) for i, name in names.items()}, num_labels=4)
    (folder / "record.json").unlink()
    done = refused(UNUSABLE, ["examples of class 0"], *_purify(folder, world.data, shots=999))
    assert "Warning: labels matched by id" in done.err
    assert not {"\x1b", "\x07"} & set(done.err)


def _purify(folder: Path, data: str, shots: int) -> list[str]:
    return ["purify", str(folder), "--dataset", data, "--shots", str(shots), "--out", "new"]


@pytest.mark.parametrize(
    ("card", "phrase"),
    [
        ("---\ndatasets: [unclosed\n---\n", "expected YAML that names a data set"),
        ("---\ndatasets: {a: b}\n---\n", "expected one named by --dataset or in the card"),
        ("---\n- a\n- list\n---\n", "--dataset ID|FOLDER"),
        ("---\ndatasets: !!python/object/apply:os.system ['touch ran']\n---\n", "expected YAML that names a data set"),
        ("no header", "expected one named by --dataset or in the card"),
    ],
)
def test_cards_that_name_no_data_set(refused, cli, folder: Path, card: str, phrase: str) -> None:
    (folder / "README.md").write_text(card)
    refused(UNUSABLE, [phrase, "--dataset"], "purify", folder, "--shots", "2", "--out", "new")
    assert cli("inspect", folder).code == 0
    assert not Path("ran").exists()


def test_splits_by_option(refused, cli, world) -> None:
    told = ["evaluate", world.victim, "--dataset", world.data]
    record = json.loads(cli(*told, "--eval-split", "train", "--limit", "100", "--json").out)
    assert record["data"]["test_rows"] == 100  # the test split has 40
    refused(2, ["split 'tset' is not known", "Closest: test"], *told, "--eval-split", "tset")
