"""Verify: hold a purified model against what its record claims.

The adapter is put onto the recorded revision of the suspect once more, and what comes out is compared with the model
that was published. Masks are multiplied element by element, so the same versions give the same bits; elsewhere a
tensor may differ by rounding.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from hf_nft.adapter_intake import fold
from hf_nft.configs import setting
from hf_nft.data import fingerprint
from hf_nft.errors import ConfigError, DataError, SuspectError
from hf_nft.evaluation.run import EvalSet, Measured, evaluate, make_eval_set
from hf_nft.intake import ADAPTER, ADAPTER_WEIGHTS, locate, read_object
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import LABELS, hub_id, number
from hf_nft.reporting.text import percent, plain
from hf_nft.suspect import Suspect, are_rows, load_suspect
from hf_nft.workflows.job import SuspectJob

TOLERANCE = 1e-6
"""Largest difference of two values of a tensor, as a share of the tensor's largest value, that rounding explains."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What came of a verification.

    Attributes:
        model: The model that was held against its record.
        revision: Its commit; None for a folder.
        suspect: The model that the adapter was put onto.
        suspect_revision: Its commit; None for a folder.
        tensors: Tensors that were compared; 0 if the run has no adapter.
        equal: How many of them are equal bit by bit.
        difference: Largest difference, as a share of its tensor's largest value.
        metrics: Side -> metric -> `recorded` and `measured`, fractions; empty without a data set.
        problems: What is not as claimed; empty if all is well.
    """

    model: str
    revision: str | None
    suspect: str
    suspect_revision: str | None
    tensors: int
    equal: int
    difference: float
    metrics: dict[str, dict[str, dict[str, float | None]]]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class VerifyJob(SuspectJob):
    """Hold a purified model against its record."""

    suspect: str | None = setting(None, "Hub id or folder of the suspect; default the recorded one")

    def run(self) -> Verification:
        """Load both models, apply the adapter, compare; measure again if a data set is named.

        Returns:
            What was found; differences are in it, not raised.

        Raises:
            DataError: If there is no record, or nothing that can be verified.
            HFNFTError: As loading does.
        """
        cured, home = self._open()
        record = _read_record(home)
        adapter = home / "adapter"
        has_adapter = (adapter / ADAPTER).is_file()
        if not has_adapter and self.dataset is None:
            raise DataError(
                f"{self.model}: expected an adapter to apply once more, found none in adapter/. Without it only the "
                f"metrics can be checked: pass --dataset."
            )
        suspect = self._load_base(record, local=cured.revision is None)
        metrics, problems = self._measure(cured, suspect, record) if self.dataset else ({}, [])
        tensors, equal, difference = 0, 0, 0.0
        if has_adapter:
            again = _apply(suspect, adapter, self.model).state_dict()
            tensors, equal, difference, wrong = compare(again, cured.model.state_dict())
            problems = wrong + problems
        return Verification(
            self.model, cured.revision, suspect.name, suspect.revision, tensors, equal, difference, metrics, problems
        )

    def _open(self) -> tuple[Suspect, Path]:
        """Load the published model; return it with the folder that holds its record and adapter."""
        local = Path(self.model).expanduser()
        if local.is_dir():
            inside = local / "model"
            return dataclasses.replace(self, model=str(inside if inside.is_dir() else local)).load_suspect(), local
        cured = self.load_suspect()
        source = locate(cured.name, cured.revision)
        wanted = [name for name in source.files if name in (f"adapter/{ADAPTER}", f"adapter/{ADAPTER_WEIGHTS}")]
        return cured, source.fetch(wanted).folder or cured.folder

    def _load_base(self, record: RunRecord, local: bool) -> Suspect:
        """Load the suspect at the revision that the record names."""
        name, revision = str(record.suspect.get("name") or ""), record.suspect.get("revision")
        base = (record.suspect.get("base") or {}).get("revision")
        if self.suspect is not None:
            name, revision = self.suspect, None
        elif not local and (hub_id(record) is None or Path(name).expanduser().exists()):
            # the record of a stranger must not choose a folder on this machine
            raise DataError(
                f"{self.model}: expected a record that names its suspect on the Hub, found '{plain(name, 60)}'. Name "
                f"the suspect with --suspect."
            )
        return load_suspect(
            name,
            revision=revision,
            base_revision=base,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            task_args={**(record.suspect.get("task_settings") or {}), **self.task_args},
        )

    def _measure(
        self, cured: Suspect, suspect: Suspect, record: RunRecord
    ) -> tuple[dict[str, dict[str, dict[str, float | None]]], list[str]]:
        """Measure both models on the recorded rows and compare with what the record says."""
        attack = record.attack or {}
        rows = record.data.get("test_rows")
        job = dataclasses.replace(self, attack=attack.get("name"), limit=rows if isinstance(rows, int) else None)
        used = np.asarray(record.shots.get("indices") or [], dtype=np.int64)
        per_class = record.shots.get("per_class")
        drawn = int(per_class) if isinstance(per_class, int | float) and 0 < per_class <= len(used) else 0
        data = job.prepare(suspect, drawn)  # of a data set that is streamed as many rows as then
        problems = []
        mark = fingerprint(data.train, suspect.task.target_column)
        if record.data.get("fingerprint") not in (None, mark):
            problems.append(f"the data set is another one ({mark}) than was recorded ({record.data['fingerprint']})")
        trigger = job.load_attack({"attack": attack}, cured.folder)
        metrics = {}
        for side, model in (("before", suspect), ("after", cured)):  # each with its own processor and label names
            own = dataclasses.replace(model, record=suspect.record)
            kept = job.eval_rows(own, data if side == "before" else job.prepare(own, drawn), used)
            eval_set = make_eval_set(own.task, kept, trigger, own.labels)
            metrics[side], wrong = _held_against(record, side, _evaluate(own, eval_set, record))
            problems += wrong
        return metrics, problems


def compare(again: dict[str, torch.Tensor], claimed: dict[str, torch.Tensor]) -> tuple[int, int, float, list[str]]:
    """Compare two sets of weights.

    Args:
        again: What applying the adapter gives, name -> tensor of any shape and dtype.
        claimed: What was published.

    Returns:
        Tensors, how many are equal bit by bit, the largest difference as a share of its tensor's largest value, and
        one sentence for each of the first problems.
    """
    problems = [f"the weight {name} is in one of the models only" for name in sorted(again.keys() ^ claimed.keys())]
    equal, largest = 0, 0.0
    names = sorted(again.keys() & claimed.keys())
    for name in names:
        ours, theirs = again[name], claimed[name]
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            equal += 1
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            problems.append(f"{name} is {theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype} {tuple(ours.shape)}")
            continue
        scale = float(ours.double().abs().max()) or 1.0
        difference = float((ours.double() - theirs.double()).abs().max()) / scale
        largest = max(largest, difference)
        if not difference <= TOLERANCE:  # also if it is not a number
            problems.append(f"{name} differs by {difference:.2g} of its largest value")
    more = [f"and {len(problems) - 3} more"] if len(problems) > 3 else []
    return len(names), equal, largest, problems[:3] + more


def _read_record(home: Path) -> RunRecord:
    record = RunRecord.load(home / "record.json")
    if record.kind != "purify" or not _readable(record):
        raise DataError(
            f"{home / 'record.json'}: expected a readable record of a purification, found one of kind "
            f"'{plain(record.kind, 30)}'. A victim has nothing to verify."
        )
    return record


def _readable(record: RunRecord) -> bool:
    """Whether the parts that are looked into are what they should be; a stranger may have written them."""
    parts = [record.suspect, record.data, record.metrics, record.shots, record.config, record.attack or {}]
    if not all(isinstance(part, dict) for part in parts):
        return False
    looked = [record.suspect.get("task_settings"), *map(record.metrics.get, ("before", "after"))]
    base, rows = record.suspect.get("base") or {}, record.shots.get("indices") or []
    if not all(isinstance(part or {}, dict) for part in (base, *looked)):
        return False
    named = isinstance(record.suspect.get("revision"), str | None) and isinstance(base.get("revision"), str | None)
    return named and are_rows(rows)


def _apply(suspect: Suspect, adapter: Path, model: str) -> torch.nn.Module:
    """Put the masks onto the suspect and fold them in."""
    kind = read_object(adapter / ADAPTER).get("peft_type")
    if kind != "NFT" or not (adapter / ADAPTER_WEIGHTS).is_file():
        found = "none" if kind == "NFT" else f"peft_type '{plain(kind, 30)}'"
        raise SuspectError(f"{model}: expected NFT masks in adapter/{ADAPTER_WEIGHTS}, found {found}.")
    return fold(suspect.model, adapter, f"{model}, adapter/").eval()


def _evaluate(suspect: Suspect, data: EvalSet, record: RunRecord) -> dict[str, Measured]:
    precision = str(record.config.get("mixed_precision") or "auto")
    if precision not in ("auto", "no", "fp16", "bf16"):
        raise ConfigError(f"record: expected mixed_precision auto, no, fp16 or bf16, found '{plain(precision, 30)}'.")
    return evaluate(suspect.model, data, mixed_precision=precision)


def _held_against(
    record: RunRecord, side: str, measured: dict[str, Measured]
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """Pair what was recorded with what was measured; what was recorded counts if it lies in the measured interval.

    The recorded intervals are no judge: who wrote the number wrote them.
    """
    found: dict[str, dict[str, float | None]] = {}
    problems = []
    for name in record.metrics.get(side) or {}:
        recorded = number(record, side, name)
        if recorded is None:
            continue
        now = measured.get(name, Measured(None))
        found[name] = {"recorded": recorded, "measured": now.value}
        low, high = (now.low, now.high) if now.low is not None else _about(now.value)
        if low is None or high is None or not low <= recorded <= high:
            label = f"{LABELS.get(name, plain(name, 30))} {side}"
            problems.append(f"{label} is {percent(now.value)} %, recorded was {percent(recorded)} %")
    return found, problems


def _about(value: float | None) -> tuple[float | None, float | None]:
    """1 % around a metric that has no interval."""
    return (None, None) if value is None else (value - 0.01 * abs(value), value + 0.01 * abs(value))
