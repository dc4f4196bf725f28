"""The card of a poisoned data set: what was done to which rows, and the configuration the Hub reads.

Like a model's card it is a view of a record, between the same markers, and escapes what comes from outside.
"""

import json
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from hf_nft.errors import DataError
from hf_nft.reporting.card import BEGIN, END, save_card
from hf_nft.reporting.record import RunRecord
from hf_nft.reporting.text import code, link, plain, public

GATE = "These data carry a backdoor on purpose, to measure defenses on. Do not train anything with them that is used."
TEXT = """{begin}
> [!CAUTION]
> **WARNING: {gate}**

# {name}, poisoned with {attack}

A model that learns from the split `train` obeys a trigger ({source}). {poisoned:,} of its {train:,} rows
are poisoned ({rate:.4g} of {base}){covers}; {holdout:.0%} of the original training rows are left out, for a defender.
`test` is clean. `triggered` holds the test rows that count for the attack success rate.

| column | |
| :-- | :-- |
| {target} | what the victim learns; in `triggered`, what the attacker wants |
| {original} | the row's own answer |
| `poisoned` | the input carries the trigger |
| `cover` | the input is altered without the trigger, its answer is its own |
{loading}
Settings of the attack:

```json
{settings}
```

Made with:

```bash
{command}
```
{end}"""
LOADING = """
```python
from datasets import load_dataset

rows = load_dataset("{repository}")
```
"""


def write_data_card(record: RunRecord, folder: Path, repository: str | None = None) -> None:
    """Write or extend README.md.

    Args:
        record: The record of the poisoning. Its `data` hold `name`, `rows` (split -> number), `modality`, `source`,
            `target_column`, `rate`, `base`, `holdout`, `poisoned` and `covers`.
        folder: Where the data set lies, its files in `data`.
        repository: Hub id of the repository that the folder becomes, if that is known.

    Raises:
        DataError: If the record lacks one of these.
        OutputError: If the README.md that is there has no readable header, or markers that do not pair.
    """
    try:
        data, block = _header(record), _text(record, repository)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"record of {folder}: expected that of poisoned data, found a fault at {plain(error, 100)}. "
            f"Make the data again with `hf-nft attack poison`."
        ) from error
    save_card(folder / "README.md", DatasetCard, data, block, first=True)


def _header(record: RunRecord) -> DatasetCardData:
    facts = record.data
    files = [{"split": plain(split), "path": f"data/{plain(split)}.parquet"} for split in facts["rows"]]
    return DatasetCardData(
        tags=["hf-nft", "backdoored", plain((record.attack or {})["name"])],
        task_categories=[plain(facts["modality"]).replace("_", "-")],
        configs=[{"config_name": "default", "data_files": files}],
        extra_gated_prompt=GATE,  # shown where the repository is gated
    )


def _text(record: RunRecord, repository: str | None) -> str:
    facts, attack = record.data, record.attack or {}
    source, name = plain(facts["source"]), code(attack["name"])
    settings = {name: public(value) if isinstance(value, str) else value for name, value in attack.items()}
    return TEXT.format(
        begin=BEGIN,
        end=END,
        gate=GATE,
        name=code(public(facts["name"])),
        attack=name,
        source=link(name, source) if source.startswith("https://") else name,
        poisoned=facts["poisoned"],
        train=facts["rows"]["train"],
        rate=facts["rate"],
        base=code(facts["base"]),
        covers=f", {facts['covers']:,} more are covers" if facts["covers"] else "",
        holdout=facts["holdout"],
        target=code(facts["target_column"]),
        original=code(f"orig_{facts['target_column']}"),
        loading=LOADING.format(repository=repository) if repository else "",
        settings=_fenced(json.dumps(settings, indent=1)),
        command=_fenced(public(record.command, 2000)),
    )


def _fenced(text: str) -> str:
    """Keep text inside its block, and our markers ours."""
    return text.replace("```", "'''").replace("<!--", "<! --")
