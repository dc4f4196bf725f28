"""What the scripts beside it share: where results lie, how a table gets onto a page, how a cure is measured."""

import ctypes
import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import torch

from hf_nft.defenses.base import Defense
from hf_nft.reporting.record import RunRecord, command_line, library_versions, now
from hf_nft.suspect import load_suspect
from hf_nft.workflows import PurifyJob
from hf_nft.workflows.purify_job import Case

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def circumstances() -> dict[str, Any]:
    """Return what a result says about how it was made, JSON values; call it before anything is measured."""
    return {
        "command": command_line(),
        "created": now(),
        "versions": library_versions(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def high_water_mb() -> float:
    """Return this process's peak resident memory in MiB; getrusage would start from the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def settled_mb() -> float:
    """Give what is free back to the system, let the peak start anew, and return what is left in MiB; Linux with glibc.

    After a first run this is what libraries, loaded by then, the model and the data hold.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return high_water_mb()


def fill(page: Path, name: str, content: str) -> None:
    """Replace what stands between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a page."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    head, rest = text.split(begin)
    page.write_text(f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}")


def save(record: RunRecord, file: Path) -> None:
    """Keep a record without its curves, which are long and easily made again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    dataclasses.replace(record, losses={}).save(file)


def planted_attack(victim: str) -> str | None:
    """Return the name of the attack that a victim of ours was planted with."""
    planted = RunRecord.load(Path(victim) / "record.json").attack
    return planted["name"] if planted else None


def cure_and_judge(job: PurifyJob, case: Case, defense: Defense, file: Path) -> None:
    """Run one defense on an opened case and keep the record, unless it is there already.

    Args:
        job: The job that opened the case.
        case: Its suspect was measured and is loaded afresh here; its shots and test rows serve every defense.
        defense: What to do.
        file: Where the record goes.
    """
    if file.exists():
        return
    fresh = dataclasses.replace(case, suspect=load_suspect(job.model))
    told = dataclasses.replace(job, defense=defense)
    result = told.cure(fresh)
    record = told.judge(fresh, result, result.merged())
    save(record, file)
    after, name = record.metrics["after"], file.relative_to(RESULTS).with_suffix("")
    print(f"{name}: ACC {after['acc']:.3f} ASR {after['asr']} {result.seconds:.0f} s", flush=True)
