"""A small world for the command line: a data set, a victim planted by the real command, and a way to run commands."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from hf_nft.cli.main import main

TINY = ["--arch-arg", "width=4", "--arch-arg", "image_size=16"]


@dataclass(frozen=True)
class World:
    """Where the data set and the victim lie."""

    data: str
    victim: str


@pytest.fixture(scope="session")
def rows(image_rows) -> datasets.DatasetDict:
    """Return 120 training and 40 test rows of 4 classes, 16 pixels wide."""
    return datasets.DatasetDict(train=image_rows(120, 16, seed=1), test=image_rows(40, 16, seed=2))


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Callable[[datasets.DatasetDict], str]:
    """Write a data set as parquet files; returns the folder."""

    def write(splits: datasets.DatasetDict) -> str:
        folder = tmp_path_factory.mktemp("data")
        for name, part in splits.items():
            part.to_parquet(str(folder / f"{name}.parquet"))
        return str(folder)

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory, rows, store) -> World:
    """Plant a victim with the real command."""
    data, out = store(rows), str(tmp_path_factory.mktemp("runs") / "victim")
    settings = ["--set", "epochs=2", "--set", "batch_size=16", "--set", "holdout=0.3"]
    code = main(["plant", "--dataset", data, "--attack", "badnets", *TINY, *settings, "--out", out])
    assert code == 0
    return World(data, out)


@pytest.fixture
def refused(cli) -> Callable[..., Any]:
    """Run a command that must be refused: exit code, a short message with each phrase, and nothing left behind."""

    def run(code: int, phrases: list[str], *argv: str | Path) -> Any:
        before = sorted(os.listdir())
        done = cli(*argv)
        assert done.code == code, done.err
        for phrase in phrases:
            assert phrase in done.message
        assert "Traceback" not in done.err
        assert len(done.message.splitlines()) <= 2
        assert done.out == ""
        assert sorted(os.listdir()) == before
        return done

    return run


@pytest.fixture(scope="session")
def fast() -> list[str]:
    """Return options that make a purification of NFT take two steps."""
    settings = ("steps=2", "exposures=0", "cut=0", "batch_size=8")
    return ["--shots=2", "--mixed-precision=no", *(f"--set={setting}" for setting in settings)]
