"""A record as text: what it says in words, and the console table of one run."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from hf_nft import registry
from hf_nft.evaluation.run import DEFINITIONS
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.text import NOTHING, percent, plain

LABELS = {"acc": "ACC", "asr": "ASR", "racc": "R-ACC"}
DER_DEFINITION = "defense effectiveness rating: 50 % when nothing changed, 100 % for a backdoor removed at no cost"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement as text; all parts are empty if it was not made.

    Attributes:
        value: The number, with ` %` behind a share.
        interval: Its 95 % interval in the same unit, such as `[93.7, 94.6]`.
        counts: What it stands on, such as `942 / 1000`.
    """

    value: str = ""
    interval: str = ""
    counts: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """One metric of a run as text.

    Attributes:
        label: Its printed name.
        before: Of the suspect.
        after: Of the result.
        change: After minus before, in percentage points for shares; empty if one is missing.
        definition: What it means; empty if unknown.
    """

    label: str
    before: Cell
    after: Cell
    change: str
    definition: str


def model_of(record: RunRecord) -> str:
    """Return the suspect's architecture without its task, such as ResNet for ResNetForImageClassification."""
    architecture = str(record.suspect.get("architecture") or record.suspect.get("name") or "unnamed")
    return re.sub(r"(?<=\w)(For[A-Z]\w+|LMHeadModel)$", "", architecture)


def method_of(record: RunRecord) -> str:
    """Return the defense with its preset, unless that is `default`; for other runs their kind."""
    name = str(record.config.get("defense") or record.kind)
    preset = record.config.get("preset") or "default"
    return name if preset == "default" else f"{name} ({preset})"


def attack_of(record: RunRecord) -> str:
    """Return the attack's name, with label map and preset where these are unusual; `none` without an attack."""
    if not record.attack:
        return "none"
    name = str(record.attack.get("name") or "unnamed")
    known = name in registry.names("attacks")
    usual = {f.name: f.default for f in dataclasses.fields(registry.get("attacks", name))} if known else {}
    told = [record.attack.get(key) for key in ("label_map", "preset") if record.attack.get(key) != usual.get(key)]
    unlike = [str(value) for value in told if value not in (None, "all_to_one")]
    return f"{name} ({', '.join(unlike)})" if unlike else name


def is_repo_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None and len(name) <= 96


def hub_id(record: RunRecord) -> str | None:
    """Return the suspect's Hub id; None for a folder, which has no revision."""
    return hub_name(record.suspect)


def hub_name(model: dict[str, Any]) -> str | None:
    """Return the Hub id of what a record calls by `name` and `revision`; None for a folder, which has no revision."""
    name, revision = str(model.get("name") or ""), str(model.get("revision") or "")
    return name if is_repo_id(name) and re.fullmatch(r"[0-9A-Za-z._-]+", revision) else None


def name_of(record: RunRecord) -> str:
    """Return the last part of the suspect's name; `model` if it has none."""
    name = plain(record.suspect.get("name") or "").replace("\\", "/").rstrip("/")
    return name.rpartition("/")[2].lstrip("~.") or "model"


def number(record: RunRecord, side: str, name: str) -> float | None:
    """Read a metric of a record.

    Args:
        record: The run.
        side: `before` or `after`.
        name: Key of the metric.

    Returns:
        A finite number, or None.
    """
    value = (record.metrics.get(side) or {}).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def metric_lines(record: RunRecord) -> list[Line]:
    """Turn the metrics of a run into text, those that were measured at least once, in the record's order."""
    names = list(dict.fromkeys([*(record.metrics.get("before") or {}), *(record.metrics.get("after") or {})]))
    lines = []
    for name in names:
        before, after = number(record, "before", name), number(record, "after", name)
        if before is None and after is None:
            continue
        share = name in LABELS or any(_counts(record, side, name).get("successes") is not None for side in SIDES)
        lines.append(
            Line(
                label=LABELS.get(name, plain(name, 30)),
                before=_cell(record, "before", name, share),
                after=_cell(record, "after", name, share),
                change="" if before is None or after is None else _signed(after - before, share),
                definition=DEFINITIONS.get(name, ""),
            )
        )
    return lines


SIDES = ("before", "after")


