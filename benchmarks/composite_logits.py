"""What a victim of CBA says to whole clean shots of its target and sources, and to the mean of two sources' features.

    python benchmarks/composite_logits.py runs/victims/gtsrb-cba --dataset ../shared/data/gtsrb

The attack's classes come from the victim's record; no composed or triggered row is seen.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, circumstances
from hf_nft.cli.common import quiet_libraries
from torch import nn

from hf_nft.suspect import Suspect
from hf_nft.types import take
from hf_nft.workflows import PurifyJob, draw_shots


def main() -> None:
    """Measure and write a record beside the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victim")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--shots", type=int, default=10)
    options = parser.parse_args()
    made = circumstances()
    with quiet_libraries():
        job = PurifyJob(model=options.victim, dataset=options.dataset, shots=options.shots, attack="cba")
        suspect = job.load_suspect()
        attack: Any = job.load_attack(suspect.record, suspect.folder)
        shots = draw_shots(suspect, job.prepare(suspect, options.shots), options.shots, 0)
        found = look(suspect, shots.batch, attack.target_class, attack.parts)
    out = RESULTS / f"composite_logits-{Path(options.victim).name}.json"
    out.write_text(json.dumps({**made, "shots": options.shots, **found}, indent=1) + "\n")


@torch.no_grad()
def look(suspect: Suspect, batch: dict[str, torch.Tensor], target: int, sources: tuple[int, int]) -> dict[str, Any]:
    """Return mean logits by class, and how often the mean of two sources' features has the target on top."""
    model, kept = suspect.model.eval(), list[torch.Tensor]()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].flatten(1)))
    told, roles = {}, {"target": target, "first": sources[0], "second": sources[1]}
    for name, label in roles.items():
        logits = model(**suspect.task.inputs(model, take(batch, batch["labels"] == label))).logits.mean(0)
        told[name] = {other: round(float(logits[number]), 2) for other, number in roles.items()}
        logits[list(roles.values())] = -torch.inf
        told[name]["largest other"] = round(float(logits.max()), 2)
    _, one, two = kept
    pairs = head((one[:, None] + two[None]).flatten(0, 1) / 2).argmax(1)
    return {"classes": roles, "logits": told, "target on top of mean features": float((pairs == target).float().mean())}


if __name__ == "__main__":
    main()
