"""Distillation's divergence, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from hf_nft.tasks._divergence import CHUNK, kl_to, soften


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, CHUNK), (2.5, CHUNK), (1.0, 100), (2.5, 1)])
def test_divergence_and_its_gradient_are_those_of_kl_div(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float, chunk: int
) -> None:
    """All rows at once, two of fifty classes at a time, and one where not even one fits."""
    monkeypatch.setattr("hf_nft.tasks._divergence.CHUNK", chunk)
    stream = torch.Generator().manual_seed(0)
    teacher = 5 * torch.randn(7, 50, generator=stream)
    student = (5 * torch.randn(7, 50, generator=stream)).to(dtype).requires_grad_()
    weights = torch.rand(7, generator=stream)
    found = kl_to(soften(teacher, temperature), student, temperature)
    (slope,) = torch.autograd.grad((found * weights).sum(), student)
    said, taught = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
    expected = F.kl_div(said, taught, reduction="none", log_target=True).sum(-1) * temperature**2
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    assert torch.allclose(found, expected, atol=1e-4)
    assert slope.dtype == dtype
    assert torch.allclose(slope.float(), wanted.float(), atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_half_precision_does_not_reach_the_divergence() -> None:
    teacher, student = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(0))
    plain = kl_to(soften(teacher, 2.0), student, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kl_to(soften(teacher, 2.0), student, 2.0)
    assert torch.equal(plain, mixed)
