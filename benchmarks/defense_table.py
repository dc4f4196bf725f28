"""Every method on the same victims and the same shots: one record per run, and the table they make.

    python benchmarks/defense_table.py run runs/victims/badnets runs/victims/blend --dataset ../shared/data/cifar10
    python benchmarks/defense_table.py demo runs/demo-0 runs/demo-1
    python benchmarks/defense_table.py table

Methods, shots and seeds are fixed here before any result is seen; every run is reported, none is repeated or chosen.
"""

import argparse
import dataclasses
from pathlib import Path

from hf_nft.cli.common import quiet_libraries

from hf_nft import registry
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.tables import DEFAULT_COLUMNS, results_table
from hf_nft.suspect import load_suspect
from hf_nft.workflows import PurifyJob

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "image"
METHODS = (
    ("nft", "default"),
    ("nft", "paper"),
    ("identity", "default"),
    ("bn_refresh_only", "default"),
    ("finetune", "default"),
)


def main() -> None:
    """Run or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("victims", nargs="+")
    run.add_argument("--dataset", required=True)
    run.add_argument("--shots", type=int, nargs="+", default=[10, 50])
    run.add_argument("--shot-seed", type=int, default=0)
    run.add_argument("--methods", nargs="+", default=["/".join(method) for method in METHODS])
    demo = verbs.add_parser("demo")
    demo.add_argument("folders", nargs="+", help="what `hf-nft demo --out` wrote")
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "table":
        write_tables()
        return
    if options.verb == "demo":
        for folder in options.folders:
            save(
                RunRecord.load(Path(folder) / "clean" / "record.json"),
                RESULTS.parent / "demo" / f"{Path(folder).name}.json",
            )
        return
    with quiet_libraries():
        for victim in options.victims:
            for shots in options.shots:
                measure(victim, options.dataset, shots, options.shot_seed, options.methods)


def measure(victim: str, dataset: str, shots: int, shot_seed: int, methods: list[str]) -> None:
    """Run the methods on one victim with one draw of shots; the suspect is measured once and loaded afresh for each."""
    planted = RunRecord.load(Path(victim) / "record.json")
    save(planted, RESULTS / "victims" / f"{Path(victim).name}.json")
    attack = planted.attack["name"] if planted.attack else None
    job = PurifyJob(model=victim, dataset=dataset, attack=attack, shots=shots, shot_seed=shot_seed)
    case = job.open()
    for method in methods:
        name, preset = method.split("/")
        file = RESULTS / f"{Path(victim).name}-{name}-{preset}-{shots}shots-seed{shot_seed}.json"
        if file.exists():
            continue
        fresh = dataclasses.replace(case, suspect=load_suspect(victim))
        told = dataclasses.replace(job, defense=registry.get("defenses", name).from_preset(preset))
        result = told.cure(fresh)
        record = told.judge(fresh, result, result.merged())
        save(record, file)
        after = record.metrics["after"]
        print(f"{file.stem}: ACC {after['acc']:.3f} ASR {after['asr']} {result.seconds:.0f} s", flush=True)


def save(record: RunRecord, file: Path) -> None:
    """Keep a record without its curves, which are long and easily made again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    dataclasses.replace(record, losses={}).save(file)


def write_tables() -> None:
    """Write every run to docs/results.md and the methods' rows to README.md, between their markers."""
    records = [RunRecord.load(file) for file in sorted(RESULTS.glob("*.json"))]
    order = {"/".join(method): i for i, method in enumerate(METHODS)}
    records.sort(key=lambda r: order[f"{r.config['defense']}/{r.config['preset']}"])
    commands = sorted({record.command for record in records})
    # seconds are left out: runs shared the cores with other work
    columns = tuple("sample_forwards" if name == "seconds" else name for name in DEFAULT_COLUMNS)
    fill(ROOT / "docs" / "results.md", "runs", results_table(records, columns))
    fill(ROOT / "docs" / "results.md", "commands", "\n".join(["```text", *commands, "```"]))
    demos = [RunRecord.load(file) for file in sorted((RESULTS.parent / "demo").glob("*.json"))]
    rows = [
        results_table([demo], ("acc_before", "acc_after", "asr_before", "asr_after", "racc_after")) for demo in demos
    ]
    body = [f"{row.splitlines()[2]} `{demo.command}` |" for row, demo in zip(rows, demos, strict=True)]
    head = [f"{line} {more} |" for line, more in zip(rows[0].splitlines()[:2], ("command", ":--"), strict=True)]
    fill(ROOT / "docs" / "results.md", "demo", "\n".join([*head, *body]))
    texts = [RunRecord.load(file) for file in sorted((RESULTS.parent / "text").glob("*.json"))]
    fill(ROOT / "docs" / "results.md", "text", results_table(texts, columns))
    shown = [record for record in records if record.config["defense"] in ("nft", "finetune")]
    short = tuple(name for name in columns if name not in ("racc_before", "drop"))
    fill(ROOT / "README.md", "results", results_table(shown, short))


def fill(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
