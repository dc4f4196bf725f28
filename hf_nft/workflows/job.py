"""What all jobs share: data set, attack, evaluation rows, and how a model is written."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_nft import registry
from hf_nft.attacks._artefacts import BESIDE
from hf_nft.attacks.base import PATHS, Attack
from hf_nft.configs import build, check, setting
from hf_nft.data import Data, Wanted, fingerprint, load_data
from hf_nft.errors import ConfigError, DataError, UnknownNameError
from hf_nft.evaluation.doubts import Doubt, doubt
from hf_nft.hub import first_line
from hf_nft.reporting.text import plain
from hf_nft.shots import held_out
from hf_nft.suspect import Suspect, load_suspect
from hf_nft.tasks.base import Task

SPARE = 2
"""Of a streamed data set so many times the shots are read, so that the seed of the draw chooses among them."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What all jobs are told."""

    dataset: str | None = setting(None, "Hub id, parquet folder or image folder; default: named by the model's card")
    columns: dict[str, str] = dataclasses.field(default_factory=dict, metadata={"help": "column names, role=NAME"})
    split: str | None = setting(None, "split that shots are drawn from; default train")
    eval_split: str | None = setting(None, "split that metrics are measured on; default test, else validation")
    attack: str | None = setting(None, "attack to plant or to measure")
    attack_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "attack settings"})
    task_args: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"help": "task settings"})
    limit: int | None = setting(None, "evaluate on this many test rows only; for trials")
    progress: bool = setting(False, "show progress bars")

    def __post_init__(self) -> None:
        """Check the settings."""
        check(self, (self.limit is None or self.limit >= 1, f"limit: expected >= 1, found {self.limit}"))
        if self.attack is not None:  # before a model is downloaded
            registry.get("attacks", self.attack)

    def told(self, *names: str) -> dict[str, Any]:
        """Return what must not change when an interrupted run is gone on with; its config is compared on its own."""
        common = ("dataset", "columns", "split", "eval_split", "attack", "attack_args", "task_args")
        return {name: getattr(self, name) for name in (*common, *names)}

    def load_attack(self, record: dict[str, Any] | None = None, folder: Path | None = None) -> Attack | None:
        """Return the named attack; its settings are those it was planted with, if the model's record knows them.

        Args:
            record: The record beside the model, if it is one of ours.
            folder: The model's folder, which may hold the attack's artefact.

        Returns:
            The attack, or None if none is named.

        Raises:
            ConfigError: If a setting is wrong, or the attack needs a file that nothing but the record names.
            UnknownNameError: If there is no such attack or setting.
        """
        if self.attack is None:
            if self.attack_args:
                raise ConfigError("attack settings: expected --attack beside them, found none.")
            return None
        recorded = self._recorded((record or {}).get("attack") or {}, folder)
        found: Attack = build(
            registry.get("attacks", self.attack),
            {**recorded, **self.attack_args},
            f"List them with: hf-nft ls attacks {self.attack}",
        )
        return found

    def _recorded(self, known: dict[str, Any], folder: Path | None) -> dict[str, Any]:
        """The settings an attack was planted with. A path among them may be a stranger's choice and is not opened."""
        settings = {k: v for k, v in known.items() if k != "name"} if known.get("name") == self.attack else {}
        for name in PATHS:
            path = settings.pop(name, None)
            beside = _beside(folder) if path and name == "artefact" and folder is not None else None
            if beside is not None:
                settings[name] = str(beside)
            elif path and name not in self.attack_args:
                raise ConfigError(
                    f"{self.attack}: expected its {name} to be named by you, found '{plain(path, 200)}' in the model's "
                    f"record only, and what a record names is not opened. Pass --attack-arg {name}=PATH."
                )
        return settings

    def prepare(self, suspect: Suspect, per_class: int = 0) -> Data:
        """Load the data set with canonical columns and the model's labels.

        A data set that is too large to download is read as far as it takes to find twice the shots of every class.

        Args:
            suspect: The suspect.
            per_class: Shots per class that will be drawn.

        Returns:
            Its parts.

        Raises:
            DataError: If none is named, it does not fit the model, or the rows read of a large one lack a class.
        """
        reference = self.dataset or dataset_of_card(suspect.name, suspect.folder, suspect.is_hub_id)

        def enough(rows: datasets.Dataset) -> bool:
            return not self._rare(suspect, rows, SPARE * per_class)

        stored = load_data(reference, Wanted(self.split, self.eval_split, self.limit, enough))
        if stored.streamed:
            rare = self._rare(suspect, stored.train, per_class)
            if rare:
                raise DataError(
                    f"data set '{reference}': expected {per_class} rows of every class among its first "
                    f"{len(stored.train)}, found fewer of {len(rare)} classes. It is too large to read whole, and "
                    f"perhaps sorted by class: pass a folder on disk or a smaller data set."
                )
        train = self._canonical(suspect, stored.train)
        test = train if stored.single_split else self._canonical(suspect, stored.test)
        return dataclasses.replace(stored, train=train, test=test)

    def _rare(self, suspect: Suspect, rows: datasets.Dataset, least: int) -> list[int]:
        """Classes of the suspect with fewer than `least` of these rows."""
        if least == 0:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, about the rows that are used
            strata = suspect.task.strata(self._canonical(suspect, rows))
        counts = np.bincount(strata, minlength=max(1, suspect.labels))
        return [int(label) for label in np.flatnonzero(counts < least)]

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
            DataError: If rows are poisoned already.
        """
        for role in self.columns:
            if role not in (task.input_column, task.target_column):
                raise UnknownNameError(f"column role of {task.name}", role, (task.input_column, task.target_column))
        if "poisoned" in rows.column_names and any(rows["poisoned"]):  # which the next step would drop
            raise DataError(
                f"{self.dataset}: expected clean rows, found the column 'poisoned' with {sum(rows['poisoned'])} of "
                f"{len(rows)} set. Start from clean data."
            )
        return task.standardize(rows, self.columns)

    def eval_rows(self, suspect: Suspect, data: Data, used: np.ndarray) -> datasets.Dataset:
        """Return the test rows.

        Where all come from one split, these are without the shots, and without what a victim of ours was trained on,
        unless the user asks for that split.
        """
        rows = np.arange(len(data.test))
        if data.single_split:
            unseen = unseen_rows(suspect, data) if self.eval_split is None else None
            rows = np.setdiff1d(rows if unseen is None else unseen, used)
        if not len(rows):
            raise DataError("evaluation: expected rows besides the shots, found none. Lower --shots.")
        return data.test.select(self.limited(rows))

    def limited(self, rows: np.ndarray) -> np.ndarray:
        """Return as many rows as are measured at most, drawn at random and the same every time: folders are sorted."""
        if self.limit is None or self.limit >= len(rows):
            return rows
        return np.sort(np.random.default_rng((0, 6)).permutation(rows)[: self.limit])


@dataclasses.dataclass(frozen=True)
class SuspectJob(Job):
    """A job on a model that exists already."""

    model: str = setting("", "Hub id or folder of the suspect")
    revision: str | None = setting(None, "revision on the Hub")
    allow_pickle: bool = setting(False, "load weights from a pickle file")
    trust_remote_code: bool = setting(False, "run code that comes with the model")

    def load_suspect(self) -> Suspect:
        """Load the model as `hf_nft.suspect.load_suspect` does, with what the user allows."""
        return load_suspect(
            self.model,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            task_args=self.task_args,
        )


def seen_and_unseen(rows: datasets.Dataset, holdout: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split training rows into those a victim learns from and those it never sees, which stay with the defender."""
    away = held_out(len(rows), holdout)
    return rows.select(np.setdiff1d(np.arange(len(rows)), away)), rows.select(away)


