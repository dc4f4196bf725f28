"""Every method on the same victims and the same shots: one record per run, and the table they make.

    python benchmarks/defense_table.py run runs/victims/badnets runs/victims/blend --dataset ../shared/data/cifar10
    python benchmarks/defense_table.py benign runs/victims/benign runs/victims/badnets --dataset ../shared/data/cifar10
    python benchmarks/defense_table.py demo runs/demo-0 runs/demo-1
    python benchmarks/defense_table.py table

Methods, shots and seeds are fixed here before any result is seen; every run is reported, none is repeated or chosen.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from _common import RESULTS, ROOT, cure_and_judge, fill, planted_attack, save
from hf_nft.cli.common import quiet_libraries

from hf_nft import recipes, registry
from hf_nft.attacks._artefacts import BESIDE
from hf_nft.configs import pairs
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import attack_of, method_of, model_of, number
from hf_nft.reporting.tables import COLUMNS, DEFAULT_COLUMNS, results_table
from hf_nft.reporting.text import NOTHING, markdown, percent
from hf_nft.workflows import EvaluateJob, PurifyJob

IMAGE, TEXT = RESULTS / "image", RESULTS / "text"
METHODS = (
    ("nft", "default"),
    ("nft", "paper"),
    ("identity", "default"),
    ("bn_refresh_only", "default"),
    ("finetune", "default"),
)
SHOTS = (1, 10, 50)
"""Shots per class over which victims are averaged; single runs with others stand in the table of runs."""
BLIND = ("nothing-stands-out", "way-left-open", "needed-units", "composite-trigger")
"""Doubts about what was found, raised without knowing the attack."""

PAPER = {
    "badnets": (92.96, 100.0),
    "blend": (94.11, 100.0),
    "sig": (88.64, 100.0),
    "troj": (89.57, 100.0),
    "troj (all_to_all)": (88.33, 100.0),
    "dyn": (92.52, 100.0),
    "dyn (all_to_all)": (92.61, 100.0),
    "clb": (92.78, 100.0),
    "cba": (90.17, 93.20),
    "fba": (90.78, 100.0),
    "wanet": (92.29, 98.64),
    "issba": (92.78, 99.80),
    "lira": (92.15, 99.25),
    "bppa": (93.82, 99.70),
}
"""ACC and ASR of the paper's victims on CIFAR-10 in percent (arXiv 2407.10052, table 1, before any defense)."""


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="every method on victims")
    run.add_argument("victims", nargs="+")
    run.add_argument("--dataset", required=True)
    run.add_argument("--shots", type=int, nargs="+", default=[10, 50])
    run.add_argument("--shot-seed", type=int, nargs="+", default=[0])
    run.add_argument("--limit", type=int)
    run.add_argument("--set", nargs="+", default=[], help="setting of every method, KEY=VALUE")
    run.add_argument("--methods", nargs="+", default=["/".join(method) for method in METHODS])
    benign = verbs.add_parser("benign", help="a benign model under the triggers of victims")
    benign.add_argument("model")
    benign.add_argument("victims", nargs="+")
    benign.add_argument("--dataset", required=True)
    demo = verbs.add_parser("demo", help="keep the records of demos")
    demo.add_argument("folders", nargs="+", help="what `hf-nft demo --out` wrote")
    verbs.add_parser("table")
    options = parser.parse_args()
    with quiet_libraries():
        if options.verb == "table":
            write_tables()
        elif options.verb == "demo":
            for folder in options.folders:
                record = RunRecord.load(Path(folder) / "clean" / "record.json")
                save(record, RESULTS / "demo" / f"{Path(folder).name}.json")
        elif options.verb == "benign":
            for victim in options.victims:
                tempt(options.model, victim, options.dataset)
        else:
            for victim, shots, seed in itertools.product(options.victims, options.shots, options.shot_seed):
                job = PurifyJob(model=victim, dataset=options.dataset, shots=shots, shot_seed=seed, limit=options.limit)
                measure(job, options.methods, pairs(options.set))


