"""Whether the means in a suspect's norms point to where a trigger takes them.

    python benchmarks/mean_shift.py runs/victims/gtsrb-sig-4epochs --dataset ../shared/data/gtsrb --attack sig

For each norm that counts: how far its running means lie from the means of clean shots, how far the trigger takes the
means of those that are not of the target class, and the cosines of that with the distances and with the moves of the
pattern that explains these. Beside them how far means lie apart beside chance (`ratio`), all norms together, and what
shots are answered where norms are displaced along those moves. Triggered shots are used to understand a victim; no
defense sees them.
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
from hf_nft.defenses._memory import remember
from hf_nft.defenses._shift import find
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
        told = compare(job)
    out = RESULTS / f"mean_shift-{Path(options.victim).name}-{options.attack}.json"
    out.write_text(json.dumps({**made, "shots": options.shots, **told}, indent=1) + "\n")


def compare(job: PurifyJob) -> dict[str, Any]:
    """Return what all norms say, and by norm cosines, and distances as root mean squares in running deviations."""
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
    memory = remember(context, model, found, defense.shifted_late, defense.batch_size)
    assert memory is not None, "expected two shots per class or more"
    shifts = find(context, model, memory, defense.shifted_most, defense.shifted_guide, defense.batch_size)
    assert shifts is not None
    rows = make_eval_set(suspect.task, data.train.select(shots.indices), attack, suspect.labels)
    seen = look(model, rows, attack.target_class).response
    count = len(memory.distance)
    trigger = (seen["triggered"].mean(0) - seen["clean"].mean(0))[:count] / memory.spread
    sizes = [int((found.layers == number).sum()) for number in range(len(memory.layers))]
    parts = [part.split(sizes) for part in (memory.distance, trigger, shifts.moves)]
    told = {}
    for name, remembered, true, explained in zip(layers, *parts, strict=False):  # the last layers do not count
        told[name] = {
            "cosine": round(float(cosine_similarity(remembered, true, 0)), 2),
            "cosine of the pattern's moves": round(float(cosine_similarity(explained, true, 0)), 2),
            "running mean": round(float(remembered.square().mean().sqrt()), 3),
            "trigger": round(float(true.square().mean().sqrt()), 3),
        }
    return {
        "ratio": round(memory.ratio, 3),
        "cosine": round(float(cosine_similarity(memory.distance, trigger, 0)), 3),
        "cosine of the pattern's moves": round(float(cosine_similarity(shifts.moves, trigger, 0)), 3),
        **shifts.evidence(),
        "layers": told,
    }


if __name__ == "__main__":
    main()
