"""`hf-nft run`: a recipe from top to bottom."""

from typing import Annotated

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft run image/cifar10-badnets-preact_resnet18
  hf-nft run image/cifar10-badnets-preact_resnet18 dataset=data/cifar10 plant.config.epochs=2
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(run)


def run(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a recipe file.")],
    override: Annotated[list[str] | None, typer.Argument(help="PATH=VALUE, such as plant.config.epochs=2.")] = None,
) -> None:
    """Run a recipe: plant a victim, purify it, write both."""
    with common.quiet_libraries():
        from hf_nft import recipes
        from hf_nft.configs import pairs

        loaded = recipes.load(recipe, pairs(override or []))
        for job in recipes.jobs(loaded, progress=True):
            common.show(job.run(), False, f"Wrote {job.out}.")
