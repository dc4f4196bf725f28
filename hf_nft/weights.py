"""Which files hold a model's weights, and what their headers say; no weight is read.

Hub and disk are told apart here alone: a header is read from the file if it was fetched, else by a range request.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_nft.errors import SuspectError, UnsafeModelError
from hf_nft.hub import answers, first_line, patiently, safe_name
from hf_nft.intake import WEIGHT_INDEX, WEIGHTS, Source

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2} | {
    name: 1 for name in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
}
"""Bytes per element of the types that safetensors stores whole."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header describes it.

    Attributes:
        dtype: Type in safetensors' spelling, such as `BF16`.
        shape: Its shape.
        file: The file it lies in.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(source: Source, allow_pickle: bool = False) -> list[str]:
    """Find the files that hold a model's weights, as transformers chooses them.

    Args:
        source: A whole model, its small files fetched.
        allow_pickle: Whether a pickle file will do where there is no safetensors file.

    Returns:
        Names: one file, or the shards that the index names; with `allow_pickle` perhaps pickles.

    Raises:
        SuspectError: If there are no weights, or a shard is missing.
        UnsafeModelError: If there are only pickles and those are not allowed, or an index names one.
    """
    if WEIGHTS in source.files:
        return [WEIGHTS]
    if WEIGHT_INDEX in source.files:
        return _shards(source, WEIGHT_INDEX, (".safetensors", ".bin") if allow_pickle else (".safetensors",))
    if source.pickles and not allow_pickle:
        raise UnsafeModelError(
            f"{source.name}: expected weights in safetensors, found {source.pickles[0]}, a pickle file, which can run "
            f"code when it is loaded. Convert it elsewhere, or pass --allow-pickle to load it with restricted "
            f"unpickling."
        )
    if "pytorch_model.bin" in source.files:
        return ["pytorch_model.bin"]
    if "pytorch_model.bin.index.json" in source.files:
        return _shards(source, "pytorch_model.bin.index.json", (".safetensors", ".bin"))
    raise SuspectError(
        f"{source.name}: expected model weights ({WEIGHTS}, or *.safetensors that {WEIGHT_INDEX} names), found none. "
        f"Files: {', '.join(source.top[:5])}."
    )


def _shards(source: Source, index: str, endings: tuple[str, ...]) -> list[str]:
    names = sorted(set(weight_map(source, index).values()))
    for name in names:
        if not name.endswith(endings) or "/" in name or not safe_name(name):
            raise UnsafeModelError(
                f"{source.name}/{index}: expected it to name files *{endings[0]} beside it, found {name!r}. "
                f"Do not load it."
            )
        if name not in source.files:
            raise SuspectError(
                f"{source.name}: expected the shard {name} that {index} names, found none. Download the model again."
            )
    return names


def weight_map(source: Source, index: str = WEIGHT_INDEX) -> dict[str, str]:
    """Read which shard holds which weight.

    Args:
        source: A model in shards, its small files fetched.
        index: The index's name.

    Returns:
        Name of a weight -> name of a file.

    Raises:
        SuspectError: If the index is no such map.
    """
    found = source.read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise SuspectError(f"{source.name}/{index}: expected a map from weights to files, found none.")
    return found


def stored_tensors(source: Source, names: list[str]) -> dict[str, Stored]:
    """Read the headers of safetensors files and hold them against the files' sizes, each other and the index.

    Args:
        source: Where the model is.
        names: Its safetensors files, as `weight_files` tells.

    Returns:
        Name of a tensor -> what its header says.

    Raises:
        SuspectError: If a header is corrupt or lies about its size, a tensor is stored twice, or one that the index
            names is missing.
        NetworkError: If the Hub refuses or cannot be reached.
    """
    found: dict[str, Stored] = {}
    for name in names:
        local = source.folder is not None and (source.folder / name).is_file()
        header = _read_header(source.folder / name) if local and source.folder else _ask_header(source, name)
        for tensor, stored in header.items():
            if tensor in found:
                raise SuspectError(
                    f"{source.name}: expected every weight once, found '{tensor}' in {found[tensor].file} and {name}. "
                    f"Download the model again."
                )
            found[tensor] = stored
    if names != [WEIGHTS] and WEIGHT_INDEX in source.files:
        for tensor, name in weight_map(source).items():
            if tensor not in found or found[tensor].file != name:
                raise SuspectError(
                    f"{source.name}: expected '{tensor}' in {name} as the index says, found it missing there. "
                    f"Download the model again."
                )
    return found


def _read_header(file: Path) -> dict[str, Stored]:
    """From disk; the library itself checks sizes, offsets and shapes."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {n: Stored(s.get_dtype(), tuple(s.get_shape()), file.name) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise SuspectError(
            f"{file}: expected a safetensors file, found one that does not open ({first_line(error)}). "
            f"Download it again."
        ) from error


def _ask_header(source: Source, name: str) -> dict[str, Stored]:
    """By range requests, with the checks that the library would make on the file."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    with answers("model", source.name, SuspectError):
        try:
            api = HfApi(library_name="hf-nft")
            header = patiently(
                lambda: api.parse_safetensors_file_metadata(source.name, name, revision=source.revision, timeout=30)
            )
            return _checked_header(source, name, header.tensors)
        except (SafetensorsParsingError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _lies(source, name, first_line(error)) from error


def _checked_header(source: Source, name: str, tensors: dict[str, Any]) -> dict[str, Stored]:
    end = 0
    for tensor, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, stop = info.data_offsets
        size = BYTES.get(info.dtype)
        if start != end or stop < start or any(side < 0 for side in info.shape):
            raise _lies(source, name, f"'{tensor}' at bytes {start} to {stop} after {end}")
        if size is not None and math.prod(info.shape) * size != stop - start:
            raise _lies(source, name, f"'{tensor}' of shape {info.shape} in {stop - start} bytes")
        end = stop
    if end >= source.files[name]:
        raise _lies(source, name, f"{end} bytes of weights in a file of {source.files[name]}")
    return {n: Stored(str(info.dtype), tuple(info.shape), name) for n, info in tensors.items()}


def _lies(source: Source, name: str, found: str) -> SuspectError:
    return SuspectError(f"{source.name}/{name}: expected a safetensors file with a true header, found {found}.")
