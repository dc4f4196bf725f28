"""Jobs end to end on a tiny network: what a victim is planted from, and what its record says."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_nft.defenses.nft import NFT
from hf_nft.errors import ConfigError, DataError, OutputError, UnknownNameError
from hf_nft.planting import PlantConfig
from hf_nft.shots import held_out
from hf_nft.workflows import EvaluateJob, PlantJob, PurifyJob, VerifyJob


@pytest.fixture
def folder(tmp_path: Path, image_rows) -> Path:
    image_rows(80, 16).to_parquet(str(tmp_path / "train.parquet"))
    image_rows(20, 16, seed=1).to_parquet(str(tmp_path / "test.parquet"))
    return tmp_path


def job(folder: Path, **changes) -> PlantJob:
    fields = {
        "dataset": str(folder),
        "attack": "badnets",
        "arch_args": {"width": 4, "image_size": 16},
        "config": PlantConfig(epochs=1, batch_size=32, holdout=0.25, mixed_precision="no"),
        "out": str(folder / "victim"),
    }
    return PlantJob(**{**fields, **changes})


def test_a_victim_is_poisoned_outside_the_defenders_rows(folder: Path) -> None:
    record = job(folder, poison_rate=0.2).run()
    assert record.data["train_rows"] == 60  # 80 rows less the defender's quarter
    assert record.data["poisoned_rows"] == 12  # and the rate counts what is left
    assert record.data["test_rows"] == 20
    assert record.metrics["counts"]["after"]["asr"]["total"] == 15
    assert json.loads((folder / "victim" / "record.json").read_text())["data"] == record.data
    measured = EvaluateJob(
        model=str(folder / "victim"), dataset=str(folder), attack="badnets", mixed_precision="no"
    ).run()
    assert measured.metrics["after"] == record.metrics["after"]
    assert len(held_out(80, 0.25)) == 20


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"shots": 0}, "shots"),
        ({"shot_seed": -1}, "shot_seed"),
        ({"limit": 0}, "limit"),
        ({"checkpoint_every": 0}, "c"),
    ],
)
def test_numbers_of_a_job_are_checked_at_once(settings: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"PurifyJob: {problem}.*: expected >="):
        PurifyJob(model="nowhere", **settings)


def test_an_unknown_attack_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(UnknownNameError, match="badnet"):
        PurifyJob(model="nowhere", attack="badnet")


def test_an_unknown_augmentation_is_refused_before_anything_is_poisoned(folder: Path) -> None:
    config = PlantConfig(epochs=1, holdout=0.25, augment="rotate", mixed_precision="no")
    with pytest.raises(UnknownNameError, match="rotate"):
        job(folder, config=config, poison_rate=0.0).run()  # a rate that poisons nothing is refused later


def test_a_folder_that_is_no_unfinished_run_is_left_alone(folder: Path) -> None:
    mine = folder / "victim.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    with pytest.raises(OutputError, match=r"expected .*victim\.partial to be free"):
        job(folder).run()
    assert mine.read_text() == "x"


def test_the_default_rate_is_the_attacks(folder: Path) -> None:
    assert job(folder).run().data["poisoned_rows"] == 6
    with pytest.raises(DataError, match="Change the poison rate"):
        job(folder, poison_rate=0.0, out=str(folder / "other")).run()
    assert not (folder / "other").exists()


def test_a_clean_control_has_no_poison_and_no_banner(folder: Path) -> None:
    record = job(folder, attack=None).run()
    assert record.attack is None
    assert record.data["poisoned_rows"] == 0
    assert record.config["poison_rate"] == 0.0
    assert "backdoored on purpose" not in (folder / "victim" / "README.md").read_text()


def test_a_victim_of_a_single_split_is_measured_on_rows_it_has_not_seen(tmp_path: Path, image_rows) -> None:
    image_rows(80, 16).to_parquet(str(tmp_path / "rows.parquet"))
    planted = job(tmp_path).run()
    assert (planted.data["train_rows"], planted.data["test_rows"]) == (60, 20)
    told = {"dataset": str(tmp_path), "attack": "badnets"}
    measured = EvaluateJob(model=str(tmp_path / "victim"), mixed_precision="no", **told).run()
    assert measured.data["test_rows"] == 20
    assert measured.metrics["after"] == planted.metrics["after"]
    method = NFT.from_preset("default", steps=1, mixed_precision="no")
    cure = PurifyJob(model=str(tmp_path / "victim"), shots=2, defense=method, out=str(tmp_path / "clean"), **told)
    cured = cure.run()
    unseen = set(held_out(80, 0.25).tolist())
    assert set(cured.shots["indices"]) <= unseen
    assert cured.data["test_rows"] == 20 - 8
    again = EvaluateJob(model=str(tmp_path / "clean" / "model"), mixed_precision="no", **told).run()
    assert again.data["test_rows"] == 20 - 8
    assert again.metrics["after"] == cured.metrics["after"]


def test_settings_without_an_attack_and_a_missing_data_set_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected --attack"):
        job(folder, attack=None, attack_args={"size": 3}).load_attack()
    with pytest.raises(ConfigError, match="--dataset"):
        job(folder, dataset=None).run()


def test_an_attack_is_measured_with_the_settings_it_was_planted_with(folder: Path) -> None:
    record = {"attack": {"name": "badnets", "size": 9, "target_class": 2, "seed": 0}}
    found = job(folder).load_attack(record)
    assert (found.size, found.target_class) == (9, 2)
    assert job(folder, attack_args={"size": "5"}).load_attack(record).size == 5
    assert job(folder, attack="sig").load_attack(record).target_class == 0
    assert job(folder, attack="blend").load_attack(record).opacity == 0.2


@pytest.mark.parametrize(
    ("attack", "setting", "rest"),
    [("patch", "trigger_file", {}), ("blend", "picture", {"preset": "image"}), ("troj", "artefact", {})],
)
def test_a_path_that_only_a_record_names_is_not_opened(tmp_path: Path, attack, setting, rest) -> None:
    theirs, own = str(tmp_path / "theirs"), str(tmp_path / "own")
    record = {"attack": {"name": attack, "target_class": 2, setting: theirs, **rest}}
    with pytest.raises(ConfigError, match=f"'{theirs}' in the model's record only.*--attack-arg {setting}=PATH"):
        EvaluateJob(model="theirs", attack=attack).load_attack(record)
    found = EvaluateJob(model="theirs", attack=attack, attack_args={setting: own}).load_attack(record)
    assert (getattr(found, setting), found.target_class) == (own, 2)


def test_an_artefact_beside_the_model_is_taken_instead_of_the_recorded_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim/attack").mkdir(parents=True)
    record = {"attack": {"name": "troj", "artefact": "/elsewhere"}}
    found = job(folder, attack="troj").load_attack(record, tmp_path / "victim")
    assert found.artefact == str(tmp_path / "victim/attack")


def test_another_attack_than_was_planted_is_doubted(folder: Path) -> None:
    job(folder, attack_args={"target_class": 2}).run()
    planted, shifted, other = (
        EvaluateJob(model=str(folder / "victim"), dataset=str(folder), attack=name, attack_args=told).run().doubts
        for name, told in (("badnets", {}), ("badnets", {"target_class": 1, "size": 5}), ("sig", {}))
    )
    assert "other-attack" not in [found["code"] for found in planted]
    (text,) = (found["text"] for found in shifted if found["code"] == "other-attack")
    assert text.endswith("names: target_class 1, not 2; size 5, not 3")
    assert any(found["text"].endswith("names: name sig, not badnets") for found in other)


def test_verify_believes_neither_a_record_nor_another_processor(folder: Path) -> None:
    told_config = PlantConfig(epochs=20, batch_size=16, holdout=0.25, mixed_precision="no")
    planted = job(folder, config=told_config).run()
    assert planted.metrics["after"]["acc"] > 0.6, "else a model with other names is as accurate"
    method = NFT.from_preset("default", steps=1, mixed_precision="no")
    told = {"dataset": str(folder), "attack": "badnets"}
    clean = folder / "clean"
    record = PurifyJob(model=str(folder / "victim"), shots=2, defense=method, out=str(clean), **told).run()
    verify = VerifyJob(model=str(clean), suspect=str(folder / "victim"), dataset=str(folder))
    assert verify.run().problems == []

    claimed = json.loads((clean / "record.json").read_text())
    claimed["metrics"]["after"]["asr"] = 1.0 - record.metrics["after"]["asr"]
    claimed["metrics"]["counts"]["after"]["asr"] |= {"low": 0.0, "high": 1.0}
    (clean / "record.json").write_text(json.dumps(claimed))
    (problem,) = verify.run().problems
    assert problem.startswith("ASR after is")
    record.save(clean / "record.json")

    config = json.loads((clean / "model" / "config.json").read_text())
    names = list(config["id2label"].values())
    config["id2label"] = dict(zip(config["id2label"], names[1:] + names[:1], strict=True))
    config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    (clean / "model" / "config.json").write_text(json.dumps(config))
    assert any(problem.startswith("ACC after is") for problem in verify.run().problems)


def test_a_limit_draws_rows_of_all_classes(folder: Path, image_rows) -> None:
    rows = image_rows(80, 16)
    rows.select(np.argsort(rows["label"][:], kind="stable")).to_parquet(str(folder / "test.parquet"))
    job(folder, attack=None).run()
    few = EvaluateJob(model=str(folder / "victim"), dataset=str(folder), attack="badnets", limit=20).run()
    assert few.data["test_rows"] == 20
    assert 5 < few.metrics["counts"]["after"]["asr"]["total"] < 20
    assert [doubt["code"] for doubt in few.doubts][-1] == "small-evaluation-set"


def test_a_rate_without_an_attack_is_refused(folder: Path) -> None:
    for told in ({"poison_rate": 0.1}, {"rate_base": "all"}):
        with pytest.raises(ConfigError, match="expected --attack beside"):
            job(folder, attack=None, **told).run()
    assert not (folder / "victim").exists()
