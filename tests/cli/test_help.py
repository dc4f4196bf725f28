"""What answers without a model: help, version, lists, and the speed of the help."""

import subprocess
import sys
from pathlib import Path

import pytest

import hf_nft
from hf_nft import registry

VERBS = ("purify", "evaluate", "plant", "attack", "push", "verify", "demo", "app", "ls", "cp", "run")


def test_help_names_every_verb_and_every_exit_code(cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for word in (*VERBS, "0 done", "130 interrupted"):
        assert word in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli, verb: str) -> None:
    done = cli(verb, "-h")
    assert done.code == 0
    assert f"hf-nft {verb}" in done.out


def test_version(cli) -> None:
    assert (cli("--version").code, cli("--version").out) == (0, hf_nft.__version__ + "\n")


def test_no_verb_shows_the_help_as_a_usage_error(cli) -> None:
    done = cli()
    assert done.code == 2
    assert "purify" in done.err


@pytest.mark.parametrize("verb", ["purify", "app"])
def test_help_imports_nothing_heavy(child, verb: str) -> None:
    heavy = child(
        "import sys\n"
        "from hf_nft.cli.main import main\n"
        f"assert main(['{verb}', '--help']) == 0\n"
        "names = ('torch', 'numpy', 'transformers', 'datasets', 'peft', 'gradio')\n"
        "print('HEAVY', [name for name in names if name in sys.modules])"
    )
    assert heavy.endswith("HEAVY []")


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("hf-nft")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, hf_nft.__version__ + "\n")


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_ls_puts_one_name_first_on_each_line(cli, kind: str) -> None:
    done = cli("ls", kind)
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == registry.names(kind)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in sorted(registry.KINDS) for n in registry.names(k)])
def test_ls_shows_the_settings_of_each(cli, kind: str, name: str) -> None:
    done = cli("ls", kind, name)
    assert done.code == 0
    assert done.out.split()[0] == name


def test_ls_recipes(cli) -> None:
    from hf_nft import recipes

    done = cli("ls", "recipes")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == recipes.names()
    for name in recipes.names():
        assert cli("ls", "recipes", name).out == recipes.path_of(name).read_text()


def test_ls_modules_lists_what_can_carry_masks(cli, world) -> None:
    done = cli("ls", "modules", world.victim)
    assert done.code == 0
    assert "stages.0.0.bn1" in [line.split()[0] for line in done.out.splitlines()]
    assert "4 masks by default (gain)" in done.out


@pytest.mark.parametrize(
    ("argv", "phrase"),
    [
        (["ls", "attack"], "Closest: attacks"),
        (["ls", "attacks", "badnet"], "Closest: badnets"),
        (["ls", "modules"], "expected a model"),
        (["ls", "attacks", "--allow-pickle"], "hf-nft ls modules MODEL"),
        (["ls", "recipes", "nothing"], "hf-nft ls recipes"),
        (["cp", "nothing", "here.yaml"], "hf-nft ls recipes"),
        (["run", "nothing"], "hf-nft ls recipes"),
        (["frobnicate"], "No such command"),
        (["purify"], "Missing argument"),
        (["purify", "model", "--shoots", "3"], "No such option: --shoots"),
        (["purify", "model", "--shots", "0"], "--shots"),
        (["purify", "model", "--shots", "many"], "--shots"),
        (["evaluate", "model", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_usage(refused, argv: list[str], phrase: str) -> None:
    refused(2, [phrase], *argv)
