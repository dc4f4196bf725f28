"""A run that is stopped in the middle, politely or not, goes on where its last checkpoint was, bit for bit."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from hf_nft.cli.main import main
from safetensors.torch import load_file

STEPS = 300
TRAINS = re.compile(r" [1-9]\d*/\d")
"""A progress bar that has moved."""


@pytest.fixture
def data(tmp_path, image_rows) -> str:
    """Write a small data set as parquet."""
    (tmp_path / "data").mkdir()
    image_rows(60, 16, seed=1).to_parquet(str(tmp_path / "data/train.parquet"))
    image_rows(16, 16, seed=2).to_parquet(str(tmp_path / "data/test.parquet"))
    datasets.disable_progress_bars()
    return str(tmp_path / "data")


def until(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 90.0) -> None:
    """Wait for something to be seen while a process runs."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < end, "nothing was seen"
        time.sleep(0.02)


def stop(argv: list[str], out: Path, how: signal.Signals, log: Path, after: str) -> int:
    """Start a command, stop it once it trains; returns its exit code."""
    seen = (out.with_name(out.name + ".partial") / "checkpoint.pt").exists
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_nft.cli.main", *argv], stdout=stderr, stderr=stderr, env=os.environ
        )
        try:
            until(seen if after == "checkpoint" else lambda: bool(TRAINS.search(log.read_text())), process)
            process.send_signal(how)
            return process.wait(60)
        finally:
            process.kill()
            process.wait()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(capsys, code: int, phrase: str, argv: list[str]) -> None:
    capsys.readouterr()
    assert main(argv) == code
    assert phrase in capsys.readouterr().err


def test_purify(data, suspect_folder, tmp_path, capsys) -> None:
    settings = (f"steps={STEPS}", "exposures=1", "unlearn_steps=2", "relearn_passes=1", "cut=0.1", "batch_size=8")
    told = ["purify", str(suspect_folder), "--dataset", data, "--shots", "2", *(f"--set={s}" for s in settings)]
    out, log, partial = tmp_path / "clean", tmp_path / "log", tmp_path / "clean.partial"
    argv = [*told, "--out", str(out)]
    assert stop(argv, out, signal.SIGTERM, log, "checkpoint") == 130
    assert not out.exists()
    assert {file.name for file in partial.iterdir()} == {"checkpoint.pt", "job.json"}
    assert "--resume" in log.read_text()
    assert "Traceback" not in log.read_text()

    refused(capsys, 6, "Pass --resume", argv)
    refused(capsys, 6, "found other lr", [*argv, "--set=lr=0.5", "--resume"])
    refused(capsys, 6, "found another attack", [*argv, "--attack=badnets", "--resume"])
    refused(capsys, 6, "found another model", ["purify", data, *argv[2:], "--resume"])
    refused(capsys, 6, "found other shots", [*argv, "--shot-seed=1", "--resume"])
    first = torch.load(partial / "checkpoint.pt", weights_only=True)["step"]

    assert stop([*argv, "--resume"], out, signal.SIGKILL, log, "bar") == -signal.SIGKILL
    assert first <= torch.load(partial / "checkpoint.pt", weights_only=True)["step"] < STEPS
    assert main([*argv, "--resume"]) == 0
    assert main([*told, "--out", str(tmp_path / "whole")]) == 0
    assert same(out / "adapter", tmp_path / "whole/adapter")
    assert same(out / "model", tmp_path / "whole/model")
    assert sorted(file.name for file in tmp_path.glob("clean*")) == ["clean"]
    assert not {"job.json", "checkpoint.pt"} & {file.name for file in out.iterdir()}
    resumed, whole = (json.loads((folder / "record.json").read_text()) for folder in (out, tmp_path / "whole"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["work"]["steps"] == whole["work"]["steps"]
    assert resumed["metrics"] == whole["metrics"]


def test_plant(data, tmp_path, capsys) -> None:
    arch = ["--arch-arg=width=2", "--arch-arg=image_size=8"]
    settings = ["--set=epochs=20", "--set=batch_size=4", "--set=holdout=0", "--set=lr=0.01"]
    told = ["plant", "--dataset", data, "--attack", "badnets", *arch, *settings]
    out, log = tmp_path / "victim", tmp_path / "log"
    argv = [*told, "--out", str(out)]
    assert stop(argv, out, signal.SIGTERM, log, "bar") == 130
    assert "Traceback" not in log.read_text()
    saved = torch.load(tmp_path / "victim.partial/checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < 300

    refused(capsys, 6, "Pass --resume", argv)
    refused(capsys, 6, "found other lr", [*argv, "--set=lr=0.5", "--resume"])
    refused(capsys, 6, "found another attack", [*argv, "--attack=sig", "--resume"])
    refused(capsys, 6, "found another arch_args", [*argv, "--arch-arg=width=3", "--resume"])

    assert main([*argv, "--resume"]) == 0
    assert main([*told, "--out", str(tmp_path / "whole")]) == 0
    assert same(out, tmp_path / "whole")
    assert not (tmp_path / "victim.partial").exists()


def test_resume_with_nothing_to_go_on_from_starts_afresh(data, suspect_folder, tmp_path) -> None:
    told = ["purify", str(suspect_folder), "--dataset", data, "--shots", "2", "--defense", "identity"]
    assert main([*told, "--out", str(tmp_path / "clean"), "--resume"]) == 0


def test_a_checkpoint_that_does_not_load(data, suspect_folder, tmp_path, capsys) -> None:
    (tmp_path / "clean.partial").mkdir()
    (tmp_path / "clean.partial/checkpoint.pt").write_bytes(b"junk")
    told = ["purify", str(suspect_folder), "--dataset", data, "--shots", "2", "--out", str(tmp_path / "clean")]
    refused(capsys, 6, "found one that does not load", [*told, "--resume"])


def test_two_processes_write_one_folder(data, suspect_folder, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m"]
    settings = [f"--set={s}" for s in ("steps=3", "exposures=0", "cut=0", "batch_size=8", "mixed_precision=no")]
    told = ["purify", str(suspect_folder), "--dataset", data, "--shots", "2", *settings, "--out"]
    command = [*launch, "hf_nft.cli.main", *told, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("method  nft") == 1
    assert main([*told, str(tmp_path / "one")]) == 0
    one, two = weights(tmp_path / "one/adapter"), weights(tmp_path / "two/adapter")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
    assert sorted(p.name for p in tmp_path.glob("two*")) == ["two"]
