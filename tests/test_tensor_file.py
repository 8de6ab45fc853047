"""Tensor files, held to the reader and the writer that everyone else uses."""

import hashlib
import json
import struct

import pytest
import safetensors.torch
import torch

from lit_gpt.errors import UserError
from lit_gpt.tensor_file import DTYPES, TensorFile, write_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    values = {f"t.{name}": (torch.randn(3, 5) * 50).to(dtype) for name, dtype in DTYPES.items()}
    return values | {"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4), "view": torch.randn(4, 6).T[::2]}


def test_others_read_what_we_write(tensors, tmp_path):
    counted = []
    digest = write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": "ü"}, counted.append)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest() and sum(counted) == len(content)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"} and set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype


def test_we_read_what_others_write(tensors, tmp_path):
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "a.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"} and set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file[name], tensor) and file[name].dtype == tensor.dtype


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 3) + b"\xff\xff\xff",
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(7),
        header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(a=[1, 2]) + bytes(8),
        header(__metadata__=[1]),
        header(__metadata__={"format": 1}),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_what_is_no_such_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file") as error:
        TensorFile(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        TensorFile(tmp_path / "absent.safetensors")
