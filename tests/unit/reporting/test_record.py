"""The record: a round trip through its file, what it refuses, and the command line that it repeats."""

import json
import shlex
import sys
from pathlib import Path

import pytest

import hf_nft
from hf_nft.errors import DataError
from hf_nft.evaluation.run import Measured
from hf_nft.reporting.record import SCHEMA_VERSION, RunRecord, command_line, library_versions, metric_block


def make(**changes) -> RunRecord:
    fields = {"kind": "evaluate", "command": "hf-nft", "suspect": {}, "data": {}, "config": {}, "metrics": {}}
    return RunRecord(**{**fields, **changes})


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = make(
        losses={"masks": [0.1, 1 / 3]}, shots={"indices": [1, 2]}, metrics={"after": {"asr": None, "acc": 1 / 3}}
    )
    record.save(tmp_path / "record.json")
    loaded = RunRecord.load(tmp_path / "record.json")
    assert loaded.losses == {"masks": [0.1, 0.333333]}  # six digits of a curve
    assert loaded.metrics["after"]["acc"] == 1 / 3  # all digits of a result
    assert loaded.schema_version == SCHEMA_VERSION
    with pytest.raises(ValueError, match="JSON"):
        make(metrics={"after": {"acc": float("nan")}}).save(tmp_path / "record.json")


def test_files_that_are_no_record_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for text in ("{", "[]", "{}", '"x"', "null"):
        file.write_text(text)
        with pytest.raises(DataError, match="expected a run record"):
            RunRecord.load(file)
    with pytest.raises(DataError, match="expected a run record"):
        RunRecord.load(tmp_path / "absent.json")
    make(schema_version=SCHEMA_VERSION + 1).save(file)
    with pytest.raises(DataError, match="Upgrade hf-nft"):
        RunRecord.load(file)


def test_keys_of_an_older_or_foreign_writer_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    make().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "unknown": 1}))
    assert RunRecord.load(file) == make()


def test_the_command_line_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/somewhere/bin/hf-nft", "purify", "my model", "--set", "unlearn_lrs=[0.1, 0.2]", "a'b", "$HOME;rm", ""]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(command_line()) == ["hf-nft", *words[1:]]
    for program in ("hf-nft", "/somewhere/hf_nft/cli/main.py"):  # the latter by python -m hf_nft.cli.main
        monkeypatch.setattr(sys, "argv", [program, "purify", "org/model", "--shots=10"])
        assert command_line() == "hf-nft purify org/model --shots=10"
    monkeypatch.setattr(sys, "argv", ["benchmarks/main.py"])
    assert command_line() == "main.py"


def test_metrics_have_before_after_counts_and_rating() -> None:
    before = {"acc": Measured(0.9, 0.8, 0.95, 9, 10), "asr": Measured(1.0)}
    after = {"acc": Measured(0.8), "asr": Measured(0.0)}
    block = metric_block(before, after)
    assert block["before"] == {"acc": 0.9, "asr": 1.0, "racc": None}
    assert block["counts"]["before"]["acc"] == {"value": 0.9, "low": 0.8, "high": 0.95, "successes": 9, "total": 10}
    assert block["der"] == pytest.approx(0.95)
    alone = metric_block(None, after)
    assert alone["before"] == {"acc": None, "asr": None, "racc": None}
    assert alone["der"] is None


def test_versions_name_this_package_and_what_it_runs_on() -> None:
    found = library_versions()
    assert found["hf_nft"] == hf_nft.__version__
    assert all(found[name] for name in ("torch", "transformers", "datasets", "peft", "python"))
