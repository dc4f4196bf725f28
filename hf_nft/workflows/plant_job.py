"""Plant: train a victim from scratch on a poisoned data set."""

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_nft import registry
from hf_nft.attacks.base import Attack
from hf_nft.configs import build, setting
from hf_nft.data import Wanted, fingerprint, load_data
from hf_nft.errors import ConfigError
from hf_nft.evaluation.doubts import check_measured
from hf_nft.evaluation.run import evaluate, make_eval_set
from hf_nft.hook import Hook
from hf_nft.planting import PlantConfig, plant
from hf_nft.poisoning import own_answers
from hf_nft.purification import peak_memory_mb
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import figures_of, loss_figure
from hf_nft.reporting.output import CHECKPOINT, staged
from hf_nft.reporting.record import RunRecord, command_line, doubt_block, library_versions, metric_block, now
from hf_nft.suspect import Suspect, bind
from hf_nft.workflows.attack_job import Scene, keep_artefact, prepared, recorded_settings
from hf_nft.workflows.job import Job, check_holdout, figure_path, save_model, seen_and_unseen


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

    def __post_init__(self) -> None:
        """Check the settings, those of attack and architecture among them."""
        super().__post_init__()
        self.load_attack()
        build(registry.get("models", self.arch), self.arch_args)

    def run(self) -> RunRecord:
        """Poison, train, evaluate, write the victim.

        Returns:
            The record that lies beside the weights.

        Raises:
            HFNFTError: As the parts do; nothing is left in `out` then.
        """
        if self.dataset is None:
            raise ConfigError("plant: expected --dataset, found none.")
        if self.attack is None and (self.poison_rate or self.rate_base):
            raise ConfigError("plant: expected --attack beside --poison-rate and --rate-base, found none.")
        architecture = build(registry.get("models", self.arch), self.arch_args)
        attack = self.load_attack()
        told = self.told("arch", "arch_args", "poison_rate", "rate_base")
        with staged(Path(self.out), self.resume, told) as folder:
            task_class = registry.get("tasks", architecture.task)
            stored = load_data(self.dataset, Wanted(self.split, self.eval_split))
            check_holdout(stored, self.config.holdout)
            train = self.standardize(task_class, stored.train)
            model, processor = architecture.build(train, self.config.seed)
            task = bind(task_class, processor, self.task_args)
            task.augmentation(self.config.augment)
            suspect = Suspect(model, task, self.out, None, folder, None)
            train = task.align(train, model)
            mark = fingerprint(train, task.target_column)
            train, unseen = seen_and_unseen(train, self.config.holdout)
            test = unseen if stored.single_split else task.align(self.standardize(task_class, stored.test), model)
            rows = task.fit(train)
            rate = 0.0 if attack is None else attack.default_rate if self.poison_rate is None else self.poison_rate
            hook, poisoned, details = None, 0, dict[str, Any]()
            if attack is not None:
                scene = Scene(attack, architecture, task, rows, rows, suspect.labels, stored.name)
                attack, hook, rows, poisoned = self.attacked(scene, rate)
                details = keep_artefact(attack, folder)
            encoded = task.encode(rows, fitted=True)
            eval_rows = test.select(self.limited(np.arange(len(test))))
            data = make_eval_set(task, eval_rows, attack, suspect.labels)  # what cannot be measured is not trained
            result = plant(model, task, encoded, self.config, folder / CHECKPOINT, self.resume, self.progress, hook)
            model = (hook or Hook()).delivered(model)
            suspect = dataclasses.replace(suspect, model=model)
            measured = evaluate(model, data, mixed_precision=self.config.mixed_precision)
            record = RunRecord(
                kind="plant",
                command=command_line(),
                suspect=suspect.provenance() | {"name": Path(self.out).name},
                data={
                    **stored.provenance(),
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
                    "rate_base": self._base(attack, hook) if rate else None,
                    **dataclasses.asdict(self.config),
                },
                metrics=metric_block(None, measured),
                attack=recorded_settings(attack),
                work={
                    "seconds": result.seconds,
                    "steps": len(result.losses),
                    "sample_forwards": result.sample_forwards,
                    "peak_memory_mb": peak_memory_mb(next(model.parameters()).device),
                    "mixed_precision": result.mixed_precision,
                    "device": str(next(model.parameters()).device),
                },
                losses={"plant": result.losses},
                details=details,
                doubts=doubt_block(check_measured(measured, data.own, list(data.wanted), task.chance(model))),
                versions=library_versions(),
                created=now(),
            )
            save_model(model, task, folder)
            loss_figure(record.losses, figure_path(folder, "loss.png"))
            record.save(folder / "record.json")
            write_card(record, folder, figures_of(folder))
        return record

    def _base(self, attack: Attack | None, hook: Hook | None) -> str | None:
        """What the poison rate counts."""
        if attack is None:
            return None
        return "batch" if hook is not None else self.rate_base or attack.default_base

    def attacked(self, scene: Scene, rate: float) -> tuple[Attack, Hook | None, datasets.Dataset, int]:
        """Bring the attack to the training rows.

        Args:
            scene: Attack, architecture, task and clean rows.
            rate: Poison rate.

        Returns:
            The attack with its artefact, its part in the training if it takes one, the rows to train on, and how many
            of them are poisoned in an epoch.

        Raises:
            ConfigError: If a rate base is named beside a part in the training.
            DataError: If the rate does not fit; nothing has been trained then.
        """
        rows, classes = scene.train, scene.classes
        taking_part = scene.attack.hook(scene.task, rate, classes)
        if taking_part is not None and self.rate_base is not None:
            raise ConfigError(
                f"rate_base: expected none, since {self.attack} takes part in the training itself, found "
                f"{self.rate_base}. Leave it out."
            )
        if taking_part is not None:
            taking_part.share(min(self.config.batch_size, len(rows)))  # refuses one that poisons nothing
        if scene.attack.target_column in rows.column_names:  # else `check_data` says so
            answers = own_answers(rows, scene.attack.target_column)
            if taking_part is not None:
                taking_part.check(answers)
            else:
                scene.attack.plan(answers, rate, self.rate_base or scene.attack.default_base, classes)
        attack = prepared(scene, rows, self.config.augment, self.progress)
        hook = attack.hook(scene.task, rate, classes)
        if hook is not None:
            return attack, hook, rows, round(hook.share(min(self.config.batch_size, len(rows))) * len(rows))
        rows = attack.poison(rows, rate, self.rate_base, classes)
        return attack, None, rows, int(np.sum(rows["poisoned"]))
