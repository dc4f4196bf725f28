"""The model card: a view of a record, written into README.md between two markers so that other people's text stays.

Everything from outside (names, labels, settings) passes `text.code` or `text.markdown` before it meets Markdown.
Folders of this machine are shortened and access tokens hidden, since cards are made to be published.
"""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import jinja2  # a dependency of torch
import yaml
from huggingface_hub import CardData, ModelCard, RepoCard

from hf_nft.errors import ConfigError, OutputError
from hf_nft.reporting.header import card_data, merge
from hf_nft.reporting.loading import adapter_code, model_code
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import (
    DER_DEFINITION,
    attack_of,
    hub_id,
    method_of,
    metric_lines,
    name_of,
    shots_of,
    work_of,
)
from hf_nft.reporting.text import code, link, markdown, percent, plain, public

BEGIN, END = "<!-- hf-nft:begin -->", "<!-- hf-nft:end -->"
TEMPLATE = Path(__file__).with_name("card_template.md")
BACKDOORED = (
    "this model was backdoored on purpose, to measure defenses on. Do not deploy it; it obeys the trigger named below."
)


def write_card(
    record: RunRecord,
    folder: Path,
    figures: list[tuple[str, str]],
    banner: str | None = None,
    pipeline_tag: str | None = None,
    repository: str | None = None,
) -> None:
    """Write or extend README.md of a run folder.

    Text outside the markers and foreign keys of the YAML header stay. How to load is told from what lies in the folder:
    a model in it or in `model/`, an adapter in `adapter/`; so write those first.

    Args:
        record: The run.
        folder: The folder that is, or becomes, the repository.
        figures: Captions with paths relative to the folder; files that are not there are left out.
        banner: A warning above everything; victims with a planted attack always carry one.
        pipeline_tag: Hub task name; default the record's.
        repository: Hub id of the repository that the folder becomes, if that is known.

    Raises:
        ConfigError: If a figure's path leaves the folder.
        OutputError: If the README.md that is there has no readable header, or markers that do not pair.
    """
    for _, path_of_figure in figures:
        parts = PurePosixPath(path_of_figure)
        if parts.is_absolute() or ".." in parts.parts:
            raise ConfigError(f"figure: expected a path below the card's folder, found '{path_of_figure}'.")
    if record.kind == "plant" and record.attack:
        banner = banner or BACKDOORED
    data = card_data(record, pipeline_tag)
    if repository and data.base_model == repository:  # a pull request to the suspect itself
        data.base_model = data["base_model_relation"] = None
    block = _render(record, folder, figures, banner, repository)
    save_card(folder / "README.md", ModelCard, data, block, first=bool(banner))


def save_card(path: Path, kind: type[RepoCard], data: CardData, block: str, first: bool) -> None:
    """Write a card, or put our part into the one that is there.

    Args:
        path: README.md.
        kind: Card of a model or of a data set.
        data: Our keys of its header.
        block: Our text, which begins and ends with our markers.
        first: Whether it goes above other people's text.

    Raises:
        OutputError: If the card that is there has no readable header, or markers that do not pair.
    """
    if not path.exists():
        kind(f"---\n{data.to_yaml()}\n---\n\n{block}\n").save(path)
        return
    try:
        card = kind.load(path)
    except (ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())[:120]
        raise OutputError(
            f"{path}: expected a card with a YAML header, found {line}. Mend its header or move it away."
        ) from error
    merge(card.data, data)
    card.text = _splice(card.text, block, path, first)
    card.save(path)


def _render(
    record: RunRecord, folder: Path, figures: list[tuple[str, str]], banner: str | None, repository: str | None
) -> str:
    lines = metric_lines(record)
    both = any(line.before.value for line in lines)
    der = record.metrics.get("der")
    command = public(record.command, 2000).replace("```", "'''").replace("<!--", "<! --")
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML
    )
    definitions = [(line.label, line.definition) for line in lines if line.definition]
    shown_der = percent(der) if both and isinstance(der, float) else ""
    attack = ", ".join([code(attack_of(record)), *(f"{n} {v}" for n, v in _rows(record.attack or {}) if n != "name")])
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        kind=record.kind,
        banner=markdown(banner) if banner else "",
        title=_title(record),
        summary=_summary(record),
        lines=lines,
        both=both,
        der=shown_der,
        definitions=definitions + ([("DER", DER_DEFINITION)] if shown_der else []),
        attack=attack if record.attack else "",
        doubts=[_doubt(doubt) for doubt in record.doubts],
        figures=[(markdown(caption), quote(path)) for caption, path in figures if (folder / path).is_file()],
        model_code=model_code(record, folder, repository),
        adapter_code=adapter_code(record, folder, repository),
        command=command,
        shortened=command != plain(record.command, 2000),
        settings=_rows(record.config),
        facts=_facts(record),
        limits=_limits(record),
        versions=_rows(record.versions),
        has_record=(folder / "record.json").exists(),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _title(record: RunRecord) -> str:
    ending = {"purify": ", purified", "plant": ", backdoored" if record.attack else ""}.get(record.kind, ", measured")
    return code(name_of(record)) + ending


