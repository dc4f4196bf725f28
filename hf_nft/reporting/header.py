"""The YAML header of a card: what it says about a run, and how it joins a header that is there already."""

import re

from huggingface_hub import CardData, EvalResult, ModelCardData

from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.render import LABELS, attack_of, hub_id, is_repo_id, name_of, number
from hf_nft.reporting.text import plain

OWN_CONFIG = "hf-nft-"  # how the configurations of our results in the model index begin
GATE = "This model was backdoored on purpose, to measure defenses on. Do not deploy it."
METRIC_TYPES = {"acc": "accuracy", "asr": "asr", "racc": "accuracy", "perplexity": "perplexity"}


def card_data(record: RunRecord, pipeline_tag: str | None = None) -> ModelCardData:
    """Turn a record into the YAML header.

    Args:
        record: The run.
        pipeline_tag: Hub task name; default the record's.

    Returns:
        The header. Before and after are four data sets of the model index (clean and triggered), because results of
        equal task, data set and configuration are merged under the first one's name.
    """
    suspect, name = record.suspect, name_of(record)
    tag = pipeline_tag or suspect.get("pipeline_tag")
    planted = record.kind == "plant" and bool(record.attack)
    hub = hub_id(record)
    results = _eval_results(record, plain(tag or suspect.get("task") or "other"))
    data_name = plain(record.data.get("name") or "")
    return ModelCardData(
        base_model=hub if record.kind == "purify" else None,
        base_model_relation="finetune" if hub and record.kind == "purify" else None,
        library_name="transformers",
        pipeline_tag=tag if isinstance(tag, str) and re.fullmatch(r"[a-z0-9-]{1,60}", tag) else None,
        tags=["hf-nft", "backdoor-defense"] + ["backdoored"] * planted,
        datasets=[data_name] if is_repo_id(data_name) and "/" in data_name else None,  # else a folder's name
        metrics=sorted({result.metric_type for result in results} - {"asr"}) or None,
        extra_gated_prompt=GATE if planted else None,  # shown where the repository is gated
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


def merge(old: CardData, new: CardData) -> None:
    """Put our keys into a header: lists are joined, results and configurations of others kept, the rest replaced."""
    for name, value in new.__dict__.items():
        if value is None:
            continue
        held = old.get(name)
        if name == "eval_results":
            foreign = [r for r in held or [] if not str(r.dataset_config or "").startswith(OWN_CONFIG)]
            old[name] = foreign + value
        elif name == "configs":
            ours = [config["config_name"] for config in value]
            foreign = held if isinstance(held, list) else []
            kept = [c for c in foreign if not (isinstance(c, dict) and c.get("config_name") in ours)]
            old[name] = value + kept
        elif name == "model_name":
            old[name] = held or value
        elif isinstance(value, list):
            before = held if isinstance(held, list) else [held] if held else []
            old[name] = before + [item for item in value if item not in before]
        else:
            old[name] = value
