"""Purify: load a suspect, draw shots, cure it, measure before and after, write the run folder."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_nft import registry
from hf_nft.adapter import masks
from hf_nft.attacks.base import Attack
from hf_nft.configs import check, setting
from hf_nft.data import Data, fingerprint
from hf_nft.defenses.base import Defense
from hf_nft.evaluation.doubts import Doubt, check_cure, check_measured, check_model, doubt
from hf_nft.evaluation.run import EvalSet, Measured, evaluate, make_eval_set
from hf_nft.purification import PurifyResult, purify
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import figures_of, loss_figure, mask_figure
from hf_nft.reporting.output import CHECKPOINT, staged
from hf_nft.reporting.record import RunRecord, command_line, doubt_block, library_versions, metric_block, now
from hf_nft.shots import Shots, choose, class_weights
from hf_nft.suspect import Suspect
from hf_nft.workflows.attack_job import keep_artefact, recorded_settings
from hf_nft.workflows.job import SuspectJob, check_attack, figure_path, known_holdout, save_model, unseen_rows


@dataclasses.dataclass(frozen=True)
class PurifyJob(SuspectJob):
    """Purify a suspect with a few clean examples."""

    shots: int = setting(10, "clean examples per class")
    shot_seed: int = setting(0, "seed of the draw of shots")
    defense: Defense | None = None
    out: str = setting("runs/clean", "folder to write")
    resume: bool = setting(False, "go on with an interrupted run")
    checkpoint_every: int = setting(50, "steps between two checkpoints, >= 1")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check(
            self,
            (self.shots >= 1, f"shots: expected >= 1, found {self.shots}"),
            (self.shot_seed >= 0, f"shot_seed: expected >= 0, found {self.shot_seed}"),
            (self.checkpoint_every >= 1, f"checkpoint_every: expected >= 1, found {self.checkpoint_every}"),
        )

    def run(self) -> RunRecord:
        """Load, draw shots, purify, evaluate before and after, write the run folder.

        Returns:
            The record that was written.

        Raises:
            HFNFTError: As the parts do; nothing is left in `out` then.
        """
        with staged(Path(self.out), self.resume, self.told("model", "revision")) as folder:
            case = self.open()
            result = self.cure(case, folder / CHECKPOINT)
            _save_cure(result, case.suspect, folder)
            cured = result.merged()
            record = self.judge(case, result, cured)
            save_model(cured, case.suspect.task, folder / "model")
            keep_artefact(case.attack, folder)
            record.save(folder / "record.json")
            loss_figure(record.losses, figure_path(folder, "loss.png"))
            write_card(record, folder, figures_of(folder))
        return record

    @property
    def method(self) -> Defense:
        """The defense, by default NFT with its default preset."""
        chosen: Defense = self.defense or registry.get("defenses", "nft").from_preset("default")
        return chosen

    def open(self) -> "Case":
        """Load suspect and data, draw the shots, and measure the suspect as it came."""
        suspect = self.load_suspect()
        suspect.task.augmentation(self.method.augment)
        attack = self.load_attack(suspect.record, suspect.folder)
        data = self.prepare(suspect, self.shots)
        shots = draw_shots(suspect, data, self.shots, self.shot_seed)
        rows = self.eval_rows(suspect, data, np.asarray(shots.indices))
        eval_set = make_eval_set(suspect.task, rows, attack, suspect.labels)
        before = evaluate(suspect.model, eval_set, mixed_precision=self.method.mixed_precision)
        return Case(suspect, suspect.provenance(), attack, data, shots, eval_set, before)

    def cure(self, case: "Case", checkpoint: Path | None = None) -> PurifyResult:
        """Run the defense on an opened case; it sees the model and the shots, nothing else."""
        return purify(
            case.suspect.model,
            case.suspect.task,
            case.shots,
            self.method,
            checkpoint=checkpoint,
            checkpoint_every=self.checkpoint_every,
            resume=self.resume,
            progress=self.progress,
        )

    def judge(self, case: "Case", result: PurifyResult, cured: torch.nn.Module) -> RunRecord:
        """Measure the cured model and make the record."""
        after = evaluate(cured, case.eval_set, mixed_precision=self.method.mixed_precision)
        shots = case.shots
        return RunRecord(
            kind="purify",
            command=command_line(),
            suspect=case.provenance,
            data={
                **case.data.provenance(),
                "fingerprint": shots.fingerprint,
                **({"holdout": away} if (away := known_holdout(case.suspect, case.data)) else {}),
                "train_rows": len(case.data.train),
                "test_rows": len(case.eval_set.clean_rows),
            },
            config=result.settings,
            metrics=metric_block(case.before, after),
            attack=recorded_settings(case.attack),
            shots={
                "per_class": shots.per_class,
                "classes": shots.classes,
                "seed": shots.seed,
                "indices": list(shots.indices),
            },
            work={
                "seconds": result.seconds,
                "steps": result.steps,
                "sample_forwards": result.sample_forwards,
                "peak_memory_mb": result.peak_memory_mb,
                "mixed_precision": result.mixed_precision,
                "device": str(next(cured.parameters()).device),
            },
            losses=result.losses,
            details=result.details,
            doubts=doubt_block(doubts_of(case, after, result)),
            versions=library_versions(),
            created=now(),
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A suspect, its shots and its evaluation rows, before anything was done.

    Attributes:
        suspect: The suspect; its model is changed by a cure.
        provenance: What a record says about it.
        attack: The attack to measure, if one is named.
        data: Its data set, canonical, labels as the model numbers them.
        shots: The clean examples.
        eval_set: Test rows, clean and triggered.
        before: Metrics of the suspect as it came.
    """

    suspect: Suspect
    provenance: dict[str, Any]
    attack: Attack | None
    data: Data
    shots: Shots
    eval_set: EvalSet
    before: dict[str, Measured]