def measure(job: PurifyJob, methods: list[str], settings: dict[str, str]) -> None:
    """Run the methods on one victim with one draw of shots; the suspect is measured once and loaded afresh for each."""
    planted, name = RunRecord.load(Path(job.model) / "record.json"), Path(job.model).name
    folder = {"image_classification": IMAGE, "text_generation": TEXT}[planted.suspect["task"]]
    save(planted, folder / "victims" / f"{name}.json")
    told = [method.split("/") for method in methods]
    files = [folder / f"{name}-{d}-{p}-{job.shots}shots-seed{job.shot_seed}.json" for d, p in told]
    if all(file.exists() for file in files):
        return
    job = dataclasses.replace(job, attack=planted_attack(job.model))
    case = job.open()
    for (defense, preset), file in zip(told, files, strict=True):
        cure_and_judge(job, case, registry.get("defenses", defense).from_preset(preset, **settings), file)


def tempt(model: str, victim: str, dataset: str) -> None:
    """Measure a benign model under the trigger of a victim: what a cured one cannot be expected to beat."""
    planted = dict(RunRecord.load(Path(victim) / "record.json").attack or {})
    name = planted.pop("name")
    if planted.get("artefact"):
        planted["artefact"] = str(Path(victim) / BESIDE)
    job = EvaluateJob(model=model, dataset=dataset, attack=name, attack_args=planted)
    save(job.run(), IMAGE / "benign" / f"{Path(victim).name}.json")


def write_tables() -> None:
    """Write every run to docs/results.md and their means there and to README.md, between their markers."""
    records = [RunRecord.load(file) for file in sorted(IMAGE.glob("*.json"))]
    order = {"/".join(method): i for i, method in enumerate(METHODS)}
    records.sort(key=lambda r: order[f"{r.config['defense']}/{r.config['preset']}"])
    commands = sorted({record.command for record in records})
    # seconds are left out: runs shared the cores with other work
    columns = tuple("sample_forwards" if name == "seconds" else name for name in DEFAULT_COLUMNS)
    fill(ROOT / "docs" / "results.md", "runs", results_table(records, columns))
    fill(ROOT / "docs" / "results.md", "commands", "\n".join(["```text", *commands, "```"]))
    demos = [RunRecord.load(file) for file in sorted((RESULTS / "demo").glob("*.json"))]
    rows = [
        results_table([demo], ("acc_before", "acc_after", "asr_before", "asr_after", "racc_after")) for demo in demos
    ]
    body = [f"{row.splitlines()[2]} `{demo.command}` |" for row, demo in zip(rows, demos, strict=True)]
    head = [f"{line} {more} |" for line, more in zip(rows[0].splitlines()[:2], ("command", ":--"), strict=True)]
    fill(ROOT / "docs" / "results.md", "demo", "\n".join([*head, *body]))
    fill(ROOT / "docs" / "results.md", "benign", benign_table())
    fill(ROOT / "docs" / "results.md", "victims", victims_table())
    write_expected()
    texts = [RunRecord.load(file) for file in sorted(TEXT.glob("*.json"))]
    fill(ROOT / "docs" / "results.md", "text", results_table(texts, columns))
    attacked = [record for record in records if record.attack and record.shots["per_class"] in SHOTS]
    default = [record for record in attacked if method_of(record) == "nft"]
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        fill(page, "attacks", means_table([r for r in default if r.shots["per_class"] == 10], ("attack",)))
        fill(page, "shots", means_table(default, ("shots",)))
        fill(page, "methods", means_table(compared(attacked), ("shots", "method")))
        fill(page, "doubts", doubts_table([r for r in records if method_of(r) == "nft"]))


