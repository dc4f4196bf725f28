"""How long triggering takes, and how much memory: every image attack on CIFAR-10 through `datasets.map`, batched.

    python benchmarks/attack_speed.py --dataset data/cifar10 --out benchmarks/results/attack_speed.json

Artefacts have their full size and are trained for a step or two, since what they learn does not change the time. Every
case runs in a process of its own with a cache of its own, on a tenth of the rows and on all: memory that grows with the
rows would show. Decoding, triggering and storing as PNG are included, training is not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import circumstances, high_water_mb

VARIANTS: dict[str, dict[str, Any]] = {"bppa": {"dither": True}}
"""Settings whose speed is another than the defaults'."""


def one(dataset: str, name: str, settings: dict[str, Any], rows: int) -> dict[str, float]:
    """Trigger test rows with one attack; runs in a process of its own.

    Args:
        dataset: Folder or Hub id.
        name: The attack.
        settings: Its settings.
        rows: How many test rows to trigger, at most.

    Returns:
        Seconds, rows that were triggered, peak memory and the part of it above what was there before.
    """
    import datasets

    from hf_nft import registry
    from hf_nft.data import load_data
    from hf_nft.models.preact_resnet18 import PreActResNet18
    from hf_nft.tasks.image_classification import ImageClassification
    from hf_nft.workflows.attack_job import Scene, prepared

    datasets.disable_progress_bars()
    data = load_data(dataset)
    train, test = (ImageClassification.standardize(part, {}) for part in (data.train, data.test))
    cls, architecture = registry.get("attacks", name), PreActResNet18()
    short = {key: value for key, value in cls.tiny.items() if key not in ("width", "preset")}
    classes = len(test.features["label"].names)
    _, processor = architecture.build(train, 0)
    few = train.select(range(256))
    task = ImageClassification(processor)
    attack = prepared(Scene(cls(**{**short, **settings}), architecture, task, few, few, classes, data.name), few)
    chosen = test.select(range(min(rows, len(test))))
    before, start = high_water_mb(), time.perf_counter()
    made = attack.triggered(chosen, classes)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rows": len(made), "peak_mb": high_water_mb(), "added_mb": high_water_mb() - before}


def measure(dataset: str, name: str, settings: dict[str, Any], rows: int) -> dict[str, float]:
    """Run a case in a process of its own."""
    told = [sys.executable, __file__, "--dataset", dataset, "--one", name, json.dumps(settings), str(rows)]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(told, capture_output=True, text=True, check=True, env={**os.environ, "HF_HOME": cache})
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(result: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    lines = ["| attack | rows | seconds | for 10 000 | MiB added, a tenth | MiB added, all |"]
    lines.append("| :-- | --: | --: | --: | --: | --: |")
    for name, found in result["attacks"].items():
        small, whole = found["tenth"], found["all"]
        scaled = whole["seconds"] * 10_000 / whole["rows"]
        numbers = f"{whole['rows']:.0f} | {whole['seconds']:.1f} | {scaled:.1f}"
        lines.append(f"| {name} | {numbers} | {small['added_mb']:.0f} | {whole['added_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="data/cifar10")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--attacks", nargs="*", help="default all")
    parser.add_argument("--table", type=Path, help="print this result instead of measuring")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, settings, rows = options.one
        print(json.dumps(one(options.dataset, name, json.loads(settings), int(rows))))
        return
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    from hf_nft import registry

    known = [n for n in registry.names("attacks") if registry.get("attacks", n).modality == "image_classification"]
    cases = {name: (name, dict[str, Any]()) for name in options.attacks or known}
    cases |= {f"{name} {json.dumps(told)}": (name, told) for name, told in VARIANTS.items() if name in cases}
    result: dict[str, Any] = {**circumstances(), "attacks": {}}
    for label, (name, told) in cases.items():
        parts = {"tenth": options.rows // 10, "all": options.rows}
        result["attacks"][label] = {part: measure(options.dataset, name, told, rows) for part, rows in parts.items()}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
