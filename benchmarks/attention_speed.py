"""What attention costs while it is trained on a CPU in bf16: PyTorch's fused kernel beside the plain formula.

    python benchmarks/attention_speed.py --out benchmarks/results/attention_speed.json

Decides `hf_nft.acceleration.SHORT`, the length up to which the plain formula is used. The two are interleaved; seconds
are medians of forward and backward together.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _common import circumstances
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ((32, 4, 64, 64), (128, 3, 65, 64), (16, 12, 128, 64), (16, 12, 197, 64), (8, 12, 256, 64), (4, 12, 512, 64))
"""Rows, heads, tokens, width of a head."""
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def seconds(shape: tuple[int, ...], kernel: SDPBackend) -> float:
    """Time one forward and backward pass."""
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    with sdpa_kernel(kernel):
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    result = {**circumstances(), "shapes": []}
    print("| rows, heads, tokens, width | fused, s | plain, s |\n| :-- | --: | --: |")
    for shape in SHAPES:
        rounds = [{name: seconds(shape, kernel) for name, kernel in KERNELS.items()} for _ in range(options.rounds + 1)]
        found = {name: statistics.median(row[name] for row in rounds[1:]) for name in KERNELS}
        result["shapes"].append({"shape": shape, **found})
        print(f"| {', '.join(map(str, shape))} | {found['fused']:.3f} | {found['plain']:.3f} |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
