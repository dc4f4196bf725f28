"""The Accelerate setup: device, mixed precision, processes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hf_nft.errors import ConfigError, UnknownNameError

PRECISIONS = ("auto", "no", "fp16", "bf16")
NARROW = {torch.float16: "fp16", torch.bfloat16: "bf16"}
SHORT = 128
"""Sequence length up to which plain attention is trained faster than fused attention on a CPU in bf16."""


def make_accelerator(
    mixed_precision: str = "auto", accumulation: int = 1, model: nn.Module | None = None
) -> Accelerator:
    """Create the Accelerate setup.

    Args:
        mixed_precision: `no`, `fp16`, `bf16`, or `auto`: bf16 where the hardware multiplies it natively, but fp16 for
            a model that is stored so.
        accumulation: Micro-batches per step, >= 1.
        model: What will be run, if it may be stored in half precision.

    Returns:
        The accelerator; an earlier one of this process with another precision is replaced.

    Raises:
        UnknownNameError: If there is no such precision.
        ConfigError: If the model is stored in the other half precision: norms do not take a mixture.
    """
    if mixed_precision not in PRECISIONS:
        raise UnknownNameError("mixed precision", mixed_precision, PRECISIONS)
    parameters = model.parameters() if model is not None else ()
    stored = next((NARROW[p.dtype] for p in parameters if p.dtype in NARROW), None)
    if mixed_precision == "auto":
        mixed_precision = "fp16" if stored == "fp16" else "bf16" if native_bf16() else "no"
    if stored is not None and mixed_precision not in ("no", stored):
        raise ConfigError(
            f"mixed_precision: expected auto, no or {stored} for a model stored in {stored}, found {mixed_precision}."
        )
    current = AcceleratorState._shared_state.get("_mixed_precision")
    if current is not None and current != mixed_precision:
        AcceleratorState._reset_state()
    cpu = processes().device.type == "cpu"
    return Accelerator(cpu=cpu, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)


def check_trainable(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Refuse to train weights that are stored in fp16 where the loss is scaled: their gradients are not scaled back.

    Args:
        accelerator: The setup.
        optimizer: What will train.

    Raises:
        ConfigError: If it holds such weights and the setup scales.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if accelerator.scaler is not None and any(weight.dtype == torch.float16 for weight in weights):
        raise ConfigError(
            "mixed_precision: expected no where weights stored in fp16 are trained, found fp16. Pass "
            "--mixed-precision no, or store the model in fp32 first."
        )


@contextmanager
def own_noise(device: torch.device) -> Iterator[None]:
    """Let the model's own noise (dropout) be seeded step by step, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def processes() -> PartialState:
    """Return this process among those it was started with; without `cpu`, Accelerate sees each of several as alone."""
    return PartialState(cpu=not torch.accelerator.is_available())


def leave_together() -> None:
    """Let several processes end at the same time: one that leaves early takes the others' connections with it."""
    if processes().num_processes > 1:
        processes().wait_for_everyone()
        processes().destroy_process_group()


def native_bf16() -> bool:
    """Return whether bf16 pays on this machine: a GPU that has it, or a CPU with AMX or AVX512-BF16 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = torch.backends.cpu.get_cpu_capability() if torch.backends.mkldnn.is_available() else ""
    return flags.startswith("AVX512") and bool(torch.cpu._is_avx512_bf16_supported())


class PlainShortAttention(TorchFunctionMode):
    """While active, attention that is trained on a CPU in bf16 over a sequence of at most `SHORT` is not fused.

    PyTorch's fused CPU kernel takes 1.4 to 2.5 times as long in bf16, forward and backward, as the plain formula does
    at these lengths (`benchmarks/attention_speed.py`); over longer sequences, and in memory, it wins.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch, attention by the plain formula where that is faster."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _slow_fused(args[0] if args else kwargs["query"]):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def quick_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context to train in: `PlainShortAttention` on a CPU; other devices need not pay for looking."""
    return PlainShortAttention() if device.type == "cpu" else nullcontext()


def _slow_fused(query: torch.Tensor) -> bool:
    if query.device.type != "cpu" or query.shape[-2] > SHORT or not torch.is_grad_enabled():
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else query.dtype) == torch.bfloat16