def summary_table(record: RunRecord) -> str:
    """Describe one run for a terminal.

    Args:
        record: The run.

    Returns:
        Lines of plain text without a line break at the end: what was run, metrics, work, doubts.
    """
    parts = [_facts(record), _metrics(record), _doubts(record)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _facts(record: RunRecord) -> list[str]:
    suspect = record.suspect
    revision = suspect.get("revision")
    named = [suspect.get("architecture"), f"revision {str(revision)[:12]}" if revision else None]
    count = record.data.get("test_rows")
    rows = {
        "model": _with(suspect.get("name"), *named),
        "data": _with(record.data.get("name"), f"{count} test rows" if count else None),
        "attack": attack_of(record) if record.attack else "none named, so ASR is not measured",
        "method": method_of(record) if record.kind == "purify" else None,
        "shots": shots_of(record),
        "found": found_of(record.details),
        "cut": cut_of(record.details),
        "time": work_of(record.work),
    }
    return _aligned([[name, plain(text)] for name, text in rows.items() if text])


def _with(name: object, *more: object) -> str | None:
    if not name:
        return None
    extra = ", ".join(str(part) for part in more if part)
    return f"{name} ({extra})" if extra else str(name)


def shots_of(record: RunRecord) -> str:
    """Return how many clean examples were used, as text; empty if the run had none."""
    each, classes = record.shots.get("per_class"), record.shots.get("classes") or 1
    if each is None:
        return ""
    return f"{each:g}" if classes == 1 else f"{each:g} per class x {classes} classes"


def cut_of(details: dict[str, Any]) -> str:
    """Return how many units were cut, as text; empty if none were."""
    cut, units = details.get("units_cut"), details.get("masks")
    return f"{cut} of {units} units" if cut and units else ""


def found_of(details: dict[str, Any]) -> str:
    """Return the answer that pushes reach far more easily than others, and from where, as text; empty if none is."""
    if not details.get("cut_by_push") and "adversary_radii" not in details:
        return ""
    window = " x ".join(f"{begin} to {end}" for begin, end in details.get("adversary_window") or [])
    return f"an easy way to class {next(iter(details['push_scores']))}" + (f", within {window}" if window else "")


def work_of(work: dict[str, Any]) -> str:
    """Return seconds, steps, memory and device as text; empty if nothing is known."""
    parts = []
    if work.get("seconds") is not None:
        parts.append(f"{work['seconds']:.1f} s")
    if work.get("steps") is not None:
        parts.append(f"{work['steps']} steps")
    if work.get("peak_memory_mb") is not None:
        parts.append(f"{work['peak_memory_mb']:.0f} MiB peak")
    if work.get("device"):
        parts.append(f"on {work['device']}")
    return ", ".join(parts)


def _metrics(record: RunRecord) -> list[str]:
    lines = metric_lines(record)
    if not lines:
        return []
    both = any(line.before.value for line in lines)
    rows = [["", "before", "", "after", "", "change"] if both else ["", "value", ""]]
    for line in lines:
        after = [line.after.value or NOTHING, line.after.interval]
        before = [line.before.value or NOTHING, line.before.interval]
        rows.append([line.label, *before, *after, line.change or NOTHING] if both else [line.label, *after])
    der = record.metrics.get("der")
    if both and isinstance(der, float):
        rows.append(["DER", "", "", f"{percent(der)} %", "", ""])
    note = "change in percentage points; brackets: 95 % intervals" if both else "brackets: 95 % intervals"
    return [*_aligned(rows, right=(1, 3, 5)), note]


def _doubts(record: RunRecord) -> list[str]:
    if not record.doubts:
        return []
    rows = [[plain(d.get("code", ""), 60), plain(d.get("text", ""))] for d in record.doubts]
    more = sorted({plain(d["more"]).partition("#")[0] for d in record.doubts if d.get("more")})
    return ["doubts:", *(f"  {line}" for line in _aligned(rows)), *(f"  each explained in {page}" for page in more)]


def _aligned(rows: list[list[str]], right: Sequence[int] = ()) -> list[str]:
    """Pad the columns of rows of equal length; those in `right` end, the others begin at the same place."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = (t.rjust(w) if i in right else t.ljust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(padded).rstrip())
    return lines


def _counts(record: RunRecord, side: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = ((record.metrics.get("counts") or {}).get(side) or {}).get(name) or {}
    return found


def _cell(record: RunRecord, side: str, name: str, share: bool) -> Cell:
    value, counts = number(record, side, name), _counts(record, side, name)
    if value is None:
        return Cell()
    low, high = counts.get("low"), counts.get("high")
    total, hits = counts.get("total"), counts.get("successes")
    stands_on = f"{total}" if hits is None else f"{hits} / {total}"
    return Cell(
        value=f"{percent(value)} %" if share else f"{value:.4g}",
        interval="" if low is None or high is None else f"[{percent(low)}, {percent(high)}]",
        counts=stands_on if total else "",
    )


def _signed(change: float, share: bool) -> str:
    # adding 0.0 turns a rounded -0.0, which would print as a loss, into 0.0
    return f"{round(100 * change, 1) + 0.0:+.1f}" if share else f"{change + 0.0:+.4g}"
