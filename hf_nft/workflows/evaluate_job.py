"""Evaluate: measure a model on the test split, clean and triggered."""

import dataclasses

import numpy as np

from hf_nft.configs import setting
from hf_nft.evaluation.doubts import check_measured
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.reporting.record import RunRecord, command_line, doubt_block, library_versions, metric_block, now
from hf_nft.workflows.job import SuspectJob, check_attack


@dataclasses.dataclass(frozen=True)
class EvaluateJob(SuspectJob):
    """Measure a model."""

    mixed_precision: str = setting("auto", "auto, no, fp16 or bf16")

    def run(self) -> RunRecord:
        """Measure and return a record, which is not written anywhere."""
        suspect = self.load_suspect()
        attack = self.load_attack(suspect.record, suspect.folder)
        data = self.prepare(suspect)
        used = np.asarray(((suspect.record or {}).get("shots") or {}).get("indices") or [], dtype=np.int64)
        rows = self.eval_rows(suspect, data, used)
        eval_set = make_eval_set(suspect.task, rows, attack, suspect.labels)
        measured = evaluate(suspect.model, eval_set, mixed_precision=self.mixed_precision)
        chance = suspect.task.chance(suspect.model)
        found = check_measured(measured, eval_set.own, list(eval_set.wanted), chance) + check_attack(suspect, attack)
        return RunRecord(
            kind="evaluate",
            command=command_line(),
            suspect=suspect.provenance(),
            data={**data.provenance(), "test_rows": len(rows)},
            config={"mixed_precision": self.mixed_precision},
            metrics=metric_block(None, measured),
            attack=attack.settings() if attack is not None else None,
            doubts=doubt_block(found),
            versions=library_versions(),
            created=now(),
        )
