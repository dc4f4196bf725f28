"""Every method on the same victims and the same shots: one record per run, and the table they make.

    python benchmarks/defense_table.py run runs/victims/badnets runs/victims/blend --dataset ../shared/data/cifar10
    python benchmarks/defense_table.py demo runs/demo-0 runs/demo-1
    python benchmarks/defense_table.py table

Methods, shots and seeds are fixed here before any result is seen; every run is reported, none is repeated or chosen.
"""

import argparse
from pathlib import Path

from _common import RESULTS, ROOT, cure_and_judge, fill, planted_attack, save
from hf_nft.cli.common import quiet_libraries

from hf_nft import registry
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.tables import DEFAULT_COLUMNS, results_table
from hf_nft.workflows import PurifyJob

IMAGE = RESULTS / "image"
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
                RESULTS / "demo" / f"{Path(folder).name}.json",
            )
        return
    with quiet_libraries():
        for victim in options.victims:
            for shots in options.shots:
                measure(victim, options.dataset, shots, options.shot_seed, options.methods)


def measure(victim: str, dataset: str, shots: int, shot_seed: int, methods: list[str]) -> None:
    """Run the methods on one victim with one draw of shots; the suspect is measured once and loaded afresh for each."""
    save(RunRecord.load(Path(victim) / "record.json"), IMAGE / "victims" / f"{Path(victim).name}.json")
    job = PurifyJob(model=victim, dataset=dataset, attack=planted_attack(victim), shots=shots, shot_seed=shot_seed)
    case = job.open()
    for method in methods:
        name, preset = method.split("/")
        file = IMAGE / f"{Path(victim).name}-{name}-{preset}-{shots}shots-seed{shot_seed}.json"
        cure_and_judge(job, case, registry.get("defenses", name).from_preset(preset), file)


def write_tables() -> None:
    """Write every run to docs/results.md and the methods' rows to README.md, between their markers."""
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
    texts = [RunRecord.load(file) for file in sorted((RESULTS / "text").glob("*.json"))]
    fill(ROOT / "docs" / "results.md", "text", results_table(texts, columns))
    shown = [record for record in records if record.config["defense"] in ("nft", "finetune")]
    short = tuple(name for name in columns if name not in ("racc_before", "drop"))
    fill(ROOT / "README.md", "results", results_table(shown, short))


if __name__ == "__main__":
    main()
