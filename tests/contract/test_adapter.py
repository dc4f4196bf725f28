"""What every masked layer must do, for every layer type: one table crossed with shared checks.

References are written here from the definition z = m * (response without bias) + bias, without the package's code.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_nft.adapter import NFTConfig, get_nft_model, mask_layers, masks
from hf_nft.errors import ConfigError

pytestmark = pytest.mark.filterwarnings(
    # PEFT 0.21 probes this property of transformers 5.23 models and of nothing of ours
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)


class FrozenBatchNorm2d(nn.Module):
    """A detector's BatchNorm: all four tensors are buffers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(shape) + (self.bias - self.running_mean * scale).view(shape)


def channels(m: Tensor, dims: int) -> Tensor:
    """Masks along dimension 1 of a tensor."""
    return m.view(1, -1, *[1] * (dims - 2))


def scale_response(layer: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    """Channels in dimension 1: response without bias, scaled, plus bias."""
    bare = copy.deepcopy(layer)
    bias = bare.bias.detach().clone()
    nn.init.zeros_(bare.bias)
    y = bare(x)
    return y * channels(m, y.dim()) + channels(bias, y.dim())


def scale_last(layer: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    """Channels in the last dimension."""
    bare = copy.deepcopy(layer)
    bias = getattr(bare, "bias", None)
    kept = 0.0 if bias is None else bias.detach().clone()
    if bias is not None:
        nn.init.zeros_(bare.bias)
    return bare(x) * m + kept


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    reference: Callable[[nn.Module, Tensor, Tensor], Tensor]
    placement: str = "auto"


CASES = [
    Case("bn1d", lambda: nn.BatchNorm1d(6), (5, 6), scale_response),
    Case("bn2d", lambda: nn.BatchNorm2d(6), (2, 6, 3, 3), scale_response),
    Case("bn3d", lambda: nn.BatchNorm3d(6), (2, 6, 2, 2, 2), scale_response),
    Case("instance", lambda: nn.InstanceNorm2d(6, affine=True), (2, 6, 3, 3), scale_response),
    Case(
        "instance-stats", lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (2, 6, 5), scale_response
    ),
    Case("group", lambda: nn.GroupNorm(2, 6), (2, 6, 3, 3), scale_response),
    Case("frozen-bn", lambda: FrozenBatchNorm2d(6), (2, 6, 3, 3), scale_response),
    Case("layernorm", lambda: nn.LayerNorm(6), (2, 4, 6), scale_last),
    Case("rmsnorm", lambda: nn.RMSNorm(6), (2, 4, 6), scale_last),
    Case("llama-norm", lambda: LlamaRMSNorm(6), (2, 4, 6), scale_last),
    Case("t5-norm", lambda: T5LayerNorm(6), (2, 4, 6), scale_last),
    Case("gemma-norm", lambda: GemmaRMSNorm(6), (2, 4, 6), scale_last),
    Case("linear", lambda: nn.Linear(5, 6), (2, 4, 5), scale_last),
    Case("linear-nobias", lambda: nn.Linear(5, 6, bias=False), (4, 5), scale_last),
    Case("gpt2-conv1d", lambda: Conv1D(6, 5), (2, 4, 5), scale_last),
    Case("conv1d", lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 5), scale_response),
    Case("conv2d", lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5), scale_response),
    Case("conv3d", lambda: nn.Conv3d(2, 6, 2), (2, 2, 3, 3, 3), scale_response),
    Case("convT1d", lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), scale_response),
    Case("convT2d-groups", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 3, 3), scale_response),
    Case("convT3d", lambda: nn.ConvTranspose3d(2, 6, 2), (1, 2, 2, 2, 2), scale_response),
    Case("linear-input", lambda: nn.Linear(6, 5), (2, 4, 6), lambda f, x, m: f(x * m), "units"),
    Case("gpt2-conv1d-input", lambda: Conv1D(5, 6), (2, 4, 6), lambda f, x, m: f(x * m), "units"),
]
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 6e-2, torch.float16: 1e-2}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
stateful = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("bn2d", "instance-stats")], ids=lambda c: c.name
)


