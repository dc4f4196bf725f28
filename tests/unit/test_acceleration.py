"""Attention that is trained on a CPU in bf16: plain up to a length, the same numbers either way."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_nft.acceleration import SHORT, PlainShortAttention

FUSED, PLAIN = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"


def kernels(length: int, dtype: torch.dtype, autocast: bool = False, grad: bool = True) -> set[str]:
    query = torch.randn(1, 2, length, 8, dtype=dtype, requires_grad=grad)
    with (
        profile(activities=[ProfilerActivity.CPU]) as found,
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        PlainShortAttention(),
    ):
        F.scaled_dot_product_attention(query, query, value=query)
    return {event.key for event in found.key_averages()} & {FUSED, PLAIN}


@pytest.mark.parametrize(
    ("length", "dtype", "autocast", "grad", "expected"),
    [
        (SHORT, torch.bfloat16, False, True, PLAIN),
        (SHORT, torch.float32, True, True, PLAIN),
        (SHORT + 1, torch.bfloat16, False, True, FUSED),
        (SHORT, torch.float32, False, True, FUSED),
        (SHORT, torch.bfloat16, False, False, FUSED),
    ],
    ids=["bf16", "autocast", "long", "fp32", "no-gradient"],
)
def test_only_short_attention_trained_in_bf16_is_plain(
    length: int, dtype: torch.dtype, autocast: bool, grad: bool, expected: str
) -> None:
    assert kernels(length, dtype, autocast, grad) == {expected}


def test_plain_attention_gives_the_formulas_values_and_gradients() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with PlainShortAttention():
        F.scaled_dot_product_attention(*tensors, is_causal=True).float().square().sum().backward()
    query, key, value = wide = [t.detach().double().requires_grad_() for t in tensors]
    scores = (query @ key.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    (scores.softmax(-1) @ value).square().sum().backward()
    for narrow, exact in zip(tensors, wide, strict=True):
        assert narrow.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(narrow.grad.double(), exact.grad, atol=0.05, rtol=0.05)
