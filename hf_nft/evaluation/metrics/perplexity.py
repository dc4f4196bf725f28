"""Perplexity: the exponential of the mean negative log-likelihood per token."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    """Perplexity of known answers; lower is better. `predictions` are negative log-likelihoods in nats, per token."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood per token",
            citation="",
            inputs_description="predictions: negative log-likelihoods in nats; references: anything, not read",
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, Any]:
        mean = float(np.mean(np.asarray(predictions, dtype=np.float64)))
        return {"perplexity": math.exp(min(mean, 700.0)), "total": len(predictions)}
