"""`hf-nft evaluate`: ACC, and ASR and R-ACC for a named attack."""

from typing import Annotated

import typer
from hf_nft.cli import common

EXAMPLES = """\b
Examples:
  hf-nft evaluate runs/clean/model --dataset data/cifar10 --attack badnets
  hf-nft evaluate org/model --trigger patch.png --attack-arg target_class=3
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    dataset: common.Dataset = None,
    attack: common.AttackName = None,
    attack_arg: common.AttackArg = None,
    trigger: common.Trigger = None,
    task_arg: common.TaskArg = None,
    column: common.Column = None,
    split: common.Split = None,
    eval_split: common.EvalSplit = None,
    mixed_precision: Annotated[str, typer.Option(help="auto, no, fp16 or bf16.")] = "auto",
    limit: common.Limit = None,
    revision: common.Revision = None,
    allow_pickle: common.AllowPickle = False,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.AsJson = False,
) -> None:
    """Measure MODEL on the test split, clean and triggered.

    A model that this package planted or purified carries its attack's settings; naming the attack is enough then.
    """
    with common.quiet_libraries():
        from hf_nft.configs import pairs
        from hf_nft.workflows import EvaluateJob

        record = EvaluateJob(
            model=model,
            dataset=dataset,
            columns=pairs(column or []),
            task_args=dict(pairs(task_arg or [])),
            split=split,
            eval_split=eval_split,
            **common.attack_options(attack, attack_arg, trigger),
            mixed_precision=mixed_precision,
            limit=limit,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ).run()
    named = f" --dataset {dataset}" if dataset is not None else ""
    common.show(record, as_json, f"Purify a suspect with: hf-nft purify {model}{named} --shots 10")