def known_holdout(suspect: Suspect, data: Data) -> dict[str, Any]:
    """Return `fraction` and `seed` of what a victim of ours was not trained on; empty if no record tells them."""
    known = (suspect.record or {}).get("data") or {}
    away: dict[str, Any] = known.get("holdout") or {}
    if not away.get("fraction") or known.get("fingerprint") != fingerprint(data.train, suspect.task.target_column):
        return {}
    return {"fraction": away["fraction"], "seed": away["seed"]}


def unseen_rows(suspect: Suspect, data: Data) -> np.ndarray | None:
    """Return the rows of the train part that a victim of ours has not seen, int64; None if no record tells them."""
    away = known_holdout(suspect, data)
    return held_out(len(data.train), **away) if away else None


def check_attack(suspect: Suspect, attack: Attack | None) -> list[Doubt]:
    """Return a doubt if the attack to measure is not the one that the suspect's record names; paths do not count."""
    known = (suspect.record or {}).get("attack") or {}
    if attack is None or not known:
        return []
    used = json.loads(json.dumps(attack.settings()))
    names = ["name"] if known.get("name") != attack.name else [n for n in used if n in known and n not in PATHS]
    differs = [name for name in names if used[name] != known.get(name)]
    told = "; ".join(f"{name} {plain(used[name], 60)}, not {plain(known.get(name), 60)}" for name in differs)
    return [doubt("other-attack", difference=told)] if told else []


