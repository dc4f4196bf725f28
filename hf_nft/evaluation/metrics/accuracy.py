"""Share of predictions that equal their references: ACC on clean rows, R-ACC on triggered rows."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_nft.evaluation.intervals import proportion


class Accuracy(evaluate.Metric):
    """Accuracy with counts and a Wilson interval; higher is better on clean and on triggered rows."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="share of predictions equal to their references",
            citation="",
            inputs_description="predictions, references: integers",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, Any]:
        hits = np.asarray(predictions) == np.asarray(references)
        return proportion("accuracy", int(hits.sum()), len(hits))
