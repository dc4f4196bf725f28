"""Bounds, penalty and inspection of the masks."""

from hf_nft.masks.inspect import LayerRow, difference, most_suppressed, summarize
from hf_nft.masks.penalties import l1_to_one, penalty_coefficient
from hf_nft.masks.schedules import SCHEDULES, active_bounds, depths, floors, lower_bound, project_

__all__ = [
    "SCHEDULES",
    "LayerRow",
    "active_bounds",
    "depths",
    "difference",
    "floors",
    "l1_to_one",
    "lower_bound",
    "most_suppressed",
    "penalty_coefficient",
    "project_",
    "summarize",
]
