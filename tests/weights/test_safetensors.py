"""The safetensors format against the library of that name, and files that are damaged."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vlpjax.errors import UserError
from vlpjax.weights.safetensors_files import NAMES, open_safetensors, write_safetensors

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(5, dtype=np.float16),
    "number": np.array(3.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
    "count": np.array([1, 2], np.int64),
    "bfloat": np.arange(6).astype(ml_dtypes.bfloat16),
}


def kinds(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def test_their_files_are_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file)
    opened = open_safetensors(file)
    assert set(opened.shapes) == set(TENSORS)
    for name, array in TENSORS.items():
        assert opened.dtype(name) == array.dtype
        np.testing.assert_array_equal(opened.read(name), array)
    np.testing.assert_array_equal(opened.read("matrix", (slice(1, 2), slice(2, 4))), [[6.0, 7.0]])


def test_they_read_our_files(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, kinds(TENSORS), TENSORS.items())
    found = load_file(file)
    assert list(open_safetensors(file).shapes) == list(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")["__metadata__"] == {"format": "pt"}


def test_only_what_is_asked_for_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file)
    opened = open_safetensors(file)
    assert opened.bytes_read == 0
    opened.read("matrix", (slice(0, 2), slice(0, 1)))
    assert opened.bytes_read == 8


def test_every_type_that_is_written_is_read():
    assert {NAMES[np.dtype(kind)] for kind in (np.float32, np.float16, ml_dtypes.bfloat16)} == {
        "F32",
        "F16",
        "BF16",
    }


def damaged(tmp_path, change):
    file = tmp_path / "a.safetensors"
    save_file({"matrix": TENSORS["matrix"]}, file)
    file.write_bytes(change(file.read_bytes()))
    return file


def with_header(content, change):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"cut off: .* the tensor 'matrix' of shape \(3, 4\)"),
        (lambda content: content[:20], "cut off: it has 20 bytes, and its header"),
        (lambda content: content[:3], "no safetensors file"),
        (lambda content: b"\xff" * 64, "no safetensors file: its header would have"),
        (lambda content: content[:8] + b"x" * (len(content) - 8), "header is not JSON"),
        (
            lambda content: with_header(content, lambda header: header["matrix"].update(shape=[3, 5])),
            r"'matrix' of shape \(3, 5\) needs 60 bytes, and the header gives it those from 0 to 48",
        ),
        (
            lambda content: with_header(content, lambda header: header["matrix"].pop("shape")),
            "damaged: its header says nothing sensible of 'matrix'",
        ),
        (
            lambda content: with_header(content, lambda header: header["matrix"].update(dtype="Q7")),
            "'matrix' has the type Q7",
        ),
        (
            lambda content: with_header(
                content, lambda header: header["matrix"].update(data_offsets=[-48, 0])
            ),
            "needs 48 bytes, and the header gives it those from -48 to 0",
        ),
    ],
)
def test_a_damaged_file_is_told_before_anything_is_read(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        open_safetensors(damaged(tmp_path, change))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            "'two.safetensors', which is not beside it",
        ),
        ({"weight_map": {"z": "one.safetensors"}}, "one.safetensors holds the tensor 'z', but it does not"),
        ({"weight_map": {"a": "../one.safetensors"}}, "which is not beside it"),
        ({"weights": {}}, "no readable 'weight_map'"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_told(tmp_path, index, message):
    save_file({"a": TENSORS["half"], "b": TENSORS["half"]}, tmp_path / "one.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_safetensors(file)


def test_an_index_joins_its_files(tmp_path):
    save_file({"a": TENSORS["half"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["matrix"]}, tmp_path / "two.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    opened = open_safetensors(file)
    np.testing.assert_array_equal(opened.read("b"), TENSORS["matrix"])
    np.testing.assert_array_equal(opened.read("a"), TENSORS["half"])
