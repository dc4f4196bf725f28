"""Many records as one Markdown table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from hf_nft.errors import UnknownNameError
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import attack_of, is_repo_id, method_of, model_of, number
from hf_nft.reporting.text import NOTHING, markdown, percent


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


def _data(name: str) -> str:
    return name if is_repo_id(name) else PurePath(name).name


COLUMNS: dict[str, Column] = {
    "model": Column("model", key=model_of),
    "data": Column("data", key=lambda r: _data(str(r.data.get("name") or "unnamed"))),
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
    "sample_forwards": Column(
        "sample-forwards", value=lambda r: r.work.get("sample_forwards"), show=lambda n: f"{n:,.0f}"
    ),
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
