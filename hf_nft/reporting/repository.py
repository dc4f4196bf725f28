"""A run folder as a repository: which file goes where, what stays at home, and the card that says how to load it."""

import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from hf_nft.errors import DataError, OutputError
from hf_nft.reporting.card import write_card
from hf_nft.reporting.figures import CAPTIONS, figures_of
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import hub_id
from hf_nft.reporting.text import TOKEN, public

CARD, RECORD, ADAPTER_CONFIG = "README.md", "record.json", "adapter/adapter_config.json"
MODEL = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py")
PLACES = {"": (CARD, RECORD), "model": MODEL, "adapter": ("*.json", "*.safetensors"), "figures": ("*.png",)}
"""What is pushed from each folder of a run; the model comes to the top, where every library looks for it."""
REPLACED = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    ADAPTER_CONFIG,
    "adapter/adapter_model.safetensors",
    *(f"figures/{name}.png" for name in CAPTIONS),
)
"""What an older push, or the suspect itself, may have left in a repository and would be loaded instead of ours."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that may be pushed.

    Attributes:
        folder: The folder.
        record: Its record, without what tells about this machine.
        files: Name in the repository -> file in the folder.
        left_out: Files of the folder that are not pushed, relative to it.
    """

    folder: Path
    record: RunRecord
    files: dict[str, Path]
    left_out: list[str]

    @property
    def planted(self) -> bool:
        """Whether the model carries a backdoor on purpose."""
        return self.record.kind == "plant" and bool(self.record.attack)


def open_run(folder: Path) -> Run:
    """Look at a run folder and choose what is to be pushed.

    Args:
        folder: What `purify` or `plant` wrote.

    Returns:
        The run.

    Raises:
        DataError: If this is no run folder, or its record is not readable.
        OutputError: If a symbolic link lies in it.
    """
    found = sorted(folder.rglob("*"))
    for path in found:
        if path.is_symlink():
            raise OutputError(
                f"{path}: expected a run folder of plain files, found a symbolic link, which may lead anywhere. "
                f"Replace it by a copy."
            )
    places = PLACES if (folder / "model").is_dir() else {**PLACES, "": (CARD, RECORD, *MODEL)}
    files = {}
    for path in found:
        place = path.parent.relative_to(folder).as_posix().removeprefix(".")
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in places.get(place, ())):
            files[path.name if place == "model" else path.relative_to(folder).as_posix()] = path
    missing = [name for name in (RECORD, "config.json") if name not in files]
    if missing or not any(fnmatch(name, "*.safetensors") and "/" not in name for name in files):
        raise DataError(
            f"{folder}: expected a run folder, written by `hf-nft purify` or `hf-nft plant`, found one without "
            f"{missing[0] if missing else 'weights in safetensors'}."
        )
    kept = {path for path in found if path.is_file()} - set(files.values())
    left_out = sorted(path.relative_to(folder).as_posix() for path in kept)
    return Run(folder, _public(RunRecord.load(files[RECORD])), files, left_out)


def stage(run: Run, place: Path, repository: str, card: Path | None) -> dict[str, Path]:
    """Lay a run out as it will lie in the repository, with its card written for that place.

    Args:
        run: The run.
        place: An empty folder; large files are linked into it, not copied.
        repository: Hub id of the repository, for the lines that show how to load it.
        card: The card that the repository has; its hand-written parts stay. Without one, the run's own is taken.

    Returns:
        Name in the repository -> file.

    Raises:
        OutputError: If the card that is there has no readable header, or markers that do not pair.
    """
    for name, file in run.files.items():
        (place / name).parent.mkdir(exist_ok=True)
        if name not in (CARD, RECORD, ADAPTER_CONFIG):
            (place / name).symlink_to(file.resolve())
    text = json.dumps(dataclasses.asdict(run.record), indent=1, allow_nan=False) + "\n"
    (place / RECORD).write_text(TOKEN.sub("hf_...", text))
    if ADAPTER_CONFIG in run.files:
        _write_adapter_config(run, place)
    own = card or run.files.get(CARD)
    if own is not None:
        shutil.copyfile(own, place / CARD)
    try:
        write_card(run.record, place, figures_of(place), repository=repository)
    except OutputError as error:
        where = f"{repository}/{CARD}" if card else str(run.files[CARD])
        raise OutputError(str(error).replace(str(place / CARD), where)) from error
    names = sorted({*run.files, CARD})
    return {name: place / name for name in names}


def stale(present: list[str], pushed: dict[str, Path]) -> list[str]:
    """Return the files of a repository that a push must remove, so that nothing is loaded in place of what is pushed.

    Args:
        present: Names in the repository.
        pushed: Names that are written.

    Returns:
        Names, sorted.
    """
    return sorted(
        name for name in present if name not in pushed and any(_matches(name, pattern) for pattern in REPLACED)
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")


def _public(record: RunRecord) -> RunRecord:
    """Shorten folders of this machine in what is published."""
    suspect = {**record.suspect, "name": public(record.suspect.get("name") or "")}
    attack = record.attack
    if attack and isinstance(attack.get("trigger_file"), str):
        attack = {**attack, "trigger_file": public(attack["trigger_file"])}
    return dataclasses.replace(record, command=public(record.command, 10_000), suspect=suspect, attack=attack)


def _write_adapter_config(run: Run, place: Path) -> None:
    """Name the suspect as others find it, instead of the folder that it was loaded from."""
    try:
        config = json.loads(run.files[ADAPTER_CONFIG].read_text())
        config["base_model_name_or_path"] = hub_id(run.record)
    except (ValueError, TypeError) as error:
        raise DataError(f"{run.files[ADAPTER_CONFIG]}: expected the settings of an adapter, found {error}.") from error
    config["revision"] = run.record.suspect.get("revision") if hub_id(run.record) else None
    (place / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
