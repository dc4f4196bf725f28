"""`hf-nft demo`: the whole story on scikit-learn's digits, without network or downloads."""

from typing import Annotated

import typer
from hf_nft.cli import common


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(demo)


def demo(
    out: Annotated[str, typer.Option(help="Folder to write; must not exist.")] = "hf-nft-demo",
    seed: Annotated[int, typer.Option(help="Seed of the victim, the shots and the defense.", min=0)] = 0,
) -> None:
    """Plant BadNets in a small network on handwritten digits, purify it with 10 shots per class, show both.

    Takes about a minute on two CPU cores and needs nothing but the installed packages.
    """
    with common.quiet_libraries():
        from hf_nft.demo import run_demo

        record = run_demo(out, seed, progress=True)
    hint = (
        f"Wrote {out}/victim and {out}/clean: the cleaned model is {out}/clean/model, its card {out}/clean/README.md."
    )
    common.show(record, False, hint)
