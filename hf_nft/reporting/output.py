"""Output folders: written beside their place and moved there when whole."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_nft.acceleration import processes
from hf_nft.errors import OutputError

CHECKPOINT = "checkpoint.pt"
JOB = "job.json"
"""What the unfinished run was told; only a run that is told the same goes on with it."""


def check_output(out: Path, resume: bool = False) -> None:
    """Refuse an output folder before any work starts.

    Args:
        out: The folder to be written.
        resume: Whether an unfinished run may be gone on with.

    Raises:
        OutputError: If it exists, cannot be created, an unfinished run lies beside it and `resume` is not set, or
            something else lies where that would.
    """
    if out.exists():
        raise OutputError(f"--out {out}: expected a new folder, found one that exists. Choose another or remove it.")
    partial = partial_of(out)
    if (partial / CHECKPOINT).exists() and not resume:
        raise OutputError(
            f"--out {out}: found the unfinished run {partial}. Pass --resume to go on with it, or remove that folder."
        )
    ours = any((partial / name).exists() for name in (JOB, CHECKPOINT))
    if partial.exists() and not ours and (not partial.is_dir() or any(partial.iterdir())):
        raise OutputError(
            f"--out {out}: expected {partial} to be free for the unfinished run, found something else there. Move it "
            f"away, or choose another --out."
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {out}: expected a place that can be written, found {error.strerror}.") from error


def partial_of(out: Path) -> Path:
    """Return the folder that holds an unfinished run."""
    return out.with_name(out.name + ".partial")


@contextmanager
def staged(out: Path, resume: bool = False, job: dict[str, Any] | None = None) -> Iterator[Path]:
    """Give a folder to write into; it becomes `out` when the block ends well.

    On an interruption (Ctrl-C, SIGTERM) the unfinished folder with its checkpoint stays, on an error nothing
    does but a checkpoint that was there before, so that a mistaken `resume` costs nothing.
    With several processes the main one writes; the others get a folder of their own that is thrown away.

    Args:
        out: The folder to be written.
        resume: Whether to go on with an unfinished run.
        job: What must agree between the unfinished run and this one, JSON values.

    Yields:
        Path: The unfinished folder; `CHECKPOINT` in it is removed at the end.

    Raises:
        OutputError: See `check_output`; also if the unfinished run was another one, or the disk is full.
    """
    partial = partial_of(out)
    if not processes().is_main_process:
        with tempfile.TemporaryDirectory() as scratch:
            if resume and (partial / CHECKPOINT).exists():  # nobody replaces it before all processes have read it
                shutil.copy(partial / CHECKPOINT, scratch)
            yield Path(scratch)
        return
    made = [folder for folder in partial.parents if not folder.exists()]
    check_output(out, resume)
    resumed = (partial / CHECKPOINT).exists()
    try:
        _agree(partial, job or {}, resumed)
        yield partial
        for name in (CHECKPOINT, JOB):
            (partial / name).unlink(missing_ok=True)
        partial.replace(out)
    except KeyboardInterrupt:
        if not (partial / CHECKPOINT).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:
        if not resumed:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # somebody else's by now
                    folder.rmdir()
        if isinstance(error, OutputError) or not (found := _write_problem(error)):
            raise
        raise OutputError(
            f"--out {out}: expected to write the run, found: {found}. Make room, or choose another place."
        ) from error


def _agree(partial: Path, job: dict[str, Any], resumed: bool) -> None:
    """Refuse to go on with another job's run; note down what this one is told."""
    told = {name: json.dumps(value) for name, value in job.items()}  # as text, since NaN is not itself
    try:
        before = json.loads((partial / JOB).read_text()) if resumed else told
    except (OSError, ValueError):
        before = told
    changed = [name for name in told if before.get(name) != told[name]]
    if changed:
        raise OutputError(
            f"--resume: expected what the interrupted run was told, found another {', '.join(changed)}. "
            f"Repeat its command, or remove {partial} to start afresh."
        )
    (partial / JOB).write_text(json.dumps(told))


def _write_problem(error: Exception) -> str | None:
    """What the system said about a write that failed; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror
    if isinstance(error, SafetensorError) and "I/O error" in str(error):
        return str(error).partition("I/O error: ")[2]
    return None
