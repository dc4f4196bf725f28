"""The three jobs from end to end: plant a victim, purify a suspect, evaluate a model. The command line calls these.

A job is a frozen dataclass of what the user says; `run` does it and returns the record that was written.
"""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_nft import registry
from hf_nft.adapter import masks
from hf_nft.attacks.base import Attack
from hf_nft.configs import build, setting
from hf_nft.data import Data, fingerprint, load_data
from hf_nft.defenses.base import Defense
from hf_nft.errors import ConfigError, DataError, UnknownNameError
from hf_nft.evaluation.doubts import Doubt, check_metrics, check_model
from hf_nft.evaluation.run import EvalSet, Measured, evaluate, make_eval_set
from hf_nft.planting import PlantConfig, plant
from hf_nft.purification import PurifyResult, peak_memory_mb, purify
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import loss_figure, mask_figure
from hf_nft.reporting.output import CHECKPOINT, staged
from hf_nft.reporting.record import RunRecord, command_line, doubt_block, library_versions, metric_block, now
from hf_nft.shots import Shots, choose, held_out
from hf_nft.suspect import Suspect, load_suspect
from hf_nft.tasks.base import Task

PLANTED_BANNER = (
    "This model was backdoored on purpose, to measure defenses on. Do not deploy it; it obeys the trigger named below."
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What all jobs are told."""

    dataset: str | None = setting(None, "Hub id, parquet folder or image folder; default: named by the model's card")
    columns: dict[str, str] = dataclasses.field(default_factory=dict, metadata={"help": "column names, role=NAME"})
    attack: str | None = setting(None, "attack to plant or to measure")
    attack_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "attack settings"})
    limit: int | None = setting(None, "evaluate on this many test rows only; for trials")
    progress: bool = setting(False, "show progress bars")

    def told(self, *names: str) -> dict[str, Any]:
        """Return what must not change when an interrupted run is gone on with; its config is compared on its own."""
        common = ("dataset", "columns", "attack", "attack_args")
        return {name: getattr(self, name) for name in (*common, *names)}

    def load_attack(self, record: dict[str, Any] | None = None) -> Attack | None:
        """Return the named attack; its settings are those it was planted with, if the model's record knows them.

        Args:
            record: The record beside the model, if it is one of ours.

        Returns:
            The attack, or None if none is named.
        """
        if self.attack is None:
            if self.attack_args:
                raise ConfigError("attack settings: expected --attack beside them, found none.")
            return None
        known = (record or {}).get("attack") or {}
        settings = {k: v for k, v in known.items() if k != "name"} if known.get("name") == self.attack else {}
        found: Attack = build(
            registry.get("attacks", self.attack),
            {**settings, **self.attack_args},
            f"List them with: hf-nft ls attacks {self.attack}",
        )
        return found

    def prepare(self, suspect: Suspect) -> Data:
        """Load the data set with canonical columns and the model's labels."""
        reference = self.dataset or _dataset_of_card(suspect.folder)
        if reference is None:
            raise DataError(
                f"data set: expected one named by --dataset or in the card of {suspect.name}, found none. "
                f"Pass --dataset ID|FOLDER."
            )
        stored = load_data(reference)
        train = self._canonical(suspect, stored.train)
        test = train if stored.single_split else self._canonical(suspect, stored.test)
        return Data(stored.name, train, test)

    def _canonical(self, suspect: Suspect, rows: datasets.Dataset) -> datasets.Dataset:
        return suspect.task.align(self.standardize(type(suspect.task), rows), suspect.model)

    def standardize(self, task: type[Task], rows: datasets.Dataset) -> datasets.Dataset:
        """Rename columns to the task's own, as the user or their names tell.

        Args:
            task: The task's class.
            rows: The rows as stored.

        Returns:
            The rows with canonical columns.

        Raises:
            UnknownNameError: If the user names a role that the task does not have.
        """
        for role in self.columns:
            if role not in (task.input_column, task.target_column):
                raise UnknownNameError(f"column role of {task.name}", role, (task.input_column, task.target_column))
        return task.standardize(rows, self.columns)

    def eval_rows(self, task: Task, data: Data, used: np.ndarray) -> datasets.Dataset:
        """Return the test rows, without the shots where both come from one split, at the model's input size."""
        rows = np.arange(len(data.test))
        if data.single_split:
            rows = np.setdiff1d(rows, used)
        if not len(rows):
            raise DataError("evaluation: expected rows besides the shots, found none. Lower --shots.")
        return task.fit(data.test.select(rows[: self.limit] if self.limit else rows))


@dataclasses.dataclass(frozen=True)
class PlantJob(Job):
    """Train a victim from scratch on a poisoned data set."""

    arch: str = setting("preact_resnet18", "architecture to train")
    arch_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "architecture settings"})
    poison_rate: float | None = setting(None, "share of the rate base; default the attack's: 0.1, clean label 0.8")
    rate_base: str | None = setting(None, "all, candidates or target_class")
    config: PlantConfig = dataclasses.field(default_factory=PlantConfig)
    out: str = setting("runs/victim", "folder to write")
    resume: bool = setting(False, "go on with an interrupted run")

    def run(self) -> RunRecord:
        """Poison, train, evaluate, write the victim.

        Returns:
            The record that lies beside the weights.

        Raises:
            HFNFTError: As the parts do; nothing is left in `out` then.
        """
        if self.dataset is None:
            raise ConfigError("plant: expected --dataset, found none.")
        architecture = build(registry.get("models", self.arch), self.arch_args)
        attack = self.load_attack()
        told = self.told("arch", "arch_args", "poison_rate", "rate_base")
        with staged(Path(self.out), self.resume, told) as folder:
            task_class = registry.get("tasks", architecture.task)
            stored = load_data(self.dataset)
            train = self.standardize(task_class, stored.train)
            model, processor = architecture.build(train, self.config.seed)
            task: Task = task_class(processor)
            suspect = Suspect(model, task, self.out, None, folder, None)
            train = task.align(train, model)
            test = task.align(self.standardize(task_class, stored.test), model)
            away = held_out(len(train), self.config.holdout)
            if stored.single_split:  # then the held-out rows are the only ones the victim has not seen
                test = train.select(away)
            mark = fingerprint(train, task.target_column)
            rows = task.fit(train.select(np.setdiff1d(np.arange(len(train)), away)))
            rate = 0.0 if attack is None else attack.default_rate if self.poison_rate is None else self.poison_rate
            if attack is not None:
                rows = attack.poison(rows, rate, self.rate_base, suspect.labels)
            poisoned = int(np.sum(rows["poisoned"])) if attack is not None else 0
            result = plant(model, task, task.encode(rows), self.config, folder / CHECKPOINT, self.resume, self.progress)
            eval_rows = task.fit(test.select(range(min(self.limit or len(test), len(test)))))
            data = make_eval_set(task, eval_rows, attack, suspect.labels)
            measured = evaluate(model, data, mixed_precision=self.config.mixed_precision)
            record = RunRecord(
                kind="plant",
                command=command_line(),
                suspect=suspect.provenance() | {"name": Path(self.out).name},
                data={
                    "name": stored.name,
                    "fingerprint": mark,
                    "train_rows": len(rows),
                    "poisoned_rows": poisoned,
                    "test_rows": len(eval_rows),
                    "holdout": {"fraction": self.config.holdout, "seed": 0},
                },
                config={
                    "arch": self.arch,
                    "arch_args": dataclasses.asdict(architecture),
                    "poison_rate": rate,
                    "rate_base": self.rate_base,
                    **dataclasses.asdict(self.config),
                },
                metrics=metric_block(None, measured),
                attack=attack.settings() if attack is not None else None,
                work={
                    "seconds": result.seconds,
                    "steps": len(result.losses),
                    "sample_forwards": result.sample_forwards,
                    "peak_memory_mb": peak_memory_mb(next(model.parameters()).device),
                    "mixed_precision": result.mixed_precision,
                    "device": str(next(model.parameters()).device),
                },
                losses={"plant": result.losses},
                versions=library_versions(),
                created=now(),
            )
            _save_model(model, task, folder)
            loss_figure(record.losses, _figure(folder, "loss.png"))
            record.save(folder / "record.json")
            write_card(
                record, folder, [("Training loss", "figures/loss.png")], banner=PLANTED_BANNER if attack else None
            )
        return record


