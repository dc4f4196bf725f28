"""The model card: a view of a record, written into README.md between two markers so that other people's text stays.

Everything from outside (names, labels, settings) passes `render.code` or `render.markdown` before it meets Markdown.
Folders of this machine are shortened and access tokens hidden, since cards are made to be published.
"""

import importlib
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import jinja2  # a dependency of torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_nft import registry
from hf_nft.errors import ConfigError, OutputError, UnknownNameError
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import (
    DER_DEFINITION,
    LABELS,
    attack_of,
    code,
    markdown,
    method_of,
    metric_lines,
    number,
    percent,
    plain,
    shots_of,
    work_of,
)

BEGIN, END = "<!-- hf-nft:begin -->", "<!-- hf-nft:end -->"
TEMPLATE = Path(__file__).with_name("card_template.md")
BACKDOORED = "this model was backdoored on purpose, to measure defenses on. Do not deploy it."
OWN_CONFIG = "hf-nft-"  # how the configurations of our results in the model index begin
METRIC_TYPES = {"acc": "accuracy", "asr": "asr", "racc": "accuracy", "perplexity": "perplexity"}
LOCAL_PATH = re.compile(r"(^|(?<=[\s=,'\"\[(]))(?:file://)?(?:~[^\s/,'\"\])]*|[A-Za-z]:)?[/\\][^\s,'\"\])]*")

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def write_card(
    record: RunRecord,
    folder: Path,
    figures: list[tuple[str, str]],
    banner: str | None = None,
    pipeline_tag: str | None = None,
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
    block = _render(record, folder, figures, banner)
    path = folder / "README.md"
    if not path.exists():
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{block}\n").save(path)
        return
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())[:120]
        raise OutputError(
            f"{path}: expected a model card with a YAML header, found {line}. Mend its header or move it away."
        ) from error
    _merge(card.data, data)
    card.text = _splice(card.text, block, path, first=bool(banner))
    card.save(path)


def card_data(record: RunRecord, pipeline_tag: str | None = None) -> ModelCardData:
    """Turn a record into the YAML header.

    Args:
        record: The run.
        pipeline_tag: Hub task name; default the record's.

    Returns:
        The header. Before and after are four data sets of the model index (clean and triggered), because results of
        equal task, data set and configuration are merged under the first one's name.
    """
    suspect, name = record.suspect, _name(record)
    tag = pipeline_tag or suspect.get("pipeline_tag")
    planted = record.kind == "plant" and bool(record.attack)
    hub = _hub_id(record)
    results = _eval_results(record, plain(tag or suspect.get("task") or "other"))
    data_name = plain(record.data.get("name") or "")
    return ModelCardData(
        base_model=hub if record.kind == "purify" else None,
        base_model_relation="finetune" if hub and record.kind == "purify" else None,
        library_name="transformers",
        pipeline_tag=plain(tag) if tag else None,
        tags=["hf-nft", "backdoor-defense"] + ["backdoored"] * planted,
        datasets=[data_name] if _is_repo_id(data_name) and "/" in data_name else None,  # else a folder's name
        metrics=sorted({result.metric_type for result in results} - {"asr"}) or None,
        model_name=name + {"purify": "-purified", "plant": "-backdoored" * planted}.get(record.kind, ""),
        eval_results=results or None,
    )


def _eval_results(record: RunRecord, task_type: str) -> list[EvalResult]:
    """List what was measured, as fractions; results of the suspect stand under a data set name that says so."""
    data = plain(record.data.get("name") or "unnamed data")
    attack = plain(attack_of(record))
    found = []
    for side in ("after", "before"):
        for name in record.metrics.get(side) or {}:
            value = number(record, side, name)
            if value is None:
                continue
            rows = f"triggered by {attack}" if name in ("asr", "racc") else "clean"
            note = ", suspect before purification" if side == "before" else ""
            config = "-".join(re.findall(r"[\w]+", f"{attack if name in ('asr', 'racc') else 'clean'} {side}"))
            found.append(
                EvalResult(
                    task_type=task_type,
                    dataset_type=data,
                    dataset_name=f"{data} ({rows}{note})",
                    dataset_config=OWN_CONFIG + config,
                    dataset_split=plain(record.data["split"]) if record.data.get("split") else None,
                    metric_type=METRIC_TYPES.get(name, plain(name)),
                    metric_name=LABELS.get(name, plain(name)) + (" before" if side == "before" else ""),
                    metric_value=value,
                )
            )
    return found


