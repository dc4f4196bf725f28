"""The card of a poisoned data set: what was done to which rows, and the configuration the Hub reads."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_nft.attacks.base import Attack
from hf_nft.reporting.record import command_line

TEXT = """---
{header}
---

# {name}, poisoned with {attack}

**These data carry a backdoor on purpose, to measure defenses on. Do not train anything with them that will be used.**

A model that learns from the split `train` obeys a trigger ([{attack}]({source})). {poisoned:,} of its {train:,} rows
are poisoned ({rate:.4g} of {base}){covers}; {holdout:.0%} of the original training rows are left out, for a defender.
`test` is clean. `triggered` holds the test rows that count for the attack success rate.

| column | |
| :-- | :-- |
| `{target}` | what the victim learns; in `triggered`, what the attacker wants |
| `orig_{target}` | the row's own answer |
| `poisoned` | the input carries the trigger |
| `cover` | the input is altered without the trigger, its answer is its own |

Settings of the attack:

```json
{settings}
```

Made with:

```bash
{command}
```
"""


def write_data_card(folder: Path, name: str, attack: Attack, rows: dict[str, int], facts: dict[str, Any]) -> None:
    """Write README.md.

    Args:
        folder: Where the data set lies, its files in `data`.
        name: What the clean data set is called.
        attack: The attack.
        rows: Number of rows of each split.
        facts: `rate`, `base`, `holdout`, `poisoned`, `covers`.
    """
    files = [{"split": split, "path": f"data/{split}.parquet"} for split in rows]
    header = DatasetCardData(
        tags=["hf-nft", "backdoored", attack.name],
        task_categories=[attack.modality.replace("_", "-")],
        configs=[{"config_name": "default", "data_files": files}],
    )
    covers = f", {facts['covers']:,} more are covers" if facts["covers"] else ""
    text = TEXT.format(
        header=header.to_yaml(),
        name=name,
        attack=attack.name,
        source=attack.source,
        train=rows["train"],
        target=attack.target_column,
        settings=json.dumps(attack.settings(), indent=1),
        command=command_line(),
        **{**facts, "covers": covers},
    )
    DatasetCard(text).save(folder / "README.md")
