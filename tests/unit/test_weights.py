"""Which files hold the weights, and headers that lie; local files, as a stranger may have left them."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_nft.errors import HFNFTError, SuspectError, UnsafeModelError
from hf_nft.intake import locate
from hf_nft.suspect import load_suspect
from hf_nft.weights import Stored, stored_tensors, weight_files

INDEX = "model.safetensors.index.json"


def shard(folder: Path, **parts: list[str]) -> dict[str, str]:
    """Split a model's weights over files: `a=[names...]` makes a.safetensors; returns the map of the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / f"{name}.safetensors", metadata={"format": "pt"})
    placed = {key: f"{name}.safetensors" for name, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return placed


@pytest.fixture
def halves(suspect_folder: Path) -> tuple[list[str], list[str]]:
    names = sorted(load_file(suspect_folder / "model.safetensors"))
    return names[::2], names[1::2]


def headers(folder: Path) -> dict[str, Stored]:
    source = locate(str(folder))
    return stored_tensors(source, weight_files(source))


def test_one_file_and_shards_say_the_same(suspect_folder: Path, halves, image_model) -> None:
    whole = headers(suspect_folder)
    state = image_model.state_dict()
    assert {name: stored.shape for name, stored in whole.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert {stored.dtype for stored in whole.values()} == {"F32", "I64"}
    shard(suspect_folder, a=halves[0], b=halves[1])
    split = headers(suspect_folder)
    assert {n: (s.dtype, s.shape) for n, s in split.items()} == {n: (s.dtype, s.shape) for n, s in whole.items()}
    loaded = load_suspect(str(suspect_folder)).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_a_missing_shard(suspect_folder: Path, halves) -> None:
    shard(suspect_folder, a=halves[0], b=halves[1])
    (suspect_folder / "b.safetensors").unlink()
    with pytest.raises(SuspectError, match=r"expected the shard b\.safetensors"):
        load_suspect(str(suspect_folder))


def test_a_weight_in_two_shards(suspect_folder: Path, halves) -> None:
    shard(suspect_folder, a=halves[0], b=[*halves[1], halves[0][0]])
    with pytest.raises(SuspectError, match="expected every weight once, found"):
        load_suspect(str(suspect_folder))


def test_a_shard_without_what_the_index_says(suspect_folder: Path, halves) -> None:
    shard(suspect_folder, a=halves[0], b=halves[1])
    shutil.copy(suspect_folder / "a.safetensors", suspect_folder / "b.safetensors")
    with pytest.raises(SuspectError, match="expected"):
        load_suspect(str(suspect_folder))
    save_file({"x": torch.zeros(1)}, suspect_folder / "b.safetensors")
    with pytest.raises(SuspectError, match=r"in b\.safetensors as the index says, found it missing"):
        load_suspect(str(suspect_folder))


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/b.safetensors", "sub/b.safetensors", "..", "b.bin", "b"])
def test_an_index_that_leads_elsewhere(suspect_folder: Path, halves, name: str) -> None:
    placed = shard(suspect_folder, a=halves[0], b=halves[1])
    (suspect_folder.parent / "b.safetensors").write_bytes((suspect_folder / "b.safetensors").read_bytes())
    moved = {key: name if file == "b.safetensors" else file for key, file in placed.items()}
    (suspect_folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(UnsafeModelError, match="expected it to name files"):
        load_suspect(str(suspect_folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', "[" * 10**5])
def test_an_index_that_is_none(suspect_folder: Path, halves, text: str) -> None:
    shard(suspect_folder, a=halves[0], b=halves[1])
    (suspect_folder / INDEX).write_text(text)
    with pytest.raises(SuspectError, match=r"index\.json.*expected"):
        load_suspect(str(suspect_folder))


def rewritten(content: bytes, **changes: object) -> bytes:
    """A safetensors file whose header says something else about its first tensor."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first].update(changes)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda b: rewritten(b, shape=[10**6, 10**6]), id="shape"),
        pytest.param(lambda b: rewritten(b, shape=[-1]), id="negative shape"),
        pytest.param(lambda b: rewritten(b, data_offsets=[0, 10**12]), id="offsets"),
        pytest.param(lambda b: rewritten(b, data_offsets=[8, 4]), id="offsets turned round"),
        pytest.param(lambda b: rewritten(b, dtype="F16"), id="type"),
        pytest.param(lambda b: rewritten(b, dtype="X9"), id="unknown type"),
        pytest.param(lambda b: struct.pack("<Q", 2**62) + b[8:], id="length of header"),
        pytest.param(lambda b: b + b"\0" * 64, id="more than the header says"),
    ],
)
def test_a_header_that_lies(suspect_folder: Path, lie) -> None:
    file = suspect_folder / "model.safetensors"
    file.write_bytes(lie(file.read_bytes()))
    with pytest.raises(SuspectError, match=r"model\.safetensors: expected a safetensors file"):
        load_suspect(str(suspect_folder))


def test_other_safetensors_are_no_weights(suspect_folder: Path) -> None:
    (suspect_folder / "model.safetensors").rename(suspect_folder / "other.safetensors")
    with pytest.raises(HFNFTError, match=r"expected model weights.*Files: .*other\.safetensors"):
        load_suspect(str(suspect_folder))
