"""`hf-nft attack`: what an attack needs, makes and looks like, without a victim."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from hf_nft.cli import common

if TYPE_CHECKING:
    from hf_nft.workflows import AttackJob

TRAIN = """\b
Examples:
  hf-nft attack train troj --dataset data/cifar10 --out runs/troj-artefact
  hf-nft attack train dyn --dataset data/cifar10 --attack-arg train_epochs=10
"""
SHOW = """\b
Examples:
  hf-nft attack show badnets --dataset data/cifar10 --out grid.png
  hf-nft attack show wanet --dataset data/cifar10 --attack-arg strength=1 --out grid.png
"""
POISON = """\b
Examples:
  hf-nft attack poison badnets --dataset data/cifar10 --rate 0.1 --out data/cifar10-badnets
  hf-nft attack poison sig --dataset data/cifar10 --out data/sig --push-to me/cifar10-sig-backdoored
"""

Name = Annotated[str, typer.Argument(help="Attack; see: hf-nft ls attacks.")]
Data = Annotated[str, typer.Option(help="Hub id, parquet folder or image folder.")]
Arch = Annotated[str, typer.Option(help="Architecture; tells resolution and normalisation.")]
ArchArg = Annotated[list[str] | None, typer.Option(help="Architecture setting, KEY=VALUE. Repeatable.")]
Augment = Annotated[str, typer.Option(help="Augmentation when a surrogate is trained.")]
Holdout = Annotated[float, typer.Option(min=0, max=0.99, help="Share of training rows left to the defender.")]

app = typer.Typer(help="Train, show or write an attack, without a victim.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add the verb with its three verbs."""
    app.registered_commands.clear()
    for verb, examples in ((train, TRAIN), (show, SHOW), (poison, POISON)):
        app.command(epilog=examples)(verb)
    root.add_typer(app, name="attack")


def _job(attack: str, arguments: list[str] | None, arch_arg: list[str] | None, **told: Any) -> "AttackJob":
    from hf_nft.configs import pairs
    from hf_nft.workflows import AttackJob

    columns = pairs(told.pop("column") or [])
    chosen = common.attack_options(attack, arguments, None)
    return AttackJob(**chosen, arch_args=dict(pairs(arch_arg or [])), columns=columns, progress=True, **told)


def train(
    attack: Name,
    dataset: Data,
    attack_arg: common.AttackArg = None,
    arch: Arch = "preact_resnet18",
    arch_arg: ArchArg = None,
    augment: Augment = "default",
    holdout: Holdout = 0.1,
    column: common.Column = None,
    out: Annotated[str | None, typer.Option(help="Folder to write; default one in the cache.")] = None,
) -> None:
    """Train what an attack needs first, once.

    That is a generator, an encoder, a patch or a surrogate. Results are cached: the same settings on the same data
    are trained once. Prints the folder, which other commands take as --attack-arg artefact=FOLDER; plant finds it
    in the cache by itself.
    """
    with common.quiet_libraries():
        told = {"dataset": dataset, "arch": arch, "augment": augment, "holdout": holdout, "column": column}
        folder = _job(attack, attack_arg, arch_arg, **told).train_artefact(out)
    typer.echo(folder)


def show(
    attack: Name,
    dataset: Data,
    out: Annotated[str, typer.Option(help="Picture to write; must not exist.")] = "grid.png",
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 8,
    attack_arg: common.AttackArg = None,
    arch: Arch = "preact_resnet18",
    arch_arg: ArchArg = None,
    augment: Augment = "default",
    holdout: Holdout = 0.1,
    column: common.Column = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON on stdout.")] = False,
) -> None:
    """Draw what a trigger changes, and print how much.

    Three rows: test images, the same triggered, ten times the difference (grey: none). The numbers are means over the
    images, l-inf their largest. An attack with something to train is trained first, once: minutes to hours.
    """
    import dataclasses
    import json
    import math

    with common.quiet_libraries():
        told = {"dataset": dataset, "arch": arch, "augment": augment, "holdout": holdout, "column": column}
        found = _job(attack, attack_arg, arch_arg, **told).show(out, count)
    if as_json:
        numbers = dataclasses.asdict(found)  # without a change PSNR is infinite, which JSON has no word for
        typer.echo(json.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()}))
        return
    typer.echo(f"l-inf {found.linf:.0f} (the largest of all images), l2 {found.l2:.0f}, in grey levels of 255")
    typer.echo(f"PSNR {found.psnr:.1f} dB, changed pixels {found.pixels:.1%}")
    typer.secho(
        f"Wrote {out}: images, the same triggered, ten times the difference (grey: none).", err=True, fg="green"
    )


def poison(
    attack: Name,
    dataset: Data,
    out: Annotated[str, typer.Option(help="Folder to write; must not exist.")],
    rate: Annotated[float | None, typer.Option(help="Share of rows poisoned. Default the attack's.")] = None,
    rate_base: Annotated[
        str | None, typer.Option(help="all, candidates or, of clean-label attacks, target_class.")
    ] = None,
    attack_arg: common.AttackArg = None,
    arch: Arch = "preact_resnet18",
    arch_arg: ArchArg = None,
    augment: Augment = "default",
    holdout: Holdout = 0.1,
    column: common.Column = None,
    push_to: common.PushTo = None,
    public: common.Public = False,
    create_pr: common.CreatePr = False,
    update: common.Update = False,
    ungated: common.Ungated = False,
) -> None:
    """Write a poisoned data set, with its card.

    Its splits: train, poisoned; test, clean; triggered, the test rows that count for the attack success rate. For
    attacks that alter the victim's training this is their static approximation, for any trainer.
    """
    with common.quiet_libraries():
        from hf_nft.reporting.repository import POISONED

        told = {"dataset": dataset, "arch": arch, "augment": augment, "holdout": holdout, "column": column}
        job = _job(attack, attack_arg, arch_arg, **told)
        destination = common.wanted_destination(push_to, POISONED, public, create_pr, update, ungated)
        count = job.poison(out, rate, rate_base)
        typer.secho(f"Wrote {out}: {count} poisoned rows.", err=True, fg="green")
        common.push(out, destination)
