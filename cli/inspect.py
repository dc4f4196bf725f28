"""`hf-nft inspect`: what a model is, before anything of it is loaded."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from hf_nft.cli import common

from hf_nft.reporting.text import plain

if TYPE_CHECKING:
    from hf_nft.workflows import Inspection

EXAMPLES = """\b
Examples:
  hf-nft inspect org/suspect-model
  hf-nft inspect org/suspect-model@v1.0 --json
  hf-nft inspect runs/victim --shots 50
"""
SHOWN_FILES = 20


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=EXAMPLES)(inspect)


def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    revision: common.Revision = None,
    shots: Annotated[int, typer.Option(min=1, help="Clean examples per class, for the estimate.")] = 10,
    as_json: common.AsJson = False,
) -> None:
    """Show what MODEL is, why purify would refuse it, and what purifying it would take. No weight is loaded.

    Reads the list of files, the small ones (configuration, tokenizer, card) and the headers of the weights; runs
    nothing that comes with the model. The exit code is 0 for a model that would be refused, too.
    """
    import dataclasses
    import json

    with common.quiet_libraries():
        from hf_nft.workflows import InspectJob

        found = InspectJob(model=model, revision=revision, shots=shots).run()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
        return
    for label, text in _lines(found):
        typer.echo(f"{label:<14} {plain(text, 1000)}".rstrip())


def _lines(found: "Inspection") -> Iterator[tuple[str, str]]:
    """Label and text of every line."""
    yield "model", f"{found.name} at {found.revision}" if found.revision else found.name
    if found.base is not None:
        yield "adapter on", f"{found.base['name']} at {found.base['revision'] or 'a folder'}"
    yield "architecture", found.architecture or "not known"
    yield "task", found.task or "none of ours"
    yield "size", f"{_bytes(found.size)} in {len(found.files)} files"
    yield "formats", ", ".join(f"{name} {_bytes(size)}" for name, size in found.formats.items())
    for name, size in list(found.files.items())[:SHOWN_FILES]:
        yield "  file", f"{_bytes(size):>10}  {name}"
    if len(found.files) > SHOWN_FILES:
        yield "  file", f"... and {len(found.files) - SHOWN_FILES} more (all with --json)"
    yield "stored", ", ".join(f"{count:,} {kind}" for kind, count in found.stored.items()) or "not known"
    yield "parameters", f"{found.parameters:,}" if found.parameters is not None else "not known"
    units = ", ".join(f"{name} {count:,}" for name, count in found.units.items())
    yield "units to mask", units or "not known"
    yield "data set", found.dataset or "not known"
    yield from _estimate_lines(found)
    for note in found.notes:
        yield "note", note
    for reason in found.refused or ["nothing"]:
        yield "refused", reason


def _estimate_lines(found: "Inspection") -> Iterator[tuple[str, str]]:
    expected = found.estimate
    if expected is None:
        return
    yield "forward pass", f"{expected.forward_flop / 1e9:.3g} GFLOP a row, counted"
    memory, slow, fast = _bytes(expected.memory_bytes), _time(expected.cpu_seconds), _time(expected.gpu_seconds)
    times = f"{slow} on one CPU core, {fast} on a large GPU (order of magnitude)"
    yield "estimate", f"about {memory} of memory beside PyTorch's half GiB, {times}"
    yield "", f"assumes {expected.assumes}"


def _bytes(size: float) -> str:
    """Bytes with a unit and at most four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.3g} TiB"


def _time(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds < 1:
        return "less than 1 s"
    for limit, unit in ((60, "s"), (60, "min"), (24, "h")):
        if seconds < 2 * limit:
            return f"{seconds:.2g} {unit}"
        seconds /= limit
    return f"{seconds:.2g} days"
