"""Label names of a data set and of a model: what counts as the same, and names that are numbers."""

import datasets
import numpy as np

from hf_nft.errors import DataError


def fold(name: str) -> str:
    """Return a name by which two spellings of a label are the same."""
    return name.strip().lower().replace("_", " ").replace("-", " ")


def by_number(dataset: datasets.Dataset, names: list[str], classes: int) -> datasets.Dataset:
    """Read names that are numbers as ids from 0 or from 1, or where all classes are there in their order; "10" > "2".

    Args:
        dataset: Rows whose column `label` counts the names.
        names: The names, all decimal.
        classes: Number of the model's classes.

    Returns:
        The rows, with the model's label numbers.

    Raises:
        DataError: If classes are missing and neither the first nor the last is there to tell where numbers begin.
    """
    numbers = [int(name) for name in names]
    if len(numbers) == classes:
        ids = np.argsort(np.argsort(numbers)).tolist()
    elif 0 in numbers and max(numbers) < classes:
        ids = numbers
    elif 0 not in numbers and max(numbers) == classes:
        ids = [number - 1 for number in numbers]
    else:
        raise DataError(
            f"labels: expected numbers from 0 or 1 for the model's {classes} classes, or one for each of them, found "
            f"{names[:5]}, which do not tell where they begin. Store labels as whole numbers from 0."
        )
    if ids == list(range(len(names))):
        return dataset
    target = datasets.Features({**dataset.features, "label": datasets.Value("int64")})
    return dataset.map(lambda rows: {"label": [ids[y] for y in rows["label"]]}, batched=True, features=target)
