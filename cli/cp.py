"""`hf-nft cp`: a copy of a recipe to edit."""

import shutil
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: hf-nft cp image/cifar10-badnets-preact_resnet18 my.yaml")(cp)


def cp(
    recipe: Annotated[str, typer.Argument(help="A recipe; see: hf-nft ls recipes.")],
    to: Annotated[str, typer.Argument(help="File to write; must not exist.")],
) -> None:
    """Copy a recipe to a file of your own; run it with: hf-nft run FILE."""
    from hf_nft import recipes
    from hf_nft.errors import OutputError

    source, target = recipes.path_of(recipe), Path(to)
    if target.is_dir():
        target = target / "recipe.yaml"
    if target.exists():
        raise OutputError(f"{target}: expected a new file, found one that exists. Choose another name.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"{target}: expected a place that can be written, found: {error.strerror}.") from error
    typer.secho(f"Wrote {target}. Run it with: hf-nft run {target}", err=True, fg="green")
