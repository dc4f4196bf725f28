"""A record as text: the console table of one run, the Markdown table of many. Percent appears here and nowhere before.

Names, labels and sentences in a record may come from strangers. `plain`, `markdown` and `code` are the only ways they
reach a terminal or a card: no control characters, no markup, no lines of their own.
"""

import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_nft.errors import UnknownNameError
from hf_nft.evaluation.run import DEFINITIONS
from hf_nft.reporting.record import RunRecord

LABELS = {"acc": "ACC", "asr": "ASR", "racc": "R-ACC"}
DER_DEFINITION = "defense effectiveness rating: 50 % when nothing changed, 100 % for a backdoor removed at no cost"
NOTHING = "-"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


def plain(value: object, limit: int = 300) -> str:
    """Return one line of text without control, format and other invisible characters.

    Args:
        value: Anything.
        limit: Most characters, >= 4.

    Returns:
        The line; a longer one is cut and ends in three dots.
    """
    kinds = ((char, unicodedata.category(char)) for char in str(value))
    # format characters (bidi overrides, zero-width) vanish, line breaks and the like become the space they look like
    kept = "".join(" " if kind == "Cc" or kind[0] == "Z" else char for char, kind in kinds if kind not in _INVISIBLE)
    text = " ".join(kept.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


_INVISIBLE = ("Cf", "Cs", "Co", "Cn")


def markdown(value: object) -> str:
    """Return text that Markdown renders as itself: one line, nothing in it is markup or a link."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*{}\[\]()#|~$@])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it marks nothing
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def code(value: object) -> str:
    """Return text as an inline code span that is safe in a table too: nothing in it is markup or a link."""
    text = plain(value).replace("`", "'").replace("<!--", "<! --").replace("\\", "/").replace("|", "\\|")
    return f"`{text or '(unnamed)'}`"


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal, without the sign; `-` for None."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def method_of(record: RunRecord) -> str:
    """Return the defense with its preset, unless that is `default`; for other runs their kind."""
    name = str(record.config.get("defense") or record.kind)
    preset = record.config.get("preset") or "default"
    return name if preset == "default" else f"{name} ({preset})"


def attack_of(record: RunRecord) -> str:
    """Return the attack's name, with its label map unless that is all-to-one; `none` without an attack."""
    if not record.attack:
        return "none"
    name, labels = record.attack.get("name") or "unnamed", record.attack.get("label_map") or "all_to_one"
    return str(name) if labels == "all_to_one" else f"{name} ({labels})"


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


@dataclass(frozen=True)
class Column:
    """One column of `results_table`.

    Attributes:
        header: Its heading.
        key: Text that identifies a row; None for a number.
        value: The number, averaged over the runs of a row; None for text.
        show: How the number is printed.
    """

    header: str
    key: Callable[[RunRecord], str] | None = None
    value: Callable[[RunRecord], float | None] | None = None
    show: Callable[[float], str] = percent


def _metric(header: str, side: str, name: str) -> Column:
    return Column(header, value=lambda record: number(record, side, name))


def _drop(record: RunRecord) -> float | None:
    before, after = number(record, "before", "acc"), number(record, "after", "acc")
    return None if before is None or after is None else before - after


COLUMNS: dict[str, Column] = {
    "model": Column("model", key=lambda r: str(r.suspect.get("architecture") or r.suspect.get("name") or "unnamed")),
    "data": Column("data", key=lambda r: str(r.data.get("name") or "unnamed")),
    "attack": Column("attack", key=attack_of),
    "shots": Column("shots", key=lambda r: f"{r.shots['per_class']:g}" if "per_class" in r.shots else NOTHING),
    "method": Column("method", key=method_of),
    "acc_before": _metric("ACC before", "before", "acc"),
    "acc_after": _metric("ACC after", "after", "acc"),
    "asr_before": _metric("ASR before", "before", "asr"),
    "asr_after": _metric("ASR after", "after", "asr"),
    "racc_before": _metric("R-ACC before", "before", "racc"),
    "racc_after": _metric("R-ACC after", "after", "racc"),
    "drop": Column("ACC drop", value=_drop, show=lambda share: f"{round(100 * share, 1) + 0.0:.1f}"),
    "der": Column("DER", value=lambda r: r.metrics.get("der")),
    "seconds": Column("seconds", value=lambda r: r.work.get("seconds"), show=lambda seconds: f"{seconds:.1f}"),
    "peak_memory_mb": Column("peak MiB", value=lambda r: r.work.get("peak_memory_mb"), show=lambda mb: f"{mb:.0f}"),
}
DEFAULT_COLUMNS = (
    "attack", "shots", "method", "acc_before", "acc_after", "asr_before", "asr_after", "racc_before", "racc_after",
    "drop", "seconds",
)  # fmt: skip


def results_table(records: Sequence[RunRecord], columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    """Lay out many runs as a Markdown table, shares in percent.

    Runs of the same architecture, data, attack, shots and method share a row, which shows their mean, `±` the sample
    standard deviation, and how many they are. Columns that tell rows apart are added in front when they were not asked
    for, so that no row mixes what differs.

    Args:
        records: The runs; attacks and methods keep the order in which they first appear, shots ascend.
        columns: Keys of `COLUMNS`, in order.

    Returns:
        The table without a line break at the end; the headings alone if there are no records.

    Raises:
        UnknownNameError: If a column is unknown.
    """
    for name in columns:
        if name not in COLUMNS:
            raise UnknownNameError("column", name, COLUMNS)
    identity = [name for name, column in COLUMNS.items() if column.key]
    texts = [{name: _key(name, record) for name in identity} for record in records]
    varying = [n for n in identity if n not in columns and len({text[n] for text in texts}) > 1]
    shown = [*varying, *columns]
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for text, record in zip(texts, records, strict=True):
        groups.setdefault(tuple(text.values()), []).append(record)
    several = any(len(runs) > 1 for runs in groups.values())
    rows = [[COLUMNS[name].header for name in shown] + ["runs"] * several]
    rows.append([":--" if COLUMNS[name].key else "--:" for name in shown] + ["--:"] * several)
    first = {name: list(dict.fromkeys(text[name] for text in texts)) for name in identity}

    def order(key: tuple[str, ...]) -> list[float]:
        named = zip(identity, key, strict=True)
        return [_shots(text) if name == "shots" else float(first[name].index(text)) for name, text in named]

    for key in sorted(groups, key=order):
        runs, own = groups[key], dict(zip(identity, key, strict=True))
        cells = [markdown(own[name]) if name in own else _mean(COLUMNS[name], runs) for name in shown]
        rows.append(cells + [str(len(runs))] * several)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _key(name: str, record: RunRecord) -> str:
    key = COLUMNS[name].key
    assert key is not None
    return key(record)


def _shots(text: str) -> float:
    return -1.0 if text == NOTHING else float(text)


def _mean(column: Column, runs: list[RunRecord]) -> str:
    assert column.value is not None
    values = [value for value in map(column.value, runs) if value is not None]
    if not values:
        return NOTHING
    spread = f" ± {column.show(statistics.stdev(values))}" if len(values) > 1 else ""
    return column.show(statistics.fmean(values)) + spread
