"""What one step costs: a mask step of each NFT preset beside a plain full fine-tuning step, in one run, as ratios.

    python benchmarks/purify_speed.py --out benchmarks/results/purify_speed.json

Times the purification alone: data in memory, evaluation excluded, warm-up steps excluded. The cases are interleaved
(ABCABC...), the ratio is the median over rounds. Peak memory is that of a subprocess per case in its second run; what
libraries, model and data hold is subtracted, and freed tensors go back to the system at once: it is what a step holds,
whatever gaps an allocator leaves between. Models that are not measured anew keep what the file says.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import circumstances, high_water_mb, settled_mb
from torch import nn

from hf_nft.acceleration import make_accelerator
from hf_nft.defenses.base import Context, Defense
from hf_nft.defenses.finetune import FineTune
from hf_nft.defenses.nft import NFT
from hf_nft.loop import Loop
from hf_nft.shots import Shots
from hf_nft.tasks.base import Task
from hf_nft.types import Batch

BATCH = {"preact_resnet18-w32": 128, "gpt2-256x4": 32, "gpt2-768x12": 16}
UNCUT = {"excess": 0.0, "outliers": 0.0, "exposures": 0, "cut": 0.0}
CASES: dict[str, Callable[[int], Defense]] = {
    "finetune": lambda batch: FineTune(batch_size=batch, epochs=1),
    "paper": lambda batch: NFT.from_preset("paper", batch_size=batch),
    "default": lambda batch: NFT.from_preset("default", batch_size=batch, **UNCUT),
}
"""Steps compared. What the default does before its masks train is left out: it takes other kinds of steps."""

NO_GAPS = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Makes glibc map every tensor of 64 KiB or more by itself, and unmap it when it is freed."""


def image_case(rows: int = 500) -> tuple[nn.Module, Task, Batch]:
    """PreAct-ResNet-18 of width 32 with random weights, and random 32x32 images, as many of each of 10 classes."""
    from hf_nft.models.base import image_processor
    from hf_nft.models.preact_resnet18 import PreActResNetConfig, PreActResNetForImageClassification
    from hf_nft.tasks.image_classification import ImageClassification

    torch.manual_seed(0)
    model = PreActResNetForImageClassification(PreActResNetConfig(width=32, num_labels=10))
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
    return model, ImageClassification(image_processor(32)), {"pixels": pixels, "labels": torch.arange(rows) % 10}


def text_case(width: int, layers: int, vocabulary: int) -> tuple[nn.Module, Task, Batch]:
    """A GPT-2 on 100 prompts and responses as the recipe has: its 4 layers, or the 12 of the published one."""
    import datasets

    from hf_nft.models.gpt2 import Gpt2
    from hf_nft.tasks.text_generation import TextGeneration

    words = [f"word{i}" for i in range(300)]
    texts = [" ".join(words[(7 * i + j) % 300] for j in range(12)) for i in range(100)]
    rows = datasets.Dataset.from_dict({"prompt": texts, "response": texts[::-1]})
    model, tokenizer = Gpt2(width=width, layers=layers, heads=width // 64).build(rows, 0)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)  # the words above fill a fraction of it
    task = TextGeneration(tokenizer)
    return model, task, task.encode(rows)


MODELS: dict[str, Callable[[], tuple[nn.Module, Task, Batch]]] = {
    "preact_resnet18-w32": image_case,
    "gpt2-256x4": functools.partial(text_case, 256, 4, 4096),
    "gpt2-768x12": functools.partial(text_case, 768, 12, 50257),
}


def prepare(model_name: str, case: str, steps: int) -> Callable[[], float]:
    """Return a function that runs `steps` steps of a case and returns the seconds of one step."""
    model, task, batch = MODELS[model_name]()
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # as purify() does
    rows = BATCH[model_name]
    defense = CASES[case](rows)
    shots = Shots(batch, per_class=10)
    setting = {"epochs": steps * rows // max(1, len(shots)) + 1}
    if isinstance(defense, NFT):
        reuse = defense.echoes(task, len(shots))  # as in a run of the preset's own length
        setting = {"steps": math.ceil(steps / reuse) * reuse, "reuse": reuse}

    def run() -> float:
        from hf_nft.adapter import NFTLayer

        if any(isinstance(module, NFTLayer) for module in model.modules()):
            raise AssertionError("expected a plain model")
        loop = Loop(make_accelerator("auto"), 0)
        told = type(defense)(**{**{k: v for k, v in defense.settings().items() if k != "defense"}, **setting})
        start = time.perf_counter()
        outcome = told.run(Context(model, task, shots, batch, loop))
        seconds = (time.perf_counter() - start) / loop.steps
        if outcome.model is not model:
            outcome.model.unload()
        return seconds

    return run


def peak_mb(model_name: str, case: str) -> float:
    """Return the peak memory of a case in MiB above that of the loaded process; runs in a process of its own."""
    told = [sys.executable, __file__, "--peak", model_name, case]
    result = subprocess.run(told, capture_output=True, text=True, check=True, env={**os.environ, **NO_GAPS})
    return float(result.stdout.strip().splitlines()[-1])


def measure(model_name: str, steps: int, rounds: int) -> dict[str, object]:
    """Time all cases of one model, interleaved."""
    where = {
        **circumstances(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "mixed_precision": make_accelerator("auto").mixed_precision,
    }
    runs = {case: prepare(model_name, case, steps) for case in CASES}
    for run in runs.values():
        run()  # warm-up
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, run in runs.items():
            times[case].append(run())
    result: dict[str, object] = {}
    for case, found in times.items():
        ratios = [a / b for a, b in zip(found, times["finetune"], strict=True)]
        seconds = statistics.median(found)
        result[case] = {
            "seconds_per_step": seconds,
            "sample_forwards_per_second": BATCH[model_name] / seconds,
            "ratio_to_full_step": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "peak_memory_mb": peak_mb(model_name, case),
        }
    return {**where, "batch": BATCH[model_name], "cases": result}


def table(result: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    lines = ["| model | step | seconds | ratio | peak MiB |", "| :-- | :-- | --: | --: | --: |"]
    for model, measured in result.items():
        for case, found in measured["cases"].items():
            numbers = (
                f"{found['seconds_per_step']:.3f} | {found['ratio_to_full_step']:.2f} | {found['peak_memory_mb']:.0f}"
            )
            lines.append(f"| {model} | {case} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--table", type=Path, help="print this result instead of measuring")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        run = prepare(*options.peak, 2)
        run()  # loads what is loaded at first use
        before = settled_mb()
        run()
        print(high_water_mb() - before)
        return
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    kept = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    result = {**kept, **{name: measure(name, options.steps, options.rounds) for name in options.models}}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
