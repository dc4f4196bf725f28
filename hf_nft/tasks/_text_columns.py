"""Which columns of a data set of texts hold prompt and response."""

from collections.abc import Mapping

import datasets

from hf_nft.errors import DataError

PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("instruction", "response"))
"""Names by which prompt and response are recognised."""


def text_columns(names: list[str], chosen: Mapping[str, str]) -> dict[str, str | None]:
    """Return the stored names of prompt (None: there is none) and response."""
    if "response" in chosen:
        return {"prompt": chosen.get("prompt"), "response": chosen["response"]}
    pairs = [pair for pair in PAIRS if pair[1] in names and chosen.get("prompt", pair[0]) in names]
    # an instruction with an "input" beside it is only half of the prompt
    whole = "prompt" in chosen or not {"instruction", "input"} <= set(names)
    if PAIRS[0] in pairs or (whole and len({pair[1] for pair in pairs}) == 1):
        return {"prompt": chosen.get("prompt", pairs[0][0]), "response": pairs[0][1]}
    if not chosen and not pairs and "text" in names:
        return {"prompt": None, "response": "text"}
    raise DataError(
        f"columns: expected one pair among {', '.join('/'.join(pair) for pair in PAIRS)}, or 'text' alone, found "
        f"{names}. Name them with --column prompt=NAME --column response=NAME."
    )


def check_text(dataset: datasets.Dataset, role: str, name: str) -> None:
    """Raise a DataError unless a column is there and holds a text in every row."""
    kind = dataset.features.get(name, f"columns {dataset.column_names}")
    text = isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")
    if not text or any(value is None for value in dataset[name]):
        found = "rows without" if text else kind
        raise DataError(f"{role}: expected text in column '{name}', found {found}. Use another: --column {role}=NAME.")
