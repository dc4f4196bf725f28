"""Whether the means in a suspect's norms point to where a trigger takes them.

    python benchmarks/mean_shift.py runs/victims/gtsrb-sig-4epochs --dataset ../shared/data/gtsrb --attack sig

For each masked norm: how far its running means lie from the means of clean shots (less what the choice of shots
explains), how far the trigger takes the means of those that are not of the target class, and the cosine of the two.
Triggered shots are used to understand a victim; no defense sees them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from _common import RESULTS, circumstances
from _inside import look
from hf_nft.cli.common import quiet_libraries
from torch.nn.functional import cosine_similarity

from hf_nft import NFTConfig, get_nft_model
from hf_nft.acceleration import make_accelerator
from hf_nft.adapter import mask_layers
from hf_nft.defenses._statistics import excess_variance
from hf_nft.defenses.base import Context
from hf_nft.defenses.nft import NFT
from hf_nft.evaluation.run import make_eval_set
from hf_nft.loop import Loop
from hf_nft.types import to_device
from hf_nft.workflows import PurifyJob, draw_shots


def main() -> None:
    """Measure and write a record beside the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victim")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--attack", required=True)
    parser.add_argument("--shots", type=int, default=10)
    options = parser.parse_args()
    made = circumstances()
    with quiet_libraries():
        job = PurifyJob(model=options.victim, dataset=options.dataset, shots=options.shots, attack=options.attack)
        layers = compare(job)
    out = RESULTS / f"mean_shift-{Path(options.victim).name}-{options.attack}.json"
    out.write_text(json.dumps({**made, "shots": options.shots, "layers": layers}, indent=1) + "\n")


def compare(job: PurifyJob) -> dict[str, dict[str, float]]:
    """Return by norm the cosine, and both distances as root mean squares in running standard deviations."""
    defense, suspect = NFT(), job.load_suspect()
    attack: Any = job.load_attack(suspect.record, suspect.folder)
    data = job.prepare(suspect, job.shots)
    shots = draw_shots(suspect, data, job.shots, job.shot_seed)
    accelerator = make_accelerator("no")
    model = get_nft_model(suspect.model, NFTConfig()).to(accelerator.device)
    layers, batch = mask_layers(model), to_device(shots.batch, accelerator.device)
    context = Context(model, suspect.task, shots, batch, Loop(accelerator, defense.seed))
    passes = (defense.statistics_passes, defense.statistics_momentum)
    found = excess_variance(context, model, defense.batch_size, *passes)
    assert found is not None, "expected a victim whose norms keep running statistics"
    sizes = [int((found.layers == number).sum()) for number in range(len(layers))]
    rows = make_eval_set(suspect.task, data.train.select(shots.indices), attack, suspect.labels)
    seen = look(model, rows, attack.target_class).response
    shifts = (seen["triggered"].mean(0) - seen["clean"].mean(0)).split(sizes)
    told = {}
    for (name, layer), remembered, shift in zip(layers.items(), found.shift.split(sizes), shifts, strict=True):
        norm: Any = layer.get_base_layer()
        triggered = shift / norm.running_var.sqrt()
        told[name] = {
            "cosine": round(float(cosine_similarity(remembered, triggered, 0)), 2),
            "running mean": round(float(remembered.square().mean().sqrt()), 3),
            "trigger": round(float(triggered.square().mean().sqrt()), 3),
        }
    return told


if __name__ == "__main__":
    main()