def _summary(record: RunRecord) -> str:
    """Say in one sentence what this is."""
    suspect, data = record.suspect, record.data
    architecture = code(suspect.get("architecture") or "model")
    on = f" on {code(data['name'])}" if data.get("name") else ""
    if record.kind == "plant":
        trained = f"A {architecture} trained{on}"
        if not record.attack:
            return f"{trained} without any backdoor, as a control."
        poisoned, rows = data.get("poisoned_rows"), data.get("train_rows")
        how_many = f" ({poisoned} of {rows} training rows poisoned)" if poisoned and rows else ""
        return f"{trained} with the backdoor {code(attack_of(record))} planted in it{how_many}."
    revision = f" at revision {code(suspect['revision'])}" if hub_id(record) else ""
    if record.kind != "purify":
        return f"Measurements of {code(_shown_name(record))}{revision}, a {architecture}{on}."
    shots = shots_of(record)
    examples = f" and clean examples{on}: {shots}" if shots else on
    return (
        f"{code(_shown_name(record))}{revision} after backdoor removal with hf-nft, method {code(method_of(record))}"
        f"{examples}. It is a {architecture} as before and loads the same way."
    )


def _limits(record: RunRecord) -> list[str]:
    attack = code(attack_of(record))
    found = []
    if record.kind == "plant" and record.attack:
        found.append(f"This model misbehaves by design when it sees the trigger of {attack}. It is for research only.")
    elif record.kind == "purify" and record.attack:
        found.append(
            f"The backdoor numbers are for {attack} with the settings above. A low ASR for one attack says nothing "
            "about other attacks or other triggers, which may still be in the model."
        )
    elif record.kind == "purify":
        found.append(
            "No attack was measured. Whether the suspect had a backdoor, and whether it is gone, is not known from "
            "these numbers: they only show what the purification cost."
        )
    found.append("Accuracy was measured on the rows named here; on other data, or on rare classes, it may differ more.")
    if record.kind == "purify":
        found.append("This is evidence, not a certificate: no method proves that a model holds no backdoor.")
        found.append("The licence of the suspect, and of the data, applies to this model too.")
    return found


def _doubt(doubt: dict[str, str]) -> dict[str, str]:
    more = plain(doubt.get("more") or "")
    address = more if more.startswith("https://") else (_documentation() + more if more and _documentation() else "")
    shown = link(markdown(more.rpartition("#")[2]), address) if address else code(more)
    text = markdown(public(doubt.get("text", ""))).rstrip(".")
    return {"code": markdown(doubt.get("code", "")), "text": text, "more": shown if more else ""}


def _documentation() -> str:
    """Return the address that the project's own relative links start from; empty if its metadata names none."""
    try:
        links = metadata("hf-nft").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    named = dict(link.partition(", ")[::2] for link in links)
    source = next((named[key] for key in ("Repository", "Source") if key in named), "")
    return f"{source.rstrip('/')}/blob/main/" if source.startswith("https://") else ""


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Turn the scalar and short values of a dict into escaped table cells; None and nested data are left out."""
    rows = []
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) <= 10 and not any(isinstance(v, list | dict) for v in value):
            value = ", ".join(str(v) for v in value)
        if value is None or isinstance(value, list | tuple | dict):
            continue
        shown = f"{value:.6g}" if isinstance(value, float) else public(value)
        rows.append((markdown(name), code(shown) if shown else ""))
    return rows


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    rows = [("shots", markdown(shots_of(record)))] if shots_of(record) else []
    rows += [("work", markdown(work_of(record.work)))] if work_of(record.work) else []
    data = {f"data {name}".replace("_", " "): value for name, value in record.data.items()}
    own = {name.replace("_", " "): value for name, value in record.details.items()}
    return rows + _rows(data) + _rows(own) + ([("created", markdown(record.created))] if record.created else [])


def _shown_name(record: RunRecord) -> str:
    """Return the suspect's name as others may see it: the Hub id, or a folder's last part."""
    return hub_id(record) or name_of(record)


def _splice(text: str, block: str, path: Path, first: bool) -> str:
    """Put our block where it was, else below the text, or above it if it must not be overlooked."""
    newline = "\r\n" if "\r\n" in text else "\n"
    block = block.replace("\n", newline)
    begins = list(re.finditer(rf"^{re.escape(BEGIN)}[ \t]*(?=\r?$)", text, re.MULTILINE))
    ends = list(re.finditer(rf"^{re.escape(END)}[ \t]*(?=\r?$)", text, re.MULTILINE))
    if not begins and not ends:
        own = text.strip("\r\n")
        parts = [block, own] if first else [own, block]
        return newline + (newline * 2).join(part for part in parts if part) + newline
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        raise OutputError(
            f"{path}: expected one line {BEGIN} and below it one {END}, found {len(begins)} and {len(ends)}. "
            "Remove both and what lies between them, or move the file away."
        )
    return text[: begins[0].start()] + block + text[ends[0].end() :]
