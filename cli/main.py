"""Assembles the verbs and maps errors to exit codes.

Exit codes: 0 done; 1 unexpected error; 2 wrong usage or setting; 3 model or data not usable; 4 unsafe model refused;
5 training diverged; 6 output cannot be written; 7 Hub not reachable; 8 a model is not what its
record claims; 130 interrupted.
"""

import os
import signal
import sys
from typing import Any

import typer
from hf_nft.cli import app as app_verb
from hf_nft.cli import attack, cp, demo, evaluate, inspect, ls, plant, purify, push, run, verify

from hf_nft.errors import HFNFTError
from hf_nft.reporting.text import plain

LONGEST_MESSAGE = 2000
"""Characters of an error that reach the terminal; names and labels in it may come from strangers."""

app = typer.Typer(
    name="hf-nft",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 model or data, 4 unsafe model, 5 diverged, 6 output, "
    "7 network, 8 not as claimed, 130 interrupted. HF_NFT_DEBUG=1 shows tracebacks.",
)


def _version(show: bool) -> None:
    if show:
        from hf_nft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Remove backdoors from models you did not train, with a few clean examples."""


for verb in (inspect, purify, evaluate, plant, attack, push, verify, demo, app_verb, ls, cp, run):
    verb.register(app)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default those of the process.

    Returns:
        The exit code; see the module's text.
    """
    previous, told = _raise_on_sigterm(), sys.argv
    if argv is not None:
        sys.argv = ["hf-nft", *argv]  # which records and cards tell
    try:
        app(args=argv, prog_name="hf-nft", standalone_mode=True)
    except HFNFTError as error:
        if os.environ.get("HF_NFT_DEBUG"):
            raise
        typer.secho(f"Error: {plain(error, LONGEST_MESSAGE)}", err=True, fg="red")
        return error.exit_code
    except SystemExit as done:
        if done.code == 130:
            hint = "plant and purify go on with --resume if a checkpoint was written; others start anew."
            typer.secho(f"Interrupted. {hint}", err=True, fg="red")
        return done.code if isinstance(done.code, int) else 1
    except Exception as error:
        if os.environ.get("HF_NFT_DEBUG"):
            raise
        text = plain(error, LONGEST_MESSAGE)
        typer.secho(
            f"Unexpected error: {type(error).__name__}: {text}. HF_NFT_DEBUG=1 shows where.", err=True, fg="red"
        )
        return 1
    finally:
        sys.argv = told
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    return 0


def _raise_on_sigterm() -> Any:
    """Treat SIGTERM like Ctrl-C, so that what is half-written is removed; returns the handler that was there."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the caller handles signals
        return None


if __name__ == "__main__":
    sys.exit(main())
