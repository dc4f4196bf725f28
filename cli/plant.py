"""`hf-nft plant`: make a backdoored model to measure defenses on."""

from typing import Annotated

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft plant --dataset data/cifar10 --attack badnets --arch preact_resnet18 --out runs/victim
  hf-nft plant --dataset data/cifar10 --attack sig --poison-rate 0.8 --arch-arg width=64 --set epochs=60
  hf-nft plant --dataset data/cifar10 --trigger patch.png --attack-arg target_class=3
  hf-nft plant --dataset data/cifar10 --attack badnets --push-to me/cifar10-badnets-backdoored
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(plant)


def plant(
    dataset: Annotated[str, typer.Option(help="Hub id, parquet folder or image folder.")],
    attack: common.AttackName = None,
    attack_arg: common.AttackArg = None,
    trigger: common.Trigger = None,
    arch: Annotated[str, typer.Option(help="Architecture; see: hf-nft ls models.")] = "preact_resnet18",
    arch_arg: Annotated[list[str] | None, typer.Option(help="Architecture setting, KEY=VALUE. Repeatable.")] = None,
    poison_rate: Annotated[
        float | None, typer.Option(help="Share of rows poisoned. Default 0.1, or 0.8 of the class for clean label.")
    ] = None,
    rate_base: Annotated[
        str | None, typer.Option(help="all, candidates or, of clean-label attacks, target_class.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder to write; must not exist.")] = "runs/victim",
    settings: common.Set = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    task_arg: common.TaskArg = None,
    column: common.Column = None,
    split: common.Split = None,
    eval_split: common.EvalSplit = None,
    limit: common.Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    push_to: common.PushTo = None,
    public: common.Public = False,
    create_pr: common.CreatePr = False,
    update: common.Update = False,
    ungated: common.Ungated = False,
    as_json: common.AsJson = False,
) -> None:
    """Train a backdoored model from scratch, for measuring defenses; without --attack a benign one.

    A tenth of the training rows is kept from the victim, so that a defender's shots are new to it.
    """
    with common.quiet_libraries():
        from hf_nft.configs import build, pairs
        from hf_nft.planting import PlantConfig
        from hf_nft.reporting.repository import CURED, PLANTED
        from hf_nft.workflows import PlantJob

        job = PlantJob(
            dataset=dataset,
            columns=pairs(column or []),
            task_args=dict(pairs(task_arg or [])),
            split=split,
            eval_split=eval_split,
            **common.attack_options(attack, attack_arg, trigger),
            arch=arch,
            arch_args=dict(pairs(arch_arg or [])),
            poison_rate=poison_rate,
            rate_base=rate_base,
            config=build(PlantConfig, {"seed": seed, **pairs(settings or [])}),
            out=out,
            resume=resume,
            limit=limit,
            progress=not as_json,
        )
        contents = CURED if job.attack is None else PLANTED
        destination = common.wanted_destination(push_to, contents, public, create_pr, update, ungated)
        record = job.run()
        common.show(record, as_json, f"Wrote {out}. Purify it with: hf-nft purify {out} --dataset {dataset} --shots 10")
        common.push(out, destination)