@dataclasses.dataclass(frozen=True)
class PurifyJob(Job):
    """Purify a suspect with a few clean examples."""

    model: str = setting("", "Hub id or folder of the suspect")
    shots: int = setting(10, "clean examples per class")
    shot_seed: int = setting(0, "seed of the draw of shots")
    defense: Defense | None = None
    out: str = setting("runs/clean", "folder to write")
    resume: bool = setting(False, "go on with an interrupted run")
    checkpoint_every: int = setting(50, "steps between two checkpoints")
    revision: str | None = setting(None, "revision on the Hub")
    allow_pickle: bool = setting(False, "load weights from a pickle file")
    trust_remote_code: bool = setting(False, "run code that comes with the model")

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
            figures = _save_cure(result, folder)
            cured = result.merged()
            record = self.judge(case, result, cured)
            _save_model(cured, case.suspect.task, folder / "model")
            record.save(folder / "record.json")
            loss_figure(record.losses, _figure(folder, "loss.png"))
            write_card(record, folder, [*figures, ("Loss of every stage", "figures/loss.png")])
        return record

    @property
    def method(self) -> Defense:
        """The defense, by default NFT with its default preset."""
        chosen: Defense = self.defense or registry.get("defenses", "nft").from_preset("default")
        return chosen

    def open(self) -> "Case":
        """Load suspect and data, draw the shots, and measure the suspect as it came."""
        suspect = load_suspect(
            self.model,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        attack = self.load_attack(suspect.record)
        data = self.prepare(suspect)
        shots = draw_shots(suspect, data, self.shots, self.shot_seed)
        rows = self.eval_rows(suspect.task, data, np.asarray(shots.indices))
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
                "name": case.data.name,
                "fingerprint": shots.fingerprint,
                "train_rows": len(case.data.train),
                "test_rows": len(case.eval_set.clean_rows),
            },
            config=result.settings,
            metrics=metric_block(case.before, after),
            attack=case.attack.settings() if case.attack is not None else None,
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
            doubts=doubt_block(doubts_of(case.eval_set, case.before, after, result)),
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


