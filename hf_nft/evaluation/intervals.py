"""Proportions with what they stand on."""

from typing import Any

from scipy.stats import binomtest


def proportion(name: str, successes: int, total: int) -> dict[str, Any]:
    """Return a proportion with its counts and 95 % Wilson interval.

    Args:
        name: Key of the value.
        successes: Hits, in 0..total.
        total: Rows.

    Returns:
        `{name: value, "low": ..., "high": ..., "successes": ..., "total": ...}`; values None without rows.

    Source: Wilson, JASA 1927.
    """
    if total == 0:
        return {name: None, "low": None, "high": None, "successes": 0, "total": 0}
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return {
        name: successes / total,
        "low": float(interval.low),
        "high": float(interval.high),
        "successes": successes,
        "total": total,
    }


def defense_effectiveness_rating(before: dict[str, float | None], after: dict[str, float | None]) -> float | None:
    """Return DER in [0, 1]: 0.5 when nothing changed, 1 for a removed backdoor at no cost.

    Args:
        before: `acc` and `asr` as fractions.
        after: The same after the defense.

    Returns:
        `(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2`, or None if a number is missing.

    Source: Zhu et al., FT-SAM, ICCV 2023, section 4.1.
    """
    values = [before.get("asr"), after.get("asr"), before.get("acc"), after.get("acc")]
    if any(value is None for value in values):
        return None
    asr0, asr1, acc0, acc1 = (float(v) for v in values if v is not None)
    return (max(0.0, asr0 - asr1) - max(0.0, acc0 - acc1) + 1) / 2
