"""Doubts: reasons why the numbers of a run should not be believed as they stand, each with a page that explains it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_nft.evaluation.run import Measured

WEAK_BACKDOOR = 0.8
SMALL_SET = 500
COLLAPSE = 0.1
LITTLE = 0.1

FROM_DEFENSES = (
    "composite-trigger",
    "exposure-did-not-collapse",
    "few-shots",
    "needed-units",
    "no-statistics",
    "nothing-stands-out",
    "way-left-open",
)
"""Codes whose sentences are written where they arise: they speak of what a defense saw in clean data."""

TEXTS = {
    "no-attack-measured": "no attack was named, so ASR was not measured: a backdoor may be left, or never have been",
    "never-backdoored": "the suspect's ASR was only {asr:.1%} before: a low ASR afterwards proves little",
    "other-attack": "what is measured is not what the model's record names: {difference}",
    "small-evaluation-set": "a metric stands on {rows} rows only: its interval is wide",
    "accuracy-collapse": "ACC fell by {drop:.1%}: a broken model has a low ASR too",
    "not-recovered": "triggered rows get their own answer in only {racc:.1%} of cases: the attack is off, not cured",
    "training-mode": "some modules were in training mode during the evaluation",
    "unmasked-modules": "{count} modules have weights that no mask can reach",
    "target-rows-included": "{count} triggered rows already belong to the target: ASR is inflated",
    "missing-classes": "{count} of the suspect's {classes} classes have no clean example: what they need may be lost",
    "streamed-data": "the data set is too large to read whole: shots and rows come from the first {rows} of its split",
    "accuracy-too-low": "the suspect's ACC was only {acc:.1%}, and guessing gives {chance:.1%}: little is left to lose",
    **dict.fromkeys(FROM_DEFENSES, "{text}"),
}


@dataclass(frozen=True)
class Doubt:
    """One reason.

    Attributes:
        code: Stable name, an anchor in docs/footguns.md.
        text: The sentence, with its numbers.
    """

    code: str
    text: str

    @property
    def more(self) -> str:
        """Where it is explained."""
        return f"docs/footguns.md#{self.code}"


def doubt(code: str, **facts: Any) -> Doubt:
    """Make a doubt from its code and the numbers of its sentence."""
    return Doubt(code, TEXTS[code].format(**facts))


def check_measured(measured: dict[str, Measured], own: list[Any], wanted: list[Any], chance: float) -> list[Doubt]:
    """Look at the numbers of one model.

    Args:
        measured: Its metrics.
        own: The triggered rows' own answers.
        wanted: The attacker's answers for them.
        chance: Accuracy of guessing, in [0, 1].

    Returns:
        The doubts, none if all is well.
    """
    found = []
    acc = _value(measured, "acc")
    if acc is not None and acc < chance + LITTLE * (1 - chance):
        found.append(doubt("accuracy-too-low", acc=acc, chance=chance))
    smallest = min((m.total for m in measured.values()), default=0)
    if smallest < SMALL_SET:
        found.append(doubt("small-evaluation-set", rows=smallest))
    included = sum(mine == theirs for mine, theirs in zip(own, wanted, strict=True))
    if included:
        found.append(doubt("target-rows-included", count=included))
    return found


def check_cure(before: dict[str, Measured], after: dict[str, Measured]) -> list[Doubt]:
    """Look at what a cure changed.

    Args:
        before: Metrics of the suspect.
        after: Metrics of the cured model, on the same rows.

    Returns:
        The doubts, none if all is well.
    """
    found = []
    acc0, acc1 = _value(before, "acc"), _value(after, "acc")
    asr0, racc1 = _value(before, "asr"), _value(after, "racc")
    if asr0 is None:
        found.append(doubt("no-attack-measured"))
    elif asr0 < WEAK_BACKDOOR:
        found.append(doubt("never-backdoored", asr=asr0))
    if acc0 is not None and acc1 is not None and acc0 - acc1 > COLLAPSE:
        found.append(doubt("accuracy-collapse", drop=acc0 - acc1))
    if racc1 is not None and acc1 is not None and racc1 < 0.75 * acc1:
        found.append(doubt("not-recovered", racc=racc1))
    return found


def check_model(model: nn.Module, skipped: int = 0) -> list[Doubt]:
    """Look at the model that was measured.

    Args:
        model: The cured model after its evaluation.
        skipped: Modules with weights that masks cannot reach.

    Returns:
        The doubts, none if all is well.
    """
    found = []
    if any(module.training for module in model.modules()):
        found.append(doubt("training-mode"))
    if skipped:
        found.append(doubt("unmasked-modules", count=skipped))
    return found


def _value(metrics: dict[str, Measured], name: str) -> float | None:
    return metrics[name].value if name in metrics else None