@dataclasses.dataclass(frozen=True)
class EvaluateJob(Job):
    """Measure a model."""

    model: str = setting("", "Hub id or folder")
    mixed_precision: str = setting("auto", "auto, no, fp16 or bf16")
    revision: str | None = setting(None, "revision on the Hub")
    allow_pickle: bool = setting(False, "load weights from a pickle file")
    trust_remote_code: bool = setting(False, "run code that comes with the model")

    def run(self) -> RunRecord:
        """Measure and return a record, which is not written anywhere."""
        suspect = load_suspect(
            self.model,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        attack = self.load_attack(suspect.record)
        data = self.prepare(suspect)
        used = np.asarray(((suspect.record or {}).get("shots") or {}).get("indices") or [], dtype=np.int64)
        rows = self.eval_rows(suspect.task, data, used)
        measured = evaluate(
            suspect.model,
            make_eval_set(suspect.task, rows, attack, suspect.labels),
            mixed_precision=self.mixed_precision,
        )
        return RunRecord(
            kind="evaluate",
            command=command_line(),
            suspect=suspect.provenance(),
            data={"name": data.name, "test_rows": len(rows)},
            config={"mixed_precision": self.mixed_precision},
            metrics=metric_block(None, measured),
            attack=attack.settings() if attack is not None else None,
            versions=library_versions(),
            created=now(),
        )


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
    known = (suspect.record or {}).get("data") or {}
    pool = None
    if known.get("fingerprint") == mark and known.get("holdout", {}).get("fraction"):
        pool = held_out(len(data.train), known["holdout"]["fraction"], known["holdout"]["seed"])
    indices = choose(suspect.task.strata(data.train), per_class, seed, pool)
    batch = suspect.task.encode(data.train.select(indices))
    classes = max(1, len(np.unique(suspect.task.strata(data.train))))
    return Shots(batch, len(indices) / classes, classes, tuple(map(int, indices)), seed, mark)


def doubts_of(
    data: EvalSet, before: dict[str, Measured], after: dict[str, Measured], result: PurifyResult
) -> list[Doubt]:
    """Collect every reason to distrust a run."""
    own = data.triggered_rows[data.task.target_column] if data.triggered_rows is not None else []
    found = check_metrics(before, after, list(own), list(data.wanted))
    found += check_model(result.model, int(result.details.get("skipped_modules", 0)))
    return found + [Doubt(code, text) for code, text in result.doubts]


def _save_cure(result: PurifyResult, folder: Path) -> list[tuple[str, str]]:
    """Write the adapter and its figure, if the cure is one."""
    from peft import PeftModel

    if not isinstance(result.model, PeftModel):
        return []
    result.model.save_pretrained(str(folder / "adapter"))
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's template card says nothing true about this
    mask_figure(masks(result.model), result.details["floors"], _figure(folder, "masks.png"))
    return [("Masks by layer", "figures/masks.png")]


def _save_model(model: torch.nn.Module, task: Task, folder: Path) -> None:
    model.to("cpu").save_pretrained(str(folder))  # type: ignore[operator]
    task.save_processor(str(folder))


def _figure(folder: Path, name: str) -> Path:
    (folder / "figures").mkdir(exist_ok=True)
    return folder / "figures" / name


def _dataset_of_card(folder: Path) -> str | None:
    """The data set that a model's card names."""
    from huggingface_hub import ModelCard

    try:
        named = ModelCard.load(folder / "README.md").data.datasets
    except (OSError, ValueError):
        return None
    return named[0] if isinstance(named, list) and named else named or None
