"""Attack: train what an attack needs, poison a data set, or show a trigger, without any victim."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import constants

from hf_nft import registry
from hf_nft.acceleration import processes
from hf_nft.attacks._artefacts import BESIDE, TrainedAttack, normalization
from hf_nft.attacks._workshop import Workshop
from hf_nft.attacks.base import Attack
from hf_nft.configs import build, setting
from hf_nft.data import Wanted, load_data
from hf_nft.errors import ConfigError, OutputError
from hf_nft.models.base import Architecture
from hf_nft.poisoning import own_answers
from hf_nft.reporting.data_card import write_data_card
from hf_nft.reporting.output import staged
from hf_nft.reporting.record import RunRecord, command_line, library_versions, now
from hf_nft.reporting.triggers import Change, change, grid, mean_change
from hf_nft.suspect import bind
from hf_nft.tasks.base import Task
from hf_nft.workflows.job import Job, check_holdout, seen_and_unseen

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class AttackJob(Job):
    """What the three verbs on an attack alone are told; rows are resized to the architecture's input."""

    arch: str = setting("preact_resnet18", "architecture of surrogates; tells resolution and normalisation as well")
    arch_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "architecture settings"})
    augment: str = setting("default", "augmentation of surrogates' training")
    holdout: float = setting(0.1, "share of training rows that stays with the defender, as in plant")

    def open(self) -> "Scene":
        """Load the data set at the architecture's resolution.

        Returns:
            Attack, task and rows.

        Raises:
            HFNFTError: If a name or a setting is wrong, or the data do not load.
        """
        if self.dataset is None or self.attack is None:
            raise ConfigError("attack: expected --dataset and the name of an attack, found none.")
        attack = self.load_attack()
        architecture: Architecture = build(registry.get("models", self.arch), self.arch_args)
        stored = load_data(self.dataset, Wanted(self.split, self.eval_split))
        check_holdout(stored, self.holdout)
        task_class = registry.get("tasks", architecture.task)
        train = self.standardize(task_class, stored.train)
        model, processor = architecture.build(train, 0)
        task = bind(task_class, processor, self.task_args)
        task.augmentation(self.augment)
        train, unseen = seen_and_unseen(task.align(train, model), self.holdout)
        test = unseen if stored.single_split else task.align(self.standardize(task_class, stored.test), model)
        if attack is None or attack.modality != task.name:
            raise ConfigError(f"attack {self.attack}: expected an --arch of its modality, found {self.arch}.")
        return Scene(attack, architecture, task, train, test, task.classes(model), stored.name)

    def train_artefact(self, out: str | None = None) -> Path:
        """Train what the attack needs, or find it in the cache.

        Args:
            out: Folder to write; default one in the cache.

        Returns:
            The folder.

        Raises:
            ConfigError: If the attack needs nothing.
            OutputError: If `out` exists.
        """
        if out is not None and Path(out).exists():
            raise OutputError(f"--out {out}: expected a new folder, found one that exists.")
        scene = self.open()
        if not isinstance(scene.attack, TrainedAttack):
            raise ConfigError(
                f"attack {self.attack}: expected one that has something to train, found one that has not."
            )
        rows = scene.task.fit(scene.train)
        made = prepared(scene, rows, self.augment, self.progress)
        folder = Path(str(made.settings()["artefact"]))
        return Path(shutil.copytree(folder, out)) if out is not None else folder

    def show(self, out: str, count: int = 8) -> Change:
        """Draw a row of test images, triggered, and the difference.

        Args:
            out: File to write.
            count: Images to draw, >= 1.

        Returns:
            How much they change, on average.

        Raises:
            ConfigError: If the attack is not on images.
            OutputError: If the file exists or cannot be written.
        """
        if Path(out).exists():
            raise OutputError(f"--out {out}: expected a new file, found one that exists. Choose another or remove it.")
        if not Path(out).parent.is_dir() or Path(out).suffix.lower() not in PICTURES:
            raise OutputError(f"--out {out}: expected {' '.join(PICTURES)}, such as grid.png, in a folder that exists.")
        scene = self.open()
        if scene.attack.input_column != "image":
            raise ConfigError(
                f"attack {self.attack}: expected one on images to draw, found one on {scene.task.name}. Read its "
                f"triggered rows in what hf-nft attack poison {self.attack} writes."
            )
        _check_storable(scene)
        plan = scene.attack.triggered_plan(own_answers(scene.test, scene.attack.target_column), scene.classes)
        few = np.unique([plan.rows[:count], plan.partners[:count]])
        rows = scene.task.fit(scene.test.select(few))
        needed = isinstance(scene.attack, TrainedAttack) and scene.attack.artefact is None
        learnt_from = scene.task.fit(scene.train) if needed else rows
        attack = prepared(scene, learnt_from, self.augment, self.progress)
        places = attack.triggered_plan(own_answers(rows, attack.target_column), scene.classes).rows
        after = [np.asarray(image) for image in attack.triggered(rows, scene.classes)["image"]]
        before = [np.asarray(rows[int(i)]["image"]) for i in places]
        try:
            grid(before, after).save(out)
        except OSError as error:
            raise OutputError(f"--out {out}: expected a picture file that can be written, found {error}.") from error
        return mean_change([change(*pair) for pair in zip(before, after, strict=True)])

    def poison(self, out: str, rate: float | None = None, base: str | None = None) -> int:
        """Write the poisoned data set: train poisoned, test clean, and the triggered test rows, with record and card.

        Args:
            out: Folder to write.
            rate: Poison rate; default the attack's.
            base: What it counts; default the attack's.

        Returns:
            Number of poisoned rows.

        Raises:
            HFNFTError: As the parts do; nothing is left in `out` then.
        """
        scene = self.open()
        _check_storable(scene)
        rows = scene.task.fit(scene.train)
        rate = scene.attack.default_rate if rate is None else rate
        answers = own_answers(rows, scene.attack.target_column)
        scene.attack.plan(answers, rate, base or scene.attack.default_base, scene.classes)
        with staged(Path(out)) as folder:
            attack = prepared(scene, rows, self.augment, self.progress)
            train = attack.poison(rows, rate, base, scene.classes)
            test = scene.task.fit(scene.test)
            parts = {"train": train, "test": test, "triggered": attack.triggered(test, scene.classes)}
            parts["test"] = _unmarked(test, attack).cast(train.features)
            for name, part in parts.items():
                (folder / "data").mkdir(exist_ok=True)
                part.to_parquet(str(folder / "data" / f"{name}.parquet"))
            details = keep_artefact(attack, folder)
            poisoned, covers = sum(train["poisoned"]), sum(train["cover"])
            facts = {"rate": rate, "base": base or attack.default_base, "holdout": self.holdout}
            facts |= {"poisoned": poisoned, "covers": covers, "rows": {name: len(part) for name, part in parts.items()}}
            record = _record(scene, attack, facts, details)
            record.save(folder / "record.json")
            write_data_card(record, folder)
        return poisoned


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the jobs on an attack work with; `train` is what a victim learns from, `test` what it never sees."""

    attack: Attack
    architecture: Architecture
    task: Task
    train: datasets.Dataset
    test: datasets.Dataset
    classes: int
    name: str


def prepared(scene: Scene, rows: datasets.Dataset, augment: str = "default", progress: bool = False) -> Attack:
    """Return the attack with its artefact: the one it names, the one in the cache, or one trained now.

    Args:
        scene: Attack, architecture and task.
        rows: Clean training rows at the victim's resolution.
        augment: Augmentation of surrogates' training.
        progress: Whether to show bars.

    Returns:
        The attack, ready to use.

    Raises:
        DataError: If the artefact was made for another resolution or normalisation.
    """
    attack = scene.attack
    if not isinstance(attack, TrainedAttack):
        attack.check_data(rows, scene.classes)
        return attack
    if attack.artefact is None:
        attack.check_clean(rows, scene.classes)
        task, batch = scene.task, scene.task.encode(rows, fitted=True)
        told = (scene.classes, scene.architecture, normalization(task), augment, progress)
        workshop = Workshop(task, rows, batch, *told)
        attack = dataclasses.replace(attack, artefact=str(_cached(attack, workshop)))
    attack.check_data(rows, scene.classes)
    attack.check_task(scene.task)
    return attack


def _record(scene: Scene, attack: Attack, facts: dict[str, Any], details: dict[str, Any]) -> RunRecord:
    """Note what was done to which data."""
    told = {"modality": attack.modality, "source": attack.source, "target_column": attack.target_column}
    return RunRecord(
        kind="poison",
        command=command_line(),
        suspect={},
        data={"name": scene.name, **facts, **told},
        config={},
        metrics={},
        attack=recorded_settings(attack),
        details=details,
        versions=library_versions(),
        created=now(),
    )


def _unmarked(rows: datasets.Dataset, attack: Attack) -> datasets.Dataset:
    """Give clean rows what poisoned ones have: inputs within the rows, stored losslessly, and the same columns."""
    column, target = attack.input_column, attack.target_column
    stored = rows.map(lambda part: {column: [attack.store(value) for value in part[column]]}, batched=True)
    marks = {f"orig_{target}": list(rows[target]), "poisoned": [False] * len(rows), "cover": [False] * len(rows)}
    return datasets.concatenate_datasets([stored, datasets.Dataset.from_dict(marks)], axis=1)


def keep_artefact(attack: Attack | None, folder: Path) -> dict[str, Any]:
    """Copy the attack's artefact into a run folder, from where `Job.load_attack` takes it if its own place is gone.

    Args:
        attack: The attack, ready to use.
        folder: Of a victim, a purified model or a data set.

    Returns:
        What a record says about it under `details`: hash, the settings it was made with, and on what; empty without.
    """
    if not isinstance(attack, TrainedAttack):
        return {}
    (folder / BESIDE).mkdir(exist_ok=True)
    for file in attack.files():
        shutil.copy(file, folder / BESIDE)
    made = attack.made()
    return {"artefact": {"sha256": made.digest, **made.facts}}


def _check_storable(scene: Scene) -> None:
    if not scene.attack.storable(scene.task):
        raise ConfigError(
            f"attack {scene.attack.name}: expected a trigger of a grey level or more, since images are stored in 8 "
            f"bits, found a fainter one. Make it stronger; plant takes it as it is."
        )


def recorded_settings(attack: Attack | None) -> dict[str, Any] | None:
    """Return an attack's settings as a record names them.

    Args:
        attack: The attack, or None.

    Returns:
        Its settings; an artefact is named by the folder beside the record that `keep_artefact` copied it to, and by no
        place of this machine.
    """
    if attack is None:
        return None
    return attack.settings() | ({"artefact": BESIDE} if isinstance(attack, TrainedAttack) else {})


def _cached(attack: TrainedAttack, workshop: Workshop) -> Path:
    """Return the artefact's folder in the cache, trained if it is not there."""
    told = json.dumps([attack.recipe(), attack.revision, workshop.facts()], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    place = Path(constants.HF_HOME, "hf-nft", "attacks", f"{attack.name}-{key}")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            folder = Path(scratch, "artefact")
            folder.mkdir()
            attack.trained(workshop, folder)
            if processes().is_main_process and not place.exists():
                folder.replace(place)
        if processes().num_processes > 1:
            processes().wait_for_everyone()
    return place
