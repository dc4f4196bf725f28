"""From what the form says to what it shows: one run of `PurifyJob` in a folder of its own."""

import base64
import dataclasses
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

from hf_nft import registry
from hf_nft.app.guests import admit
from hf_nft.demo import plant_digits
from hf_nft.errors import ConfigError
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import figures_of
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import metric_lines
from hf_nft.reporting.text import markdown
from hf_nft.workflows import PurifyJob

MOST_SHOTS = 50
GUEST_ROWS = 1000
"""Test rows that a guest's model is measured on."""
FIGURE = re.compile(r"(?<=\]\()figures/[\w.-]+\.png(?=\))")


@dataclasses.dataclass(frozen=True)
class Order:
    """What the form says.

    Attributes:
        model: Hub id or folder; empty for the demonstration.
        dataset: Hub id or folder; empty for the one that the model's card names.
        shots: Clean examples per class, 1 to `MOST_SHOTS`.
        preset: Preset of NFT.
    """

    model: str
    dataset: str
    shots: int
    preset: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the form shows.

    Attributes:
        table: Metrics before and after, Markdown.
        masks: Path of the figure of the masks.
        archive: Path of the zipped run folder.
        card: The model card, Markdown, with its figures in it.
    """

    table: str
    masks: str
    archive: str
    card: str


class Demonstration:
    """The built-in victim: planted at its first use, gone with the process."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def job(self, shots: int) -> PurifyJob:
        """Return the job that purifies it and measures its backdoor."""
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="hf-nft-demo-")
            plant_digits(f"{folder.name}/digits", f"{folder.name}/victim", progress=True)
            self._folder = folder
        where = self._folder.name
        return PurifyJob(model=f"{where}/victim", dataset=f"{where}/digits", attack="badnets", shots=shots)


def carry_out(order: Order, demonstration: Demonstration, scratch: Path, guest: bool) -> Answer:
    """Purify, and gather what is shown.

    Args:
        order: What the form says.
        demonstration: The built-in victim.
        scratch: Folder of this order; what is returned lies in it.
        guest: Whether a stranger filled in the form: see `guests.admit`.

    Returns:
        What the form shows.

    Raises:
        ConfigError: If a setting is out of range.
        HFNFTError: As the parts do.
    """
    if not 1 <= order.shots <= MOST_SHOTS:
        raise ConfigError(f"shots: expected 1 to {MOST_SHOTS}, found {order.shots}.")
    defense = registry.get("defenses", "nft").from_preset(order.preset)
    job = _named(order, guest) if order.model else demonstration.job(order.shots)
    out = scratch / "clean"
    record = dataclasses.replace(job, defense=defense, out=str(out), progress=True).run()
    if order.model:
        _retell(record, out, _command(job, order.preset))
    archive = shutil.make_archive(str(scratch / "hf-nft-clean"), "zip", out)
    return Answer(table(record), str(out / "figures" / "masks.png"), archive, card(out))


def table(record: RunRecord) -> str:
    """Return the metrics of a run before and after as a Markdown table, shares in percent."""
    rows = [f"| {markdown(line.label)} | {line.before.value} | {line.after.value} |" for line in metric_lines(record)]
    return "\n".join(["| metric | before | after |", "| :-- | --: | --: |", *rows])


def card(out: Path) -> str:
    """Return the card of a run folder without its header, and with its figures in it instead of links to them."""

    def inline(found: re.Match[str]) -> str:
        return "data:image/png;base64," + base64.b64encode((out / found.group()).read_bytes()).decode()

    return FIGURE.sub(inline, ModelCard.load(out / "README.md").text)


def _named(order: Order, guest: bool) -> PurifyJob:
    """The job for a model that the form names."""
    if not guest:
        return PurifyJob(model=order.model, dataset=order.dataset or None, shots=order.shots)
    model, revision, dataset = admit(order.model, order.dataset, order.shots)
    return PurifyJob(model=model, revision=revision, dataset=dataset, shots=order.shots, limit=GUEST_ROWS)


def _command(job: PurifyJob, preset: str) -> str:
    """The command that does the same."""
    options = {"--revision": job.revision, "--dataset": job.dataset, "--shots": job.shots, "--preset": preset}
    named = {**options, "--limit": job.limit}
    parts = [part for name, value in named.items() if value is not None for part in (name, str(value))]
    return shlex.join(["hf-nft", "purify", job.model, *parts])


def _retell(record: RunRecord, out: Path, command: str) -> None:
    """Name the command that does the same in record and card: the one that started the app would be of no use."""
    told = dataclasses.replace(record, command=command)
    told.save(out / "record.json")
    write_card(told, out, figures_of(out))