class Net(nn.Module):
    """One layer inside a plain model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor]:
    """A network in eval mode with random weights and statistics, and an input."""
    torch.manual_seed(0)
    layer = case.make()
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.is_floating_point():
            tensor.detach().uniform_(0.3, 1.2)
    return Net(layer).to(dtype).eval(), torch.randn(case.shape).to(dtype)


def wrap(net: nn.Module, case: Case, **settings: object) -> PeftModel:
    return get_nft_model(net, NFTConfig(placement=case.placement, target_modules=["layer"], **settings))


def randomize(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for mask in masks(model).values():
        mask.data.copy_(torch.rand(mask.shape, generator=generator))
    return {name: mask.detach().clone() for name, mask in masks(model).items()}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_masks_of_one_change_nothing(case: Case, dtype: torch.dtype) -> None:
    net, x = build(case, dtype)
    before = net(x)
    model = wrap(net, case)
    assert model(x).dtype == before.dtype
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(model(x), before)
    else:
        torch.testing.assert_close(model(x), before, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_forward_and_merge_match_the_definition(case: Case, dtype: torch.dtype) -> None:
    net, x = build(case, dtype)
    wide = copy.deepcopy(net.layer).double()
    model = wrap(net, case)
    (m,) = randomize(model).values()
    expected = case.reference(wide, x.double(), m.double()).detach()
    tolerance = {"atol": DTYPES[dtype], "rtol": DTYPES[dtype]}
    torch.testing.assert_close(model(x).double(), expected, **tolerance)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(case.make())
    assert all(t.dtype == dtype for t in merged.state_dict().values() if t.is_floating_point())
    torch.testing.assert_close(merged(x).double(), expected, **tolerance)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@every_case
def test_gradient_reaches_masks_only(case: Case, autocast: bool) -> None:
    net, x = build(case)
    model = wrap(net, case).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (model(x).float() * torch.linspace(-1, 1, model(x).numel()).view(model(x).shape)).sum()
    loss.backward()
    (mask,) = masks(model).values()
    assert mask.dtype == torch.float32
    assert mask.grad is not None
    assert mask.grad.abs().min() > 0
    others = [p for p in model.parameters() if p is not mask]
    assert not any(p.requires_grad or p.grad is not None for p in others)


def test_masks_of_a_group_norm_learn_from_images_in_any_layout() -> None:
    # torch 2.13 crashes here with channels last on a CPU, where what enters the norm needs no gradient
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = get_nft_model(nn.Sequential(nn.GroupNorm(8, 32)), NFTConfig(target_modules=["0"]))
        x = torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
        model(x).pow(3).mean().backward()
        gradients.append(masks(model)["0"].grad)
    assert gradients[0].abs().min() > 0
    assert torch.allclose(*gradients, atol=1e-6)


@every_case
def test_masks_stay_fp32_on_half_precision_bases(case: Case) -> None:
    net, x = build(case, torch.bfloat16)
    model = wrap(net, case)
    model(x).float().sum().backward()
    (mask,) = masks(model).values()
    assert (mask.dtype, mask.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("linear", "conv2d", "gpt2-conv1d", "linear-input")], ids=lambda c: c.name
)
def test_training_forward_never_builds_a_masked_weight(case: Case) -> None:
    net, x = build(case)
    model = wrap(net, case)
    weight = net.layer.get_base_layer().weight
    products: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and "mul." in str(func):
                products.append(tuple(out.shape))
            return out

    with Watch():
        model(torch.cat([x] * 7)).sum().backward()
    assert products  # the masks did multiply something
    assert tuple(weight.shape) not in products
    assert weight.grad is None


@every_case
def test_mask_bias_silences_the_unit(case: Case) -> None:
    net, x = build(case)
    model = wrap(net, case, mask_bias=True)
    (mask,) = masks(model).values()
    mask.data.zero_()
    base_bias = getattr(net.layer.get_base_layer(), "bias", None)
    out = model(x)
    if case.placement == "units":
        torch.testing.assert_close(out, base_bias.expand_as(out))
    else:
        assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(model.merge_and_unload()(x), out)


@every_case
def test_save_load_disable_and_unmerge(case: Case, tmp_path) -> None:  # type: ignore[no-untyped-def]
    net, x = build(case)
    pristine, before = copy.deepcopy(net), net(x)
    model = wrap(net, case).train()
    randomize(model)
    for _ in range(3):
        model(x * 2 + 1)
    model.eval()
    after = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
        model.train()
        model(x * 3)
        model.eval()
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), after)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path).eval()
    assert torch.equal(loaded(x), after)
    lean = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(lean(x), after)
    held = state(loaded)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), after, atol=1e-5, rtol=1e-5)
    loaded.unmerge_adapter()
    assert same(state(loaded), held)
    assert same(state(loaded.unload()), state(pristine))
    assert not torch.allclose(after, before)


@stateful
@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_statistics_belong_to_the_adapter(case: Case, momentum: float | None) -> None:
    if momentum is None and case.name != "bn2d":
        pytest.skip("torch's InstanceNorm has no cumulative average")
    net, x = build(case)
    net.layer.momentum = momentum
    original = state(net)
    model = wrap(net, case).train()
    model(x * 2 + 1)
    base = net.layer.get_base_layer()
    reference = copy.deepcopy(base)
    for name, value in original.items():
        getattr(reference, name.removeprefix("layer.")).data.copy_(value)
    reference.train()(x * 2 + 1)
    assert torch.equal(base.running_mean, original["layer.running_mean"])
    assert torch.equal(net.layer.running_mean, reference.running_mean)
    assert torch.equal(net.layer.nft_running_var["default"], reference.running_var)
    assert net.layer.nft_num_batches_tracked["default"] == reference.num_batches_tracked
    merged = model.merge_and_unload()
    assert torch.equal(merged.layer.running_var, reference.running_var)
    assert merged.layer.num_batches_tracked == reference.num_batches_tracked


@every_case
def test_two_adapters(case: Case) -> None:
    net, x = build(case)
    model = wrap(net, case)
    first = randomize(model, 1)
    one = model(x)
    model.add_adapter("other", NFTConfig(placement=case.placement, target_modules=["layer"]))
    assert torch.equal(model(x), one)
    model.set_adapter("other")
    (second,) = randomize(model, 2).values()
    torch.testing.assert_close(model(x), case.reference(net.layer.get_base_layer(), x, second), atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    assert torch.equal(model(x), one)
    assert torch.equal(masks(model)["layer"], first["layer"])
    model.delete_adapter("other")
    assert list(mask_layers(model, "other")) == []
    assert torch.equal(model(x), one)


def test_safe_merge_refuses_nan_and_changes_nothing() -> None:
    net, _ = build(CASES[1])
    model = wrap(net, CASES[1])
    held = state(net.layer.get_base_layer())
    masks(model)["layer"].data[2] = float("nan")
    with pytest.raises(ConfigError, match="non-finite weight"):
        model.merge_adapter(safe_merge=True)
    assert same(state(net.layer.get_base_layer()), held)
    assert not net.layer.merged


def test_safe_merge_refuses_what_the_stored_dtype_cannot_hold() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    model = get_nft_model(net, NFTConfig(target_modules=["1"]))
    model.get_submodule("base_model.model.1").running_var.fill_(1e5)
    with pytest.raises(ConfigError, match="non-finite running_var"):
        model.merge_adapter(safe_merge=True)
    assert net[1].get_base_layer().running_var.isfinite().all()


def test_tied_tensors_survive_a_merge() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    model = get_nft_model(shared, NFTConfig(target_modules=["1"]))
    randomize(model)
    x = torch.randn(3, 4)
    out, first = model(x), shared[0].weight.clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, first)
    torch.testing.assert_close(merged(x), out)


@pytest.mark.parametrize("train", [False, True], ids=["fast-path", "slow-path"])
@pytest.mark.parametrize("name", ["self_attn.out_proj", "linear2", "linear1", "norm1"])
def test_parents_that_read_the_weight_see_the_mask(name: str, train: bool) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).train(train)
    encoder.requires_grad_(False)  # torch picks another attention kernel for frozen weights
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = encoder(x)
        model = get_nft_model(encoder, NFTConfig(target_modules=[name]))
        assert torch.equal(model(x), before)
        randomize(model)
        masked = model(x)
        assert not torch.allclose(masked, before)
        model.merge_adapter()
        torch.testing.assert_close(model(x), masked, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():  # which unmerges, though a parent may only ever read the weight
            torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(model(x), masked, atol=1e-5, rtol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), masked, atol=1e-5, rtol=1e-5)


def test_multihead_attention_heads_by_hand() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)[0]
    q, k, v = (part.view(3, 4, 2).transpose(0, 1) for part in projected.chunk(3, -1))
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1) @ v
    mixed[2] = 0.0
    expected = F.linear(mixed.transpose(0, 1).reshape(3, 8), attention.out_proj.weight, attention.out_proj.bias)
    model = get_nft_model(attention)
    (mask,) = masks(model).values()
    assert mask.shape == (4,)
    mask.data[2] = 0.0
    torch.testing.assert_close(model(x, x, x)[0][0], expected, atol=1e-5, rtol=1e-5)


def test_recalibration_touches_the_adapter_only() -> None:
    net, x = build(CASES[1])
    model = wrap(net, CASES[1]).train()
    original = state(net.layer.get_base_layer())
    net.layer.reset_running_stats()
    net.layer.get_base_layer().momentum = None
    for batch in (x, x + 2):
        model(batch)
    torch.testing.assert_close(net.layer.running_mean, torch.cat([x, x + 2]).mean((0, 2, 3)))
    assert same(state(net.layer.get_base_layer()), original)


def test_norms_in_eval_mode_keep_their_statistics_while_the_masks_learn() -> None:
    net, x = build(CASES[1])
    model = wrap(net, CASES[1]).train()
    net.layer.eval()
    held = net.layer.running_mean.clone()
    model(x).square().sum().backward()
    assert torch.equal(net.layer.running_mean, held)
    assert masks(model)["layer"].grad.abs().min() > 0
