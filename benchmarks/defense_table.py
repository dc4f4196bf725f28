"""Every method on the same victims and the same shots: one record per run, and the table they make.

    python benchmarks/defense_table.py run runs/victims/badnets runs/victims/blend --dataset ../shared/data/cifar10
    python benchmarks/defense_table.py table > benchmarks/results/image_cifar10.md

Methods, shots and seeds are fixed here before any result is seen; every run is reported, none is repeated or chosen.
"""

import argparse
import dataclasses
from pathlib import Path

from hf_nft.cli.common import quiet_libraries

from hf_nft import registry
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import results_table
from hf_nft.suspect import load_suspect
from hf_nft.workflows import PurifyJob

RESULTS = Path(__file__).parent / "results" / "image"
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
    verbs.add_parser("table")
    options = parser.parse_args()
    if options.verb == "table":
        print(results_table([RunRecord.load(file) for file in sorted(RESULTS.glob("*.json"))]))
        return
    with quiet_libraries():
        for victim in options.victims:
            for shots in options.shots:
                measure(victim, options.dataset, shots, options.shot_seed, options.methods)


def measure(victim: str, dataset: str, shots: int, shot_seed: int, methods: list[str]) -> None:
    """Run the methods on one victim with one draw of shots; the suspect is measured once and loaded afresh for each."""
    planted = RunRecord.load(Path(victim) / "record.json")
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
        file.parent.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(record, losses={}).save(file)  # curves are in the run folder of the command line
        after = record.metrics["after"]
        print(f"{file.stem}: ACC {after['acc']:.3f} ASR {after['asr']} {result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
