"""Output folders: written beside their place and moved there when whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_nft.errors import OutputError

CHECKPOINT = "checkpoint.pt"


def check_output(out: Path, resume: bool = False) -> None:
    """Refuse an output folder before any work starts.

    Args:
        out: The folder to be written.
        resume: Whether an unfinished run may be gone on with.

    Raises:
        OutputError: If it exists, cannot be created, or an unfinished run lies beside it and `resume` is not set.
    """
    if out.exists():
        raise OutputError(f"--out {out}: expected a new folder, found one that exists. Choose another or remove it.")
    partial = partial_of(out)
    if (partial / CHECKPOINT).exists() and not resume:
        raise OutputError(
            f"--out {out}: found the unfinished run {partial}. Pass --resume to go on with it, or remove that folder."
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out {out}: expected a place that can be written, found {error.strerror}.") from error


def partial_of(out: Path) -> Path:
    """Return the folder that holds an unfinished run."""
    return out.with_name(out.name + ".partial")


@contextmanager
def staged(out: Path, resume: bool = False) -> Iterator[Path]:
    """Give a folder to write into; it becomes `out` when the block ends well.

    On an interruption (Ctrl-C, SIGTERM) the unfinished folder with its checkpoint stays, on an error nothing does.

    Args:
        out: The folder to be written.
        resume: Whether to go on with an unfinished run.

    Yields:
        The unfinished folder; `CHECKPOINT` in it is removed at the end.

    Raises:
        OutputError: See `check_output`; also if the disk is full.
    """
    check_output(out, resume)
    partial = partial_of(out)
    try:
        yield partial
        (partial / CHECKPOINT).unlink(missing_ok=True)
        partial.replace(out)
    except KeyboardInterrupt:
        if not (partial / CHECKPOINT).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, OutputError):
            raise OutputError(f"--out {out}: expected to write the run, found: {error.strerror}.") from error
        raise
