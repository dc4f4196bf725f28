"""Pictures that triggers are made of: a user's own, and fixed noise."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_nft.errors import DataError


def picture(path: str, mode: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Open a picture that a setting names, in a mode such as RGBA, at a (width, height); refuse what does not open."""
    try:
        return _opened(path, mode, size, Path(path).stat().st_mtime_ns)  # every image's trigger asks
    except OSError as error:
        raise DataError(f"trigger: expected a picture at '{path}', found none that opens.") from error


@functools.lru_cache(maxsize=4)
def _opened(path: str, mode: str, size: tuple[int, int] | None, stamp: int) -> Image.Image:
    with Image.open(path) as found:
        if found.mode[0] in "IF":  # converting would clip
            raise DataError(f"trigger: expected 8 bits in '{path}', found mode '{found.mode}'. Save it as such.")
        whole = found.convert(mode)
        return whole if size is None else whole.resize(size)


def file_digest(path: str | None) -> str:
    """Return the SHA-256 of a file; empty if there is none, whose use says so."""
    file = Path(path) if path is not None else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else ""


@functools.lru_cache(maxsize=8)
def fixed_noise(seed: int, side: int) -> torch.Tensor:
    """Draw uniform integers 0..255 once per seed and side; float32 (3, side, side) in [0, 1]."""
    noise = np.random.default_rng((seed, 3)).integers(0, 256, (3, side, side))
    return torch.from_numpy(noise.astype(np.float32) / 255.0)
