"""Options and small habits that several verbs share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_nft.reporting.text import plain

if TYPE_CHECKING:
    from hf_nft.reporting.hub import Destination
    from hf_nft.reporting.record import RunRecord
    from hf_nft.reporting.repository import Contents

Dataset = Annotated[
    str | None,
    typer.Option(help="Hub id or folder, which :CONFIG may follow. Default: the one the model's card names."),
]
Column = Annotated[list[str] | None, typer.Option(help="Column name, ROLE=NAME, such as image=img. Repeatable.")]
Split = Annotated[str | None, typer.Option(help="Split that shots are drawn from. Default: train.")]
EvalSplit = Annotated[str | None, typer.Option(help="Split that metrics are measured on. Default: test or validation.")]
AttackName = Annotated[str | None, typer.Option(help="Attack; see: hf-nft ls attacks.")]
AttackArg = Annotated[list[str] | None, typer.Option(help="Attack setting, KEY=VALUE. Repeatable.")]
TaskArg = Annotated[list[str] | None, typer.Option(help="Task setting, KEY=VALUE. Repeatable.")]
Trigger = Annotated[str | None, typer.Option(help="Your own patch (PNG); means --attack patch.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Setting, KEY=VALUE. Repeatable.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate on this many test rows only; for trials.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load weights from a pickle file, restricted.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
PushTo = Annotated[str | None, typer.Option(help="Push the run to this Hub repository when it is done.")]
Public = Annotated[bool, typer.Option("--public", help="Let everybody see a new repository; default private.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request in a repository that exists.")]
Update = Annotated[bool, typer.Option("--update", help="Commit into a repository that exists.")]
Ungated = Annotated[
    bool, typer.Option("--ungated", help="Let what carries a backdoor be read without asking for access.")
]


def attack_options(attack: str | None, arguments: list[str] | None, trigger: str | None) -> dict[str, Any]:
    """Return the job's attack settings from the options that name them."""
    from hf_nft.configs import pairs
    from hf_nft.errors import ConfigError

    chosen: dict[str, Any] = dict(pairs(arguments or []))
    if trigger is not None:
        if attack not in (None, "patch"):
            raise ConfigError(f"--trigger: expected no --attack beside it, found '{attack}'.")
        return {"attack": "patch", "attack_args": {**chosen, "trigger_file": trigger}}
    return {"attack": attack, "attack_args": chosen}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' progress bars and advice out of the way, and warnings on one line each."""
    import warnings

    import datasets
    import huggingface_hub
    import transformers

    from hf_nft.acceleration import leave_together

    def line(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            typer.secho(f"Warning: {plain(message, 1000)}", err=True, fg="yellow")

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told once, by our own error
    huggingface_hub.logging.set_verbosity_error()  # its notes on retries hold signed addresses
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    old, warnings.showwarning = warnings.showwarning, line
    try:
        yield
        leave_together()
    finally:
        warnings.showwarning = old


def show(record: "RunRecord", as_json: bool, hint: str) -> None:
    """Print a record: the table and a hint for what to do next, or JSON alone."""
    import dataclasses
    import json

    from hf_nft.acceleration import processes

    if not processes().is_main_process:
        return
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(record)))
        return
    from hf_nft.reporting.render import summary_table

    typer.echo(summary_table(record))
    typer.secho(hint, err=True, fg="green")


def destination(repo: str, public: bool, create_pr: bool, update: bool, ungated: bool = False) -> "Destination":
    """Return where a run is pushed, from the options that say so."""
    from hf_nft.reporting.hub import Destination

    return Destination(repo, public=public, create_pr=create_pr, update=update, gated=not ungated)


def wanted_destination(
    repo: str | None, contents: "Contents", public: bool, create_pr: bool, update: bool, ungated: bool = False
) -> "Destination | None":
    """Return where a run will be pushed, refused now if it would be refused then; None if it will not."""
    from hf_nft.errors import ConfigError

    if repo is None:
        flags = {"--public": public, "--create-pr": create_pr, "--update": update, "--ungated": ungated}
        for flag in (flag for flag, given in flags.items() if given):
            raise ConfigError(f"{flag}: expected --push-to beside it, found none.")
        return None
    from hf_nft.reporting.hub import check_destination

    to = destination(repo, public, create_pr, update, ungated)
    check_destination(to, contents)
    return to


def push(folder: str, to: "Destination | None") -> None:
    """Push a run folder and say where it is now; None pushes nothing."""
    from pathlib import Path

    from hf_nft.acceleration import processes

    if to is None or not processes().is_main_process:
        return
    from hf_nft.reporting import hub

    done = hub.push(Path(folder), to)
    if done.left_out:
        typer.secho(plain(f"Left out: {', '.join(done.left_out)}", 1000), err=True, fg="yellow")
    typer.secho(plain(f"Pushed {folder} to {done.url} ({done.commit}).", 1000), err=True, fg="green")
