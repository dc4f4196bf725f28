"""Metrics as `evaluate` modules, one file each; `evaluate.load(path_of(name))` works offline.

Every proportion comes with the counts behind it and its 95 % Wilson interval.
"""

import importlib
import inspect
from pathlib import Path

import evaluate

from hf_nft.errors import UnknownNameError


def names() -> list[str]:
    """List the metric modules."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def path_of(name: str) -> str:
    """Return the file of a metric, for `evaluate.load`.

    Args:
        name: A name in `names()`.

    Returns:
        Its path.

    Raises:
        UnknownNameError: If there is no such metric.
    """
    if name not in names():
        raise UnknownNameError("metric", name, names())
    return str(Path(__file__).parent / f"{name}.py")


def load(name: str, config: str | None = None) -> evaluate.Metric:
    """Make a metric without copying its file, which `evaluate.load` would do.

    Args:
        name: A name in `names()`.
        config: Configuration name, such as `contains`.

    Returns:
        The metric, which keeps its rows in memory.

    Raises:
        UnknownNameError: If there is no such metric.
    """
    path_of(name)
    module = importlib.import_module(f"{__name__}.{name}")
    cls: type[evaluate.Metric] = next(
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, evaluate.Metric) and c.__module__ == module.__name__
    )
    metric: evaluate.Metric = cls(config_name=config or "default", keep_in_memory=True)
    return metric