def draw_shots(suspect: Suspect, data: Data, per_class: int, seed: int) -> Shots:
    """Choose and encode shots from the train part.

    Rows that a victim of ours was trained on are left out, as its record tells them.

    Args:
        suspect: The suspect.
        data: Its data set, canonical.
        per_class: Shots per class, >= 1.
        seed: Seed of the draw.

    Returns:
        The shots.

    Raises:
        DataError: If a class has too few rows.
    """
    mark = fingerprint(data.train, suspect.task.target_column)
    strata = suspect.task.strata(data.train)
    indices = choose(strata, per_class, seed, unseen_rows(suspect, data))
    batch = suspect.task.encode(data.train.select(indices))
    classes = max(1, len(np.unique(strata)))
    weights, own = None, None
    if not data.streamed:  # the first rows do not tell how frequent each class is
        weights = class_weights(strata, indices)
        own = torch.from_numpy(np.unique(strata[indices], return_inverse=True)[1])
    return Shots(batch, len(indices) / classes, classes, tuple(map(int, indices)), seed, mark, weights, own)


def doubts_of(case: Case, after: dict[str, Measured], result: PurifyResult) -> list[Doubt]:
    """Collect every reason to distrust a run."""
    data = case.eval_set
    chance = data.task.chance(case.suspect.model)
    found = check_measured(case.before, data.own, list(data.wanted), chance) + check_cure(case.before, after)
    found += check_attack(case.suspect, case.attack)
    missing = case.suspect.labels - case.shots.classes
    found += [doubt("missing-classes", count=missing, classes=case.suspect.labels)] if missing > 0 else []
    found += [doubt("streamed-data", rows=len(case.data.train))] if case.data.streamed else []
    found += check_model(result.model, int(result.details.get("skipped_modules", 0)))
    return found + [Doubt(code, text) for code, text in result.doubts]


def _save_cure(result: PurifyResult, suspect: Suspect, folder: Path) -> None:
    """Write the adapter and its figure, if the cure is one."""
    from peft import PeftModel

    if not isinstance(result.model, PeftModel):
        return
    if suspect.is_hub_id:  # the adapter belongs to this commit, wherever it was cached
        config = result.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = suspect.name, suspect.revision
    # masks never touch embeddings; to find that out, PEFT would ask the Hub for the suspect's configuration
    result.model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's template card says nothing true about this
    mask_figure(masks(result.model), result.details.get("floors", {}), figure_path(folder, "masks.png"))
