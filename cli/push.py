"""`hf-nft push`: a run folder, or a poisoned data set, becomes a repository on the Hub."""

from typing import Annotated

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft push runs/clean me/suspect-model-purified
  hf-nft push runs/clean org/suspect-model --create-pr
  hf-nft push runs/victim me/cifar10-backdoored
  hf-nft push data/cifar10-badnets me/cifar10-badnets-backdoored
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(push)


def push(
    run_dir: Annotated[str, typer.Argument(help="Folder that purify, plant or attack poison wrote.")],
    repo: Annotated[str, typer.Argument(help="Hub id of the repository.")],
    public: common.Public = False,
    create_pr: common.CreatePr = False,
    update: common.Update = False,
    ungated: common.Ungated = False,
) -> None:
    """Push RUN_DIR to REPO in one commit: model, adapter, record, figures and card, or the data and theirs.

    A new repository is private. One that holds files is left alone, unless --create-pr or --update says how to write
    into it; then the parts of its card that others wrote stay, and weights that would be loaded in place of yours are
    removed. Repeat an interrupted push and it goes on. A planted model or a poisoned data set is gated, and its REPO
    must carry the word `backdoored`.
    """
    with common.quiet_libraries():
        common.push(run_dir, common.destination(repo, public, create_pr, update, ungated))
