"""`hf-nft verify`: is a purified model what its record claims?"""

from typing import TYPE_CHECKING, Annotated

import typer
from hf_nft.cli import common

if TYPE_CHECKING:
    from hf_nft.workflows import Verification

EXAMPLES = """\b
Examples:
  hf-nft verify me/suspect-model-purified
  hf-nft verify me/suspect-model-purified --dataset data/cifar10
  hf-nft verify runs/clean --suspect runs/victim
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(verify)


def verify(
    model: Annotated[str, typer.Argument(help="Hub id or run folder of a purified model.")],
    suspect: Annotated[
        str | None, typer.Option(help="Hub id or folder of the suspect. Default: the recorded one, at its revision.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set to measure the metrics on again.")] = None,
    attack_arg: common.AttackArg = None,
    task_arg: common.TaskArg = None,
    column: common.Column = None,
    split: common.Split = None,
    eval_split: common.EvalSplit = None,
    revision: common.Revision = None,
    allow_pickle: common.AllowPickle = False,
    trust_remote_code: common.RemoteCode = False,
    as_json: common.AsJson = False,
) -> None:
    """Check that MODEL is what its record claims: its suspect with the adapter folded in, weight by weight.

    The suspect is loaded at the recorded revision. With --dataset the recorded metrics are measured again, before and
    after. Exit code 8 if anything is not as claimed.
    """
    with common.quiet_libraries():
        from hf_nft.configs import pairs
        from hf_nft.errors import MismatchError
        from hf_nft.workflows import VerifyJob

        found = VerifyJob(
            model=model,
            suspect=suspect,
            dataset=dataset,
            attack_args=dict(pairs(attack_arg or [])),
            columns=pairs(column or []),
            task_args=dict(pairs(task_arg or [])),
            split=split,
            eval_split=eval_split,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        ).run()
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        _show(found)
    if found.problems:
        raise MismatchError(f"{model}: expected what its record claims, found: {'; '.join(found.problems)}.")
    typer.secho("All that was checked is as claimed.", err=True, fg="green")


def _show(found: "Verification") -> None:
    from hf_nft.reporting.render import LABELS
    from hf_nft.reporting.text import percent, plain

    at = f" at {found.suspect_revision[:12]}" if found.suspect_revision else ""
    if found.tensors:
        rest = f", the others differ by up to {found.difference:.1g}" if found.equal < found.tensors else ""
        typer.echo(f"weights  {found.equal} of {found.tensors} tensors equal bit by bit{rest}")
    else:
        typer.echo("weights  not checked: the run has no adapter")
    typer.echo(f"suspect  {plain(found.suspect)}{at}")
    for side, metrics in found.metrics.items():
        for name, pair in metrics.items():
            label = f"{LABELS.get(name, plain(name, 30))} {side}"
            shown = [percent(pair[which]) for which in ("recorded", "measured")]
            typer.echo(f"{label:<14} recorded {shown[0]} %  measured {shown[1]} %")
