"""`hf-nft purify`: from a suspect model to a cleaned one."""

from typing import Annotated

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft purify org/suspect-model --shots 10
  hf-nft purify runs/victim --dataset data/cifar10 --attack badnets --out runs/clean
  hf-nft purify runs/victim --dataset data/cifar10 --preset paper --shots 50 --set steps=500
  hf-nft purify runs/victim --dataset data/cifar10 --defense finetune
  hf-nft purify org/suspect-model --shots 10 --push-to me/suspect-model-purified
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(purify)


def purify(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the suspect.")],
    shots: Annotated[int, typer.Option(min=1, help="Clean examples per class.")] = 10,
    dataset: common.Dataset = None,
    out: Annotated[str, typer.Option(help="Folder to write; must not exist.")] = "runs/clean",
    preset: Annotated[str, typer.Option(help="Named settings of the defense, such as default or paper.")] = "default",
    defense: Annotated[str, typer.Option(help="Defense; see: hf-nft ls defenses.")] = "nft",
    settings: common.Set = None,
    attack: common.AttackName = None,
    attack_arg: common.AttackArg = None,
    trigger: common.Trigger = None,
    task_arg: common.TaskArg = None,
    column: common.Column = None,
    split: common.Split = None,
    eval_split: common.EvalSplit = None,
    seed: Annotated[int, typer.Option(help="Seed of the defense.")] = 0,
    shot_seed: Annotated[int, typer.Option(help="Seed of the draw of shots.")] = 0,
    mixed_precision: Annotated[str, typer.Option(help="auto, no, fp16 or bf16.")] = "auto",
    limit: common.Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    revision: common.Revision = None,
    allow_pickle: common.AllowPickle = False,
    trust_remote_code: common.RemoteCode = False,
    push_to: common.PushTo = None,
    public: common.Public = False,
    create_pr: common.CreatePr = False,
    update: common.Update = False,
    as_json: common.AsJson = False,
) -> None:
    """Remove a backdoor from MODEL with a few clean examples.

    The attack, if one is named, is only measured before and after; the defense never sees it. Shots come from the data
    set's train split, metrics from its test split. OUT holds model/, adapter/, record.json and the card README.md.
    """
    with common.quiet_libraries():
        from hf_nft import registry
        from hf_nft.configs import pairs
        from hf_nft.reporting.repository import CURED
        from hf_nft.workflows import PurifyJob

        chosen = registry.get("defenses", defense).from_preset(
            preset, **{"seed": seed, "mixed_precision": mixed_precision, **pairs(settings or [])}
        )
        job = PurifyJob(
            model=model,
            shots=shots,
            shot_seed=shot_seed,
            dataset=dataset,
            columns=pairs(column or []),
            task_args=dict(pairs(task_arg or [])),
            split=split,
            eval_split=eval_split,
            **common.attack_options(attack, attack_arg, trigger),
            defense=chosen,
            out=out,
            resume=resume,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            limit=limit,
            progress=not as_json,
        )
        destination = common.wanted_destination(push_to, CURED, public, create_pr, update)
        record = job.run()
        common.show(record, as_json, f"Wrote {out}. The cleaned model is {out}/model, its card {out}/README.md.")
        common.push(out, destination)
