"""RunRecord: everything about one run as one versioned JSON file; cards and tables are views of it.

Fractions are in [0, 1]; seconds and MiB are named as such; nothing in a record is computed twice.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hf_nft
from hf_nft.errors import DataError
from hf_nft.evaluation.doubts import Doubt
from hf_nft.evaluation.intervals import defense_effectiveness_rating
from hf_nft.evaluation.run import Measured

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "huggingface_hub")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        kind: `purify`, `plant`, `evaluate` or `poison`.
        command: The command line that made it.
        suspect: Name, revision, architecture and task of the model that went in.
        data: Name, fingerprint, row counts and hold-out of the data set.
        config: All settings, with `preset`.
        metrics: `before` and `after`, each metric name -> fraction or None; `der`; `counts` with intervals.
        attack: Settings of the attack that was measured or planted; None if none was named.
        shots: `per_class`, `classes`, `indices`, `seed`; empty for runs without shots.
        work: Seconds, steps, sample-forwards (passes of one row; a full step costs 3, a mask step 2), peak memory,
            precision, device.
        losses: Stage name -> loss of every step.
        details: What the defense reports, or what an attack's artefact is: `sha256`, `settings`, what it was made on.
        doubts: Reasons to distrust the numbers: `code`, `text`, `more`.
        versions: Library versions, Python, hf-nft and its git commit.
        created: UTC time, ISO 8601.
        schema_version: Version of this layout.
    """

    kind: str
    command: str
    suspect: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any]
    attack: dict[str, Any] | None = None
    shots: dict[str, Any] = dataclasses.field(default_factory=dict)
    work: dict[str, Any] = dataclasses.field(default_factory=dict)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    doubts: list[dict[str, str]] = dataclasses.field(default_factory=list)
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    created: str = ""
    schema_version: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write JSON; numbers keep six significant digits in losses, all digits elsewhere."""
        content = dataclasses.asdict(self)
        content["losses"] = {k: [float(f"{v:.6g}") for v in values] for k, values in self.losses.items()}
        path.write_text(json.dumps(content, indent=1, sort_keys=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Read a record.

        Args:
            path: The JSON file.

        Returns:
            The record; keys it does not know are left out.

        Raises:
            DataError: If there is no file, or it is no record, or of a newer schema.
        """
        try:
            content = json.loads(path.read_text())
            known = {field.name for field in dataclasses.fields(cls)}
            record = cls(**{key: value for key, value in content.items() if key in known})
            newer = record.schema_version > SCHEMA_VERSION
        except FileNotFoundError as error:
            raise DataError(f"{path}: expected a run record, found none. Pass the folder of a run.") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: expected a run record, found something else ({str(error)[:120]}).") from error
        if newer:
            raise DataError(
                f"{path}: expected schema {SCHEMA_VERSION} or older, found {record.schema_version}. Upgrade hf-nft."
            )
        return record


def metric_block(before: dict[str, Measured] | None, after: dict[str, Measured] | None) -> dict[str, Any]:
    """Arrange measurements for a record.

    Args:
        before: Of the suspect; None if there was none.
        after: Of the result; None if there is none.

    Returns:
        `before` and `after` with at least `acc`, `asr`, `racc` (fractions or None), `der`, and `counts`.
    """
    block: dict[str, Any] = {"counts": {}}
    for name, measured in (("before", before), ("after", after)):
        values = measured or {}
        block[name] = dict.fromkeys(("acc", "asr", "racc")) | {k: m.value for k, m in values.items()}
        block["counts"][name] = {k: dataclasses.asdict(m) for k, m in values.items()}
    block["der"] = defense_effectiveness_rating(block["before"], block["after"])
    return block


def doubt_block(doubts: list[Doubt]) -> list[dict[str, str]]:
    """Arrange doubts for a record."""
    return [{"code": doubt.code, "text": doubt.text, "more": doubt.more} for doubt in doubts]


def command_line() -> str:
    """Return the command line of this process, as a user would type it."""
    program = Path(sys.argv[0])
    name = "hf-nft" if program.parts[-2:] == ("cli", "main.py") else program.name  # python -m hf_nft.cli.main
    return shlex.join([name, *sys.argv[1:]])


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str | None]:
    """Return the versions of what a run depends on; None where something is absent."""
    found: dict[str, str | None] = {"hf_nft": hf_nft.__version__, "git_commit": _git_commit()}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from; None when it is installed elsewhere."""
    folder = Path(hf_nft.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