def _beside(folder: Path) -> Path | None:
    """The artefact kept with a model: in its own folder (victim), or in the run's, one up (purified)."""
    homes = [folder, *([folder.parent] if folder.name == "model" else [])]
    return next((home / BESIDE for home in homes if (home / BESIDE).is_dir()), None)


def check_holdout(data: Data, holdout: float) -> None:
    """Refuse a data set with a single split if no row of it is kept from the victim, to measure on."""
    if data.single_split and not len(held_out(len(data.train), holdout)):
        raise ConfigError(
            f"holdout: expected a share of at least one row for a data set with a single split, found {holdout} of "
            f"{len(data.train)} rows: none would be left to measure on. Raise holdout."
        )


def save_model(model: torch.nn.Module, task: Task, folder: Path) -> None:
    """Write weights in safetensors, configuration and processor."""
    model.to("cpu").save_pretrained(str(folder))  # type: ignore[operator]
    task.save_processor(str(folder))


def figure_path(folder: Path, name: str) -> Path:
    """Return where a figure of a run goes, making its folder."""
    (folder / "figures").mkdir(exist_ok=True)
    return folder / "figures" / name


def dataset_of_card(name: str, folder: Path, on_hub: bool) -> str:
    """Read which data set a model's card names; a stranger's card must not choose a folder on this machine.

    Args:
        name: What the user called the model.
        folder: Where its card lies.
        on_hub: Whether it comes from the Hub.

    Returns:
        A Hub id, or for a local model perhaps a folder.

    Raises:
        DataError: If the card names none, is no valid YAML, or names a folder though it comes from the Hub.
    """
    from huggingface_hub import metadata_load

    hint = "Pass --dataset ID|FOLDER to commands that need it."
    try:
        named = (metadata_load(folder / "README.md") or {}).get("datasets")
    except OSError:
        named = None
    except Exception as error:  # YAML's errors have no base in common with others
        raise DataError(
            f"card of {name}: expected YAML that names a data set, found: {first_line(error)}. {hint}"
        ) from error
    first = named[0] if isinstance(named, list) and named else named
    if not isinstance(first, str) or not first:
        raise DataError(f"data set: expected one named by --dataset or in the card of {name}, found none. {hint}")
    if on_hub and Path(first).expanduser().exists():
        raise DataError(f"card of {name}: expected a data set on the Hub, found '{first}', which lies here. {hint}")
    return first
