"""The comparison of weights that `hf-nft verify` stands on."""

import math

import torch

from hf_nft.workflows.verify_job import TOLERANCE, compare

ONES = torch.ones(2, 3)


def test_equal_weights_of_any_kind() -> None:
    weights = {"a": ONES, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3), "d": torch.zeros(0)}
    assert compare(weights, {name: value.clone() for name, value in weights.items()}) == (4, 4, 0.0, [])


def test_rounding_is_no_problem_and_more_is() -> None:
    for factor, problems in ((0.5, 0), (2.0, 1)):
        other = ONES.double().clone()
        other[0, 0] += factor * TOLERANCE
        tensors, equal, difference, found = compare({"a": ONES.double()}, {"a": other})
        assert (tensors, equal, len(found)) == (1, 0, problems)
        assert math.isclose(difference, factor * TOLERANCE, rel_tol=1e-6)


def test_what_cannot_be_compared_is_a_problem() -> None:
    assert compare({"a": ONES}, {"b": ONES})[3] == [
        "the weight a is in one of the models only",
        "the weight b is in one of the models only",
    ]
    assert "(3, 2), not torch.float32 (2, 3)" in compare({"a": ONES}, {"a": ONES.T})[3][0]
    assert "torch.float64" in compare({"a": ONES}, {"a": ONES.double()})[3][0]
    assert compare({"a": ONES}, {"a": ONES * math.nan})[3] == ["a differs by nan of its largest value"]


def test_many_problems_are_counted() -> None:
    found = compare({str(i): ONES for i in range(9)}, {str(i): ONES + 1 for i in range(9)})[3]
    assert found[-1] == "and 6 more"
