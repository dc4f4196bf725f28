"""What a whole purification costs: both NFT presets and plain fine-tuning on one model with the same shots, in one run.

    python benchmarks/cure_cost.py --out benchmarks/results/cure_cost.json
    python benchmarks/cure_cost.py --victim runs/victims/blend --dataset ../shared/data/cifar10

Every case runs in a process of its own, which loads model and shots before the clock starts; nothing is evaluated.
Peak memory is what the case adds to that loaded process. `one full step` is the bound for it: two full fine-tuning
steps on batches of the default's size, since the first makes the optimizer's state.

Without --victim the model is a PreAct-ResNet-18 of width 32 with random weights, on random pixels. Which units are cut,
and which augmentation the statistics speak for, depends on the content; the cost hardly does, since a cut unit is
computed like any other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import circumstances, high_water_mb
from purify_speed import image_case

from hf_nft.defenses.base import Defense
from hf_nft.defenses.finetune import FineTune
from hf_nft.defenses.nft import NFT
from hf_nft.purification import purify
from hf_nft.shots import Shots
from hf_nft.suspect import load_suspect
from hf_nft.types import take
from hf_nft.workflows import PurifyJob
from hf_nft.workflows.job import save_model
from hf_nft.workflows.purify_job import draw_shots

BOUND = "one full step"
CASES: dict[str, Callable[[dict[str, int]], Defense]] = {
    "nft/default": lambda steps: NFT.from_preset("default", **steps),
    "nft/paper": lambda steps: NFT.from_preset("paper", **steps),
    "finetune": lambda steps: FineTune(epochs=steps.get("steps", FineTune.epochs)),
    BOUND: lambda _: FineTune(batch_size=NFT.batch_size, epochs=2),
}
"""From the number of steps of a trial (empty: each method's own) to what is run."""


def one(folder: Path, per_class: int, case: str, steps: dict[str, int]) -> dict[str, float]:
    """Run a case; for a process of its own.

    Args:
        folder: Holds the model and `shots.pt`.
        per_class: Shots per class.
        case: Key of `CASES`.
        steps: Steps of a trial.

    Returns:
        Seconds, steps and sample-forwards of the engine, and the memory in MiB that was added.
    """
    suspect, batch = load_suspect(str(folder)), torch.load(folder / "shots.pt")
    rows = take(batch, slice(0, NFT.batch_size)) if case == BOUND else batch  # few rows: one step an epoch
    before = high_water_mb()
    result = purify(suspect.model, suspect.task, Shots(rows, per_class), CASES[case](steps))
    return {
        "seconds": result.seconds,
        "steps": result.steps,
        "sample_forwards": result.sample_forwards,
        "peak_memory_mb": high_water_mb() - before,
    }


def measure(folder: Path, per_class: int, case: str, trial: int | None) -> dict[str, float]:
    """Run a case in a process of its own."""
    steps = {} if trial is None else {"steps": trial}
    told = [sys.executable, __file__, "--one", str(folder), str(per_class), case, json.dumps(steps)]
    done = subprocess.run(told, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(folder: Path, victim: str | None, dataset: str | None, per_class: int) -> None:
    """Write model and encoded shots to a folder."""
    if victim is None:
        model, task, batch = image_case(10 * per_class)
    else:
        job = PurifyJob(model=victim, dataset=dataset, shots=per_class)
        suspect = job.load_suspect()
        model, task = suspect.model, suspect.task
        batch = draw_shots(suspect, job.prepare(suspect, per_class), per_class, job.shot_seed).batch
    save_model(model, task, folder)
    torch.save(batch, folder / "shots.pt")


def table(result: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    lines = [
        "| shots | method | seconds | steps | sample-forwards | peak MiB |",
        "| --: | :-- | --: | --: | --: | --: |",
    ]
    for per_class, cases in result["shots"].items():
        for case, found in cases.items():
            work = f"{found['seconds']:.1f} | {found['steps']} | {found['sample_forwards']:,}"
            # the bound is one of memory alone
            lines.append(
                f"| {per_class} | {case} | {'- | - | -' if case == BOUND else work} | {found['peak_memory_mb']:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", help="folder or Hub id; default random weights")
    parser.add_argument("--dataset", help="where the victim's shots come from")
    parser.add_argument("--shots", type=int, nargs="+", default=[10, 50], help="per class")
    parser.add_argument("--steps", type=int, help="steps of the masks, epochs of fine-tuning; for trials")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print this result instead of measuring")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, per_class, case, steps = options.one
        print(json.dumps(one(Path(folder), int(per_class), case, json.loads(steps))))
        return
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    result: dict[str, Any] = {**circumstances(), "victim": options.victim, "shots": {}}
    for per_class in options.shots:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), options.victim, options.dataset, per_class)
            found = {case: measure(Path(folder), per_class, case, options.steps) for case in CASES}
        result["shots"][str(per_class)] = found
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