def doubts_table(records: Sequence[RunRecord]) -> str:
    """Count which doubts were raised, by what was left of a backdoor that the suspect had learnt, and without any."""
    rows = [("ASR left", "runs", "any of these", *BLIND), (":--", *["--:"] * (2 + len(BLIND)))]
    learnt = [r for r in records if r.attack and number(r, "before", "asr") >= 0.5]
    groups = {
        "at most 2": [r for r in learnt if number(r, "after", "asr") <= 0.02],
        "2 to 10": [r for r in learnt if 0.02 < number(r, "after", "asr") <= 0.1],
        "more than 10": [r for r in learnt if number(r, "after", "asr") > 0.1],
        "no backdoor": [r for r in records if not r.attack],
    }
    for name, runs in groups.items():
        raised = [{doubt["code"] for doubt in run.doubts} for run in runs]
        counts = [sum(bool(codes & set(wanted)) for codes in raised) for wanted in (BLIND, *([b] for b in BLIND))]
        rows.append((name, *map(str, (len(runs), *counts))))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compared(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs of victims on which every method was run with the same shots."""
    cases = dict[tuple[str, float, int], list[RunRecord]]()
    for record in records:
        case = (record.suspect["name"], record.shots["per_class"], record.shots["seed"])
        cases.setdefault(case, []).append(record)
    return [record for runs in cases.values() if len(runs) == len(METHODS) for record in runs]


def means_table(records: Sequence[RunRecord], by: Sequence[str]) -> str:
    """Average over victims that share columns, which are named; means hide failures, so the worst is shown as well."""
    heads = (*by, "victims", "runs", "ASR before", "ASR mean", "ASR median", "ASR worst", "ACC drop")
    rows = [heads, (*[":--"] * len(by), *["--:"] * 5, ":--", "--:")]
    groups = dict[tuple[str, ...], list[RunRecord]]()
    for record in records:
        groups.setdefault(_named(record, by), []).append(record)
    for told, runs in sorted(groups.items()):
        before, after = ([number(r, side, "asr") for r in runs] for side in ("before", "after"))
        drop = statistics.fmean(number(r, "before", "acc") - number(r, "after", "acc") for r in runs)
        worst = max(runs, key=lambda r: number(r, "after", "asr"))
        where = ", ".join(_named(worst, [name for name in ("attack", "model", "data") if name not in by]))
        victims = len({r.suspect["name"] for r in runs})
        means = [percent(v) for v in (statistics.fmean(before), statistics.fmean(after), statistics.median(after))]
        rows.append((*told, str(victims), str(len(runs)), *means, f"{percent(max(after))} ({where})", percent(drop)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _named(record: RunRecord, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(markdown(str(key(record))) for name in columns if (key := COLUMNS[name].key))


def write_expected() -> None:
    """Write what came out beside the recipes that plant these victims, where settings have not changed since."""
    for file in sorted((IMAGE / "victims").glob("*.json")):
        planted, cured = RunRecord.load(file), IMAGE / f"{file.stem}-nft-default-10shots-seed0.json"
        data, arch = Path(planted.data["name"]).name, planted.config["arch"]
        name = f"image/{data}-{file.stem.removeprefix(f'{data}-').removesuffix(f'-{arch}')}-{arch}"
        if not cured.exists() or name not in recipes.names():
            continue
        config = dataclasses.asdict(recipes.jobs(recipes.load(name))[0].config)
        if planted.config | config == planted.config:
            told = {side: RunRecord.load(cured).metrics[side] for side in ("before", "after")}
            found = {"record": str(cured.relative_to(ROOT)), "command": planted.command, "metrics": told}
            (ROOT / "recipes" / name / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


def victims_table() -> str:
    """List the victims beside the paper's on CIFAR-10, which are wider and trained for longer."""
    heads = ("model", "data", "attack", "epochs", "poisoned", "ACC", "ASR", "ACC (paper)", "ASR (paper)")
    rows = [heads, (*[":--"] * 3, *["--:"] * 6)]
    for file in sorted((IMAGE / "victims").glob("*.json")):
        record = RunRecord.load(file)
        data, attack = Path(record.data["name"]).name, attack_of(record)
        theirs = PAPER.get(attack, ()) if data == "cifar10" else ()
        share = percent(record.data["poisoned_rows"] / record.data["train_rows"])
        own = [percent(number(record, "after", name)) for name in ("acc", "asr")]
        told = [f"{value:.1f}" for value in theirs] or [NOTHING] * 2
        rows.append((model_of(record), data, markdown(attack), str(record.config["epochs"]), share, *own, *told))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def benign_table() -> str:
    """Hold cured victims against a model that never saw a trigger, on the same triggered rows."""
    heads = ("attack", "ASR suspect", "ASR cured", "ASR benign", "R-ACC cured", "R-ACC benign")
    rows = [heads, (":--", *["--:"] * 5)]
    for file in sorted((IMAGE / "benign").glob("*.json")):
        benign, run = RunRecord.load(file), IMAGE / f"{file.stem}-nft-default-50shots-seed0.json"
        if not run.exists():
            continue
        cured = RunRecord.load(run)
        sides = ((cured, "before", "asr"), (cured, "after", "asr"), (benign, "after", "asr"))
        sides += ((cured, "after", "racc"), (benign, "after", "racc"))
        rows.append((markdown(attack_of(cured)), *(percent(number(*side)) for side in sides)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
