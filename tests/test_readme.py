"""What the README and the pages under docs/ show is what works.

Every ```python block runs as it stands, in a folder that holds `data/` (parquet, 4 classes) and `runs/victim` (a toy
victim of BadNets). Every `hf-nft` command in a ```bash block must be understood by the real command line. It is also
executed, top to bottom, if the folders it names are there by then (`data`, `runs/victim`, or what an earlier command of
the page wrote), with settings appended that make it short. `hf-nft demo` and `hf-nft run` are only read here; they have
tests of their own.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from hf_nft.cli.main import app, main

from hf_nft import recipes
from hf_nft.configs import pairs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TINY = ["--arch-arg=width=4", "--arch-arg=image_size=16"]
SHORTER = {
    "plant": [*TINY, "--set=max_steps=2", "--limit=20"],
    "purify": ["--set=batch_size=8", "--limit=20"],
    "evaluate": ["--limit=20"],
}
FEWER = ["--set=steps=2", "--set=exposures=1", "--set=unlearn_steps=2", "--set=relearn_passes=1"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every `hf-nft` command, without comments and with continued lines joined."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.split(" #")[0]):
                words = shlex.split(part, comments=True)
                if words[:1] == ["hf-nft"]:
                    found.append(words[1:])
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def template(tmp_path_factory, image_rows) -> Path:
    """Make the folder that a page's snippets start from."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "data").mkdir()
    image_rows(800, 16, seed=1).to_parquet(str(folder / "data/train.parquet"))
    image_rows(40, 16, seed=2).to_parquet(str(folder / "data/test.parquet"))
    told = ["--dataset", str(folder / "data"), "--attack", "badnets", *TINY, "--set=epochs=1", "--set=holdout=0.2"]
    assert main(["plant", *told, "--out", str(folder / "runs/victim")]) == 0
    return folder


@pytest.fixture
def here(template, tmp_path, monkeypatch) -> Path:
    """Start in a fresh copy of that folder."""
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_readme_has_something_to_run() -> None:
    assert commands(PAGES[0])
    assert blocks(PAGES[0], "python")


@pytest.mark.parametrize(
    ("page", "block"),
    [pytest.param(page, b, id=f"{name(page)}:{i}") for page in PAGES for i, b in enumerate(blocks(page, "python"))],
)
def test_python_blocks_run_as_they_stand(here, page: Path, block: str) -> None:
    exec(compile(block, name(page), "exec"), {"__name__": "__main__"})


def understood(words: list[str]) -> None:
    """Let the real command line read a command, without running it."""
    group = typer.main.get_command(app)
    context = group.make_context("hf-nft", list(words), resilient_parsing=True)
    verb, *rest = words
    command = group.get_command(context, verb)
    assert command is not None, f"no verb {verb!r}"
    command.make_context(verb, rest, parent=context)


def runs_here(words: list[str]) -> bool:
    verb, *rest = words
    told = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--dataset"]
    if verb == "plant":
        return told == ["data"]
    if verb in ("purify", "evaluate"):
        return told == ["data"] and Path(rest[0]).is_dir()
    return verb == "cp" or (verb == "ls" and (rest[0] != "modules" or Path(rest[1]).is_dir()))


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES if commands(page)])
def test_commands_are_understood_and_run_where_they_can(here, page: Path, capsys) -> None:
    for words in commands(page):
        if words[0].startswith("-"):
            assert main(words) == 0
            continue
        understood(words)
        if words[0] == "run":
            assert recipes.jobs(recipes.load(words[1], pairs(words[2:])))
        elif runs_here(words):
            if "--out" in words:  # a page may plant the victim that it is given
                shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
            nft = words[0] == "purify" and "--defense" not in words
            capsys.readouterr()
            code = main([*words, *SHORTER.get(words[0], []), *(FEWER if nft else [])])
            assert code == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
