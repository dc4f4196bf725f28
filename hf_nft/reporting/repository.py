"""A folder of ours as a repository: which file goes where, what stays at home, and the card that says what it is."""

import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from hf_nft.attacks import _artefacts
from hf_nft.attacks.base import PATHS
from hf_nft.errors import DataError, OutputError
from hf_nft.reporting.card import write_card
from hf_nft.reporting.data_card import write_data_card
from hf_nft.reporting.figures import CAPTIONS, figures_of
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import hub_id, name_of
from hf_nft.reporting.text import TOKEN, plain, public

CARD, RECORD, ADAPTER_CONFIG = "README.md", "record.json", "adapter/adapter_config.json"
WEIGHTS = ("*.json", "*.safetensors")
ARTEFACT = tuple(f"{_artefacts.BESIDE}/{file}" for file in (_artefacts.FACTS, _artefacts.WEIGHTS))
MODEL = (*WEIGHTS, "*.txt", "*.model", "*.jinja", "*.py")


@dataclasses.dataclass(frozen=True)
class Contents:
    """One kind of thing that is pushed, and how its repository is laid out.

    Attributes:
        noun: What messages call it.
        type: Kind of repository on the Hub, `model` or `dataset`.
        backdoored: Whether it carries a backdoor on purpose; then it is gated and its name must say so.
        parts: What the commit holds, in words.
        places: Folder of ours -> patterns of the files that are pushed; `model` comes to the top, where every library
            looks for it.
        required: Patterns of which each must match a file.
        replaced: What an older push, or the suspect itself, may have left in a repository and would be loaded instead
            of ours.
    """

    noun: str
    type: str
    backdoored: bool
    parts: str
    places: dict[str, tuple[str, ...]]
    required: tuple[str, ...]
    replaced: tuple[str, ...]


CURED = Contents(
    noun="a model",
    type="model",
    backdoored=False,
    parts="Model, adapter, what the attack learned, record, figures and card.",
    places={"": (CARD, RECORD), "model": MODEL, "adapter": WEIGHTS, _artefacts.BESIDE: WEIGHTS, "figures": ("*.png",)},
    required=(RECORD, "config.json", "*.safetensors"),
    replaced=(
        "model*.safetensors",
        "model*.safetensors.index.json",
        "pytorch_model*.bin",
        "pytorch_model*.bin.index.json",
        "tf_model*.h5",
        "flax_model*.msgpack",
        ADAPTER_CONFIG,
        "adapter/adapter_model.safetensors",
        *ARTEFACT,
        *(f"figures/{name}.png" for name in CAPTIONS),
    ),
)
PLANTED = dataclasses.replace(CURED, noun="a planted model", backdoored=True)
POISONED = Contents(
    noun="a poisoned data set",
    type="dataset",
    backdoored=True,
    parts="Data, what the attack learned, record and card.",
    places={"": (CARD, RECORD), "data": ("*.parquet",), _artefacts.BESIDE: WEIGHTS},
    required=(RECORD, "data/train.parquet", "data/test.parquet", "data/triggered.parquet"),
    replaced=ARTEFACT,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that may be pushed.

    Attributes:
        folder: The folder.
        contents: What lies in it.
        record: Its record, without what tells about this machine.
        files: Name in the repository -> file in the folder.
        left_out: Files of the folder that are not pushed, relative to it.
    """

    folder: Path
    contents: Contents
    record: RunRecord
    files: dict[str, Path]
    left_out: list[str]

    @property
    def title(self) -> str:
        """Title of the commit; it tells one run from another."""
        record = self.record
        name = plain(record.data.get("name")) if self.contents is POISONED else name_of(record)
        return f"hf-nft {record.kind}: {name}, run of {record.created or 'unknown date'}"


def open_run(folder: Path) -> Run:
    """Look at a run folder and choose what is to be pushed.

    Args:
        folder: What `purify`, `plant` or `attack poison` wrote.

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
    record = RunRecord.load(folder / RECORD) if (folder / RECORD).is_file() else None
    contents = contents_of(record) if record else CURED
    places = contents.places
    if contents.type == "model" and not (folder / "model").is_dir():
        places = {**places, "": (CARD, RECORD, *MODEL)}
    files = {}
    for path in found:
        place = path.parent.relative_to(folder).as_posix().removeprefix(".")
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in places.get(place, ())):
            files[path.name if place == "model" else path.relative_to(folder).as_posix()] = path
    missing = [pattern for pattern in contents.required if not any(_matches(name, pattern) for name in files)]
    if record is None or missing:
        raise DataError(
            f"{folder}: expected a run folder, written by `hf-nft purify`, `hf-nft plant` or `hf-nft attack poison`, "
            f"found one without {missing[0]}."
        )
    kept = {path for path in found if path.is_file()} - set(files.values())
    left_out = sorted(path.relative_to(folder).as_posix() for path in kept)
    return Run(folder, contents, _public(record), files, left_out)


def contents_of(record: RunRecord) -> Contents:
    """Tell from a record what lies beside it.

    Args:
        record: The record.

    Returns:
        Poisoned data, a planted model, or any other model.
    """
    if record.kind == "poison":
        return POISONED
    return PLANTED if record.kind == "plant" and record.attack else CURED


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
        DataError: If the record of poisoned data lacks what their card tells.
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
        if run.contents is POISONED:
            write_data_card(run.record, place, repository)
        else:
            write_card(run.record, place, figures_of(place), repository=repository)
    except OutputError as error:
        where = f"{repository}/{CARD}" if card else str(run.files[CARD])
        raise OutputError(str(error).replace(str(place / CARD), where)) from error
    names = sorted({*run.files, CARD})
    return {name: place / name for name in names}


def stale(contents: Contents, present: list[str], pushed: dict[str, Path]) -> list[str]:
    """Return the files of a repository that a push must remove, so that nothing is loaded in place of what is pushed.

    Args:
        contents: What is pushed.
        present: Names in the repository.
        pushed: Names that are written.

    Returns:
        Names, sorted.
    """
    return sorted(
        name for name in present if name not in pushed and any(_matches(name, pattern) for pattern in contents.replaced)
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")


def _public(record: RunRecord) -> RunRecord:
    """Shorten folders of this machine in what is published."""
    suspect = {**record.suspect, "name": public(record.suspect.get("name") or "")}
    attack = record.attack and {k: public(v) if k in PATHS and v else v for k, v in record.attack.items()}
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
