"""What each switch of the default preset does: every switch flipped alone, on the same victims and the same shots.

    python benchmarks/ablation.py run runs/victims/blend runs/victims/wanet --dataset ../shared/data/cifar10
    python benchmarks/ablation.py table

Rows and settings are fixed here before any result is seen; every run is kept as a record, none is repeated or chosen.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT, cure_and_judge, fill, planted_attack
from hf_nft.cli.common import quiet_libraries

from hf_nft.defenses.nft import NFT
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.text import NOTHING, percent
from hf_nft.workflows import PurifyJob

RUNS = RESULTS / "ablation"
USUAL = "-10shots-seed0-limit3000"
"""What most folders' names end in; not shown."""
NO_STATISTICS: dict[str, Any] = {"excess": 0.0, "outliers": 0.0}
SWITCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "no cut by size": {"excess": 0.0},
    "large cut whatever the harm": {"needed": 1e9},
    "no cut of outliers": {"outliers": 0.0},
    "no further outliers": {"outliers_most": 0.0},
    "cut whatever the harm": {"harm": 1e9},
    "no cut at all": {**NO_STATISTICS, "pushes": "never", "exposures": 0, "cut": 0.0},
    "cut alone": {"steps": 0},
    "no MixUp": {"mixup_alpha": 0.0},
    "learn from labels": {"objective": "labels"},
    "every batch used once": {"reuse": 1},
    "statistics move": {"bn_mode": "train_stats"},
    "statistics measured afresh": {"bn_mode": "recalibrate_unmixed"},
    "masks train without augmentation": {"augment": "none"},
    "classes count alike": {"class_prior": False},
    "one statistics pass": {"statistics_passes": 1},
    "statistics of any momentum": {"statistics_momentum": 1.0},
    "masks silence the bias": {"mask_bias": True},
    "stem masked": {"mask_stem": True},
    "exponential floor": {"schedule": "exponential"},
    "pushes instead of statistics": {**NO_STATISTICS, "pushes": "always"},
    "no cut by pushes": {"pushed_most": 0.0},
    "cut by pushes never taken back": {"taken_back": False},
    "exposures instead of pushes": {"pushes": "never"},
    "nothing composed": {"composed": 0.0},
    "everything composed": {"composed": 1.0},
    "composed as warm as elsewhere": {"composed_temperature": 2.0},
    "nothing shifted": {"shifted": 0.0},
    "shifted whatever chance": {"shifted_within": (0.0, 1e9)},
    "shifted without a guide": {"shifted_guide": 0.0},
    "shifted less often": {"shifted": 0.4},
    "means of the last norms count": {"shifted_late": 0.0},
    "no adversary": {"adversarial": 0.0, "adversarial_beside": 0.0},
    "adversary beside statistics as often": {"adversarial_beside": 0.6},
    "adversary whatever the window": {"adversarial_always": True},
    "adversary anywhere alone": {"windowed": False},
    "exposures beside statistics": {"expose_always": True},
    "exposures instead of statistics": {**NO_STATISTICS, "expose_always": True},
}
"""What differs from the default, by row; `no cut at all` leaves distillation alone."""


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("victims", nargs="+")
    run.add_argument("--dataset", required=True)
    run.add_argument("--shots", type=int, nargs="+", default=[10])
    run.add_argument("--shot-seed", type=int, default=0)
    run.add_argument("--limit", type=int, help="test rows to measure on; such runs are kept apart")
    run.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES), metavar="ROW")
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "table":
        fill(ROOT / "docs" / "results.md", "ablation", table(RUNS))
        return
    with quiet_libraries():
        for victim in options.victims:
            for shots in options.shots:
                job = PurifyJob(
                    model=victim,
                    dataset=options.dataset,
                    attack=planted_attack(victim),
                    shots=shots,
                    shot_seed=options.shot_seed,
                    limit=options.limit,
                )
                measure(job, options.switches)


def measure(job: PurifyJob, switches: Sequence[str]) -> None:
    """Flip switches on one victim with one draw of shots; the suspect is measured once and loaded afresh for each."""
    limited = f"-limit{job.limit}" if job.limit else ""
    folder = RUNS / f"{Path(job.model).name}-{job.shots}shots-seed{job.shot_seed}{limited}"
    case = job.open()
    for switch in switches:
        cure_and_judge(job, case, NFT(**SWITCHES[switch]), folder / f"{switch.replace(' ', '-')}.json")


def table(runs: Path) -> str:
    """Return every run as a Markdown table: a row per switch, a column per victim and draw.

    Args:
        runs: Holds a folder per victim and draw, and in it a record per switch.

    Returns:
        The table: ACC / ASR / R-ACC, `-` where a run is missing; and which switches were never flipped.
    """
    cases = sorted(folder for folder in runs.glob("*") if folder.is_dir())
    heads = ["row", "differs in", *(case.name.removesuffix(USUAL) for case in cases)]
    lines = [f"| {' | '.join(heads)} |", f"| :-- | :-- | {'--: | ' * len(cases)}".rstrip()]
    waiting = []
    for switch, changes in SWITCHES.items():
        files = [case / f"{switch.replace(' ', '-')}.json" for case in cases]
        found = [RunRecord.load(file) if file.exists() else None for file in files]
        told = ", ".join(f"{name}={value}" for name, value in changes.items())
        cells = [switch, f"`{told}`" if told else "", *map(_after, found)]
        if any(found):
            lines.append(f"| {' | '.join(cells)} |")
        else:
            waiting.append(switch)
    return "\n".join([*lines, *(["", f"Not run yet: {', '.join(waiting)}."] if waiting else [])])


def _after(record: RunRecord | None) -> str:
    if record is None:
        return NOTHING
    return " / ".join(percent(record.metrics["after"][name]) for name in ("acc", "asr", "racc"))


if __name__ == "__main__":
    main()