def _render(record: RunRecord, folder: Path, figures: list[tuple[str, str]], banner: str | None) -> str:
    lines = metric_lines(record)
    both = any(line.before.value for line in lines)
    der = record.metrics.get("der")
    command = _public(record.command, 2000).replace("```", "'''").replace("<!--", "<! --")
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
        model_code=_model_code(record, folder),
        adapter_code=_adapter_code(record, folder),
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
    return code(_name(record)) + ending


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
    revision = f" at revision {code(suspect['revision'])}" if _hub_id(record) else ""
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
    link = more if more.startswith("https://") else (_documentation() + more if more and _documentation() else "")
    shown = f"[{markdown(more.rpartition('#')[2])}](<{quote(link, safe=':/#?&=%')}>)" if link else code(more)
    text = markdown(_public(doubt.get("text", ""))).rstrip(".")
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
        shown = f"{value:.6g}" if isinstance(value, float) else _public(value)
        rows.append((markdown(name), code(shown) if shown else ""))
    return rows


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    rows = [("shots", markdown(shots_of(record)))] if shots_of(record) else []
    rows += [("work", markdown(work_of(record.work)))] if work_of(record.work) else []
    data = {f"data {name}".replace("_", " "): value for name, value in record.data.items()}
    own = {name.replace("_", " "): value for name, value in record.details.items()}
    return rows + _rows(data) + _rows(own) + ([("created", markdown(record.created))] if record.created else [])


def _model_code(record: RunRecord, folder: Path) -> str:
    place = next((p for p in ("", "model") if (folder / p / "config.json").exists()), None)
    loader = _auto_class(record)
    if place is None or loader is None:
        return ""
    own = _own_module(record)
    where = f', subfolder="{place}"' if place else ""
    lines = [f"from transformers import {loader}"]
    lines += [f"import {own}  # registers the architecture with transformers", ""] if own else [""]
    return "\n".join([*lines, f'model = {loader}.from_pretrained("REPOSITORY_OR_FOLDER"{where})'])


def _adapter_code(record: RunRecord, folder: Path) -> str:
    place = next((p for p in ("adapter", "") if (folder / p / "adapter_config.json").exists()), None)
    loader = _auto_class(record)
    if place is None or loader is None:
        return ""
    own, hub = _own_module(record), _hub_id(record)
    revision = record.suspect.get("revision")
    suspect = f'"{hub}", revision="{revision}"' if hub else '"THE_SUSPECT"'
    where = f', subfolder="{place}"' if place else ""
    imports = [
        f"from transformers import {loader}",
        "from peft import PeftModel",
        "import hf_nft.adapter  # makes NFT known",
    ]
    imports += [f"import {own}  # registers the architecture with transformers"] if own else []
    load = [
        f"suspect = {loader}.from_pretrained({suspect})",
        f'model = PeftModel.from_pretrained(suspect, "REPOSITORY_OR_FOLDER"{where})',
    ]
    return "\n".join([*imports, "", *load])


def _auto_class(record: RunRecord) -> str | None:
    try:
        found: str = registry.get("tasks", str(record.suspect.get("task"))).auto_class
    except UnknownNameError:
        return None
    return found


def _own_module(record: RunRecord) -> str | None:
    """Return the module of this package that registers the record's architecture; None if transformers has it."""
    for name in registry.names("models"):
        module = str(registry.get("models", name).__module__)
        if hasattr(importlib.import_module(module), str(record.suspect.get("architecture"))):
            return module
    return None


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) is not None and len(name) <= 96


def _hub_id(record: RunRecord) -> str | None:
    """Return the suspect's Hub id; None for a folder, which has no revision."""
    name, revision = str(record.suspect.get("name") or ""), str(record.suspect.get("revision") or "")
    return name if _is_repo_id(name) and re.fullmatch(r"[0-9A-Za-z._-]+", revision) else None


def _shown_name(record: RunRecord) -> str:
    """Return the suspect's name as others may see it: the Hub id, or a folder's last part."""
    return _hub_id(record) or _name(record)


def _name(record: RunRecord) -> str:
    name = plain(record.suspect.get("name") or "").replace("\\", "/").rstrip("/")
    return name.rpartition("/")[2].lstrip("~.") or "model"


def _public(value: object, limit: int = 300) -> str:
    """Return one line of text in which folders of this machine are shortened to their last part, tokens hidden."""

    def shorten(found: re.Match[str]) -> str:
        return ".../" + re.split(r"[/\\]", found.group().rstrip("/\\"))[-1]

    return TOKEN.sub("hf_...", LOCAL_PATH.sub(shorten, plain(value, limit)))


def _merge(old: ModelCardData, new: ModelCardData) -> None:
    """Put our keys into a header: lists are joined, results of other people kept, the rest replaced."""
    for name, value in new.__dict__.items():
        if value is None:
            continue
        held = old.get(name)
        if name == "eval_results":
            foreign = [r for r in held or [] if not str(r.dataset_config or "").startswith(OWN_CONFIG)]
            old[name] = foreign + value
        elif name == "model_name":
            old[name] = held or value
        elif isinstance(value, list):
            before = held if isinstance(held, list) else [held] if held else []
            old[name] = before + [item for item in value if item not in before]
        else:
            old[name] = value


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
