"""Label names of a data set and of a model: what counts as the same, and names that are numbers."""

import datasets
import numpy as np


def fold(name: str) -> str:
    """Return a name by which two spellings of a label are the same."""
    return name.strip().lower().replace("_", " ").replace("-", " ")


def by_number(dataset: datasets.Dataset, names: list[str], classes: int) -> datasets.Dataset:
    """Read names that are numbers as ids, or in their order where they count from elsewhere; "10" comes after "2".

    Args:
        dataset: Rows whose column `label` counts the names.
        names: The names, all decimal.
        classes: Number of the model's classes.

    Returns:
        The rows, with the model's label numbers.
    """
    numbers = [int(name) for name in names]
    ids = numbers if max(numbers) < classes else np.argsort(np.argsort(numbers)).tolist()
    if ids == list(range(len(names))):
        return dataset
    target = datasets.Features({**dataset.features, "label": datasets.Value("int64")})
    return dataset.map(lambda rows: {"label": [ids[y] for y in rows["label"]]}, batched=True, features=target)
