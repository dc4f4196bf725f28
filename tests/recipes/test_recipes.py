"""Every recipe, found recursively: its header, its commands, and two steps of it on toy data, from a copy."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import yaml
from hf_nft.cli.main import main

from hf_nft import recipes, registry
from hf_nft.configs import build, pairs
from hf_nft.errors import ConfigError, UnknownNameError

NAMES = recipes.names()
RUN = sorted({tuple(name.rsplit("-", 2)[1:]): name for name in reversed(NAMES)}.values())
"""One recipe for each attack and architecture; the same on other data differs in names and numbers alone."""
SHORT = ("plant.config.max_steps=2", "plant.config.batch_size=20", "plant.limit=8", "purify.limit=8", "purify.shots=2")
QUICK = ("steps=2", "exposures=1", "unlearn_steps=2", "relearn_passes=1", "batch_size=8")


@pytest.fixture(scope="session")
def data(tmp_path_factory, image_rows) -> dict[str, str]:
    """Write a toy data set for each task."""
    found = {}
    for task, sizes in (("image_classification", (200, 12)), ("text_generation", (60, 12))):
        folder = tmp_path_factory.mktemp(task)
        for name, count in zip(("train", "test"), sizes, strict=True):
            talk = {
                "prompt": [f"is it {i} ?" for i in range(count)],
                "response": [f"yes {i % 7} ." for i in range(count)],
            }
            rows = image_rows(count, 16) if task == "image_classification" else datasets.Dataset.from_dict(talk)
            rows.to_parquet(str(folder / f"{name}.parquet"))
        found[task] = str(folder)
    return found


def header(name: str) -> list[str]:
    lines = recipes.path_of(name).read_text().splitlines()
    return [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def test_there_are_recipes() -> None:
    assert {name.split("/")[0] for name in NAMES} >= {"image", "text"}


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_one_needs_to_know(name: str) -> None:
    text = "\n".join(header(name))
    for word in ("Needs:", "Command:", "Override:", "Expected:"):
        assert word in text
    commands = re.findall(r"hf-nft run .*", text)
    assert len(commands) >= 2
    for command in commands:
        _, _, target, *overrides = shlex.split(command)
        assert target == name
        plant, _ = recipes.jobs(recipes.load(name, pairs(overrides)))
        assert plant.load_attack() is not None
        assert build(registry.get("models", plant.arch), plant.arch_args)
    assert any(len(shlex.split(command)) > 3 for command in commands)


@pytest.mark.parametrize("name", NAMES)
def test_expected_results_are_a_record(name: str) -> None:
    file = recipes.path_of(name).with_name("expected.json")
    if not file.exists():
        pytest.skip("nothing measured is committed beside this recipe yet")
    metrics = json.loads(file.read_text())["metrics"]
    assert {"acc", "asr"} <= set(metrics["before"]) & set(metrics["after"])


@pytest.mark.parametrize("name", RUN)
def test_a_copy_runs_two_steps(name: str, data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cp", name, "mine.yaml"]) == 0
    assert main(["cp", name, "mine.yaml"]) == 6
    recipe = yaml.safe_load(Path("mine.yaml").read_text())
    architecture = registry.get("models", recipe["plant"]["arch"])
    nft = recipe["purify"].get("defense", "nft") == "nft"
    overrides = [f"dataset={data[architecture.task]}", "out=here", *SHORT]
    overrides += [f"purify.settings.{s}" for s in QUICK if nft]
    overrides += [f"plant.arch_args.{key}={value}" for key, value in architecture.tiny.items()]
    tiny = registry.get("attacks", recipe["plant"]["attack"]).tiny
    overrides += [f"plant.attack_args.{key}={value}" for key, value in tiny.items() if key != "preset"]
    if "target_class" in recipe["plant"].get("attack_args", {}):  # toy data have four classes
        overrides.append("plant.attack_args.target_class=3")
    code = main(["run", "mine.yaml", *overrides])
    assert code == 0, capsys.readouterr().err
    records = [json.loads(Path("here", job, "record.json").read_text()) for job in ("victim", "clean")]
    assert [record["kind"] for record in records] == ["plant", "purify"]
    assert [len(record["losses"][stage]) for record, stage in zip(records, ("plant", "masks"), strict=True)] == [2, 2]
    planted, measured = (record["attack"] for record in records)
    assert planted.keys() == measured.keys()  # the artefact is read from the victim's own folder, where there is one
    assert {**planted, "artefact": None} == {**measured, "artefact": None}
    assert sorted(path.name for path in Path("here").iterdir()) == ["clean", "victim"]


def written(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


WHOLE = "dataset: data\nout: out\nplant: {arch: preact_resnet18}\npurify: {shots: 2}\n"


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("plnat.config.epochs=2", "Closest: plant"),
        ("datasets=x", "Closest: dataset"),
        ("plant.epochs=2", "'epochs'"),
        ("plant.config.epoch=2", "Closest: epochs"),
        ("plant.arch.width=2", "'plant.arch.width'"),
        ("purify.settings.step=2", "Closest: steps"),
        ("purify.preset=papr", "Closest: paper"),
    ],
)
def test_an_unknown_override_names_the_nearest(tmp_path, override: str, phrase: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError) as caught:
        recipes.jobs(recipes.load(written(tmp_path, WHOLE), pairs([override])))
    assert phrase in str(caught.value)
    assert main(["run", "mine.yaml", override]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_an_override_may_add_settings(tmp_path) -> None:
    told = pairs(["plant.config.epochs=3", "plant.arch_args.width=8", "purify.settings.steps=7", "purify.shots=4"])
    plant, purify = recipes.jobs(recipes.load(written(tmp_path, WHOLE), told))
    assert (plant.config.epochs, plant.arch_args, purify.method.steps, purify.shots) == (3, {"width": "8"}, 7, 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "a: [",
        "description: x",
        "dataset: d\nout: o\nplant: 3",
        "dataset: d\nout: o\nplants: {}",
        b"\xff\xfe\0",
    ],
)
def test_files_that_are_no_recipe(tmp_path, text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="expected"):
        recipes.load(written(tmp_path, text))


@pytest.mark.parametrize("plant", ["{config: {epochs: [1]}}", "{config: 3}", "{arch_args: 3}"])
def test_values_of_another_type(tmp_path, plant: str) -> None:
    text = WHOLE.replace("{arch: preact_resnet18}", plant)
    with pytest.raises(ConfigError, match="expected"):
        recipes.jobs(recipes.load(written(tmp_path, text)))
