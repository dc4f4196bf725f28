"""Attention heads and MLP hidden units of transformers: which linear layer reads them, and how many there are.

Both are masked where they are read: one mask per head on the input of the attention's output projection, one per
hidden unit on the input of the MLP's second projection. That holds for grouped-query attention and gated MLPs alike.
Sites are found by the names and shapes of sibling layers, as they are in memory in transformers 5.23 and in torch.

Source: defenses.md 1.10.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_QUERY = frozenset(
    (
        "q_proj query q q_lin c_attn q_attn qkv qkv_proj query_key_value Wqkv to_q q_b_proj in_proj query_proj W_pack"
    ).split()
)
_ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "o", "Wo", "wo", "proj", "to_out", "output_proj")
_UP = (
    "up_proj gate_proj gate_up_proj fc1 c_fc wi wi_0 Wi dense_h_to_4h lin1 linear1 w1 w12 weights_in fc_in "
    "intermediate_dense ffn pwconv1 dense1"
).split()
_DOWN = (
    "down_proj fc2 c_proj wo Wo dense_4h_to_h lin2 linear2 w2 w3 weights_out fc_out "
    "output_dense ffn_output pwconv2 dense2"
).split()
_HEAD_COUNTS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "heads")
_HEAD_SIZES = ("v_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")


def unit_sites(model: nn.Module) -> dict[str, int]:
    """Find the linear layers that read attention heads or MLP hidden units.

    Args:
        model: Any model.

    Returns:
        Module name -> number of heads or hidden units on its input, in no particular order.
    """
    sites: dict[str, int] = {}
    for name, module in model.named_modules():
        for child, units in (*_attention(module), *_mlp(module)):
            sites[f"{name}.{child}" if name else child] = units
    return sites


def _base(module: object) -> nn.Module | None:
    """The module behind a tuner's wrapper, if it is linear."""
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, nn.Linear | Conv1D) else None


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """A linear descendant by relative path."""
    found: object = module
    for part in path.split("."):
        found = found._modules.get(part) if isinstance(found, nn.Module) else None
    return _base(found)


def _features(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear or Conv1D."""
    weight = linear._parameters["weight"] if "weight" in linear._parameters else None
    if isinstance(weight, Tensor) and weight.dim() == 2:
        rows, columns = weight.shape
        return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
    return 0, 0


def _heads(attention: nn.Module, inputs: int) -> int | None:
    """Number of heads that make up `inputs` features, from what the attention module says about itself."""
    counts = [getattr(attention, name, None) for name in _HEAD_COUNTS]
    sizes = [getattr(attention, name, None) for name in _HEAD_SIZES]
    config = getattr(attention, "config", None)
    from_size = [inputs // size for size in sizes if isinstance(size, int) and 0 < size <= inputs and not inputs % size]
    value_size = getattr(attention, "v_head_dim", None)
    known = [n for n in counts if isinstance(n, int)]
    ordered = known + from_size if value_size is None else from_size + known
    configured = getattr(config, "num_attention_heads", None)  # last: a decoder may have another number
    candidates = [*ordered, configured]
    for count in candidates:
        if isinstance(count, int) and 0 < count <= inputs and inputs % count == 0:
            return count
    return None


def _attention(module: nn.Module) -> list[tuple[str, int]]:
    """The output projection of an attention module, or of one whose query layers sit one level below."""
    places: list[tuple[nn.Module, tuple[str, ...]]] = []
    if isinstance(module, nn.MultiheadAttention) or _QUERY & module._modules.keys():
        places.append((module, _ATTENTION_OUT))
    for child in module._modules.values():  # BERT: attention.self holds the query, attention.output.dense the output
        if child is not None and _QUERY & child._modules.keys():
            places.append((child, ("output.dense", "output")))
    for attention, paths in places:
        for path in paths:
            out = _child(module, path)
            units = _heads(attention, _features(out)[0]) if out is not None else None
            if units is not None:
                return [(path, units)]
    return []


def _mlp(module: nn.Module) -> list[tuple[str, int]]:
    """The second projection of an MLP whose first projection is a sibling with matching width."""
    pairs = [(up, down) for down in _DOWN for up in _UP] + [("intermediate.dense", "output.dense")]
    for up, down in pairs:
        first, second = _child(module, up), _child(module, down)
        if first is None or second is None or first is second:
            continue
        hidden, width = _features(second)[0], _features(first)[1]
        if hidden and width in (hidden, 2 * hidden):  # twice: gate and value stored in one layer
            return [(down, hidden)]
    return []
