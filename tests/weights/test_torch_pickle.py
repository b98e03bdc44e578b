"""PyTorch's files against PyTorch itself, and files that would run something."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from tests.weights import real
from vlpjax.errors import UserError
from vlpjax.weights.torch_pickle import open_pickle


def states() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "matrix": base,
        "tied": base,
        "transposed": base.t(),
        "view": base[1:3, 2:],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_both_forms_hold_what_pytorch_put_there(tmp_path, zipped):
    file = tmp_path / "a.pth"
    given = states()
    torch.save(given, file, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(file) == zipped
    opened = open_pickle(file)
    assert list(opened.shapes) == list(given)
    for name, tensor in given.items():
        found = opened.read(name)
        assert (
            found.shape == tuple(tensor.shape) and opened.dtype(name).name == str(tensor.dtype).split(".")[1]
        )
        np.testing.assert_array_equal(found.astype(np.float64), tensor.detach().double().numpy())


def test_a_part_is_read_alone(tmp_path):
    file = tmp_path / "a.bin"
    torch.save(states(), file)
    opened = open_pickle(file)
    found = opened.read("transposed", (slice(2, 4), slice(1, 3)))
    np.testing.assert_array_equal(found, states()["transposed"][2:4, 1:3].numpy())
    assert opened.bytes_read == 16


@pytest.mark.parametrize("key", ["state_dict", "model", "weights"])
def test_what_training_scripts_put_around_it_is_taken_off(tmp_path, key):
    file = tmp_path / "a.pth"
    torch.save({key: states(), "epoch": 3, "args": argparse.Namespace(lr=1.0)}, file)
    assert list(open_pickle(file).shapes) == list(states())


def test_several_sets_of_tensors_are_not_chosen_from(tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"student": states(), "teacher": states()}, file)
    with pytest.raises(UserError, match=r"several dicts of tensors \(student, teacher\)"):
        open_pickle(file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(UserError, match="holds no dict of tensors"):
        open_pickle(file)


def test_an_index_joins_its_files(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    assert open_pickle(index).shapes == {"a": (2,), "b": (3,)}
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "c": "two.bin"}}))
    with pytest.raises(UserError, match="names the tensor 'c', which none of its files holds"):
        open_pickle(index)
    index.write_text(json.dumps({"weight_map": {"a": "three.bin"}}))
    with pytest.raises(UserError, match="'three.bin', which is not beside it"):
        open_pickle(index)


class Touch:
    """Its pickle makes a file when it is loaded by anything that trusts it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, zipped):
    trap = tmp_path / "trap"
    file = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2), "b": Touch(trap)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"names (posix|nt)\.mkdir, which is no part of a tensor"):
        open_pickle(file)
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "torch.hub.load", "numpy.load", "collections.Counter"]
)
def test_other_names_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    file = tmp_path / "a.pth"
    program = f"c{module}\n{attribute}\n.".encode()
    file.write_bytes(program)
    with pytest.raises(UserError, match=f"names {name}"):
        open_pickle(file)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off_is_told(tmp_path, zipped):
    file = tmp_path / "a.pth"
    torch.save({"a": torch.randn(300)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(UserError, match="a.pth is (cut off|damaged)"):
        open_pickle(file)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps(3), pickle.dumps({"a": 1}, protocol=2)])
def test_other_files_are_told(tmp_path, content):
    file = tmp_path / "a.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match="a.pth is (no|damaged)"):
        open_pickle(file)


def test_torchscript_is_told(tmp_path):
    file = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(UserError, match="TorchScript"):
        open_pickle(file)


def test_a_real_file_of_the_old_form():
    """EfficientNet-lite0 as its authors published it: every number equal to what PyTorch reads."""
    file = real.file("efficientnet_lite0")
    opened = open_pickle(file)
    expected = torch.load(file, weights_only=True)
    assert len(opened.shapes) == 296
    assert list(opened.shapes) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(opened.read(name), tensor.numpy())
