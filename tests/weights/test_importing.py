"""Reading pretrained folders: totality, sharding, and what is told about weights that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.weights.small import FUSED_SMALL, SMALL, TWO, Small
from vlpjax.errors import UserError
from vlpjax.mesh import make_layout
from vlpjax.models.towers import Towers
from vlpjax.rules import tree_names
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.family import initial_variables
from vlpjax.weights.importing import family_for, read_variables
from vlpjax.weights.opening import open_weights

pytestmark = pytest.mark.usefixtures("small_families")


def assert_equal(found, expected):
    assert tree_names(found) == tree_names(expected)
    for name, one, other in zip(
        tree_names(found), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)


@pytest.fixture(scope="module")
def saved():
    """A small model with a value in every parameter that stands for its place."""
    model = Small(width=16, heads=8, depth=3)
    variables = initial_variables(SMALL, model)
    leaves = jax.tree.leaves(variables)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [
        np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
        for start, leaf in zip(starts, leaves, strict=False)
    ]
    return model, jax.tree.unflatten(jax.tree.structure(variables), numbers)


@pytest.fixture
def folder(saved, tmp_path):
    save_pretrained(*saved, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_what_was_written_is_read(saved, folder):
    model, variables = from_pretrained(folder)
    assert model == saved[0]
    assert_equal(variables, saved[1])
    assert {leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(variables)} == {True}


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "tensor": 2}]
)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", [SMALL, FUSED_SMALL])
def test_devices_read_their_own_slices_and_no_more(tmp_path, sizes, scan, family):
    model = Small(width=32, heads=8, depth=3, scan=scan)
    variables = initial_variables(family, model)
    save_pretrained(model, variables, tmp_path / "model", family=family.name)
    layout = make_layout(sizes)
    opened = open_weights(tmp_path / "model")
    read = read_variables(family, model, opened, layout)
    assert_equal(read, variables)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(variables))
    # Every byte is needed by somebody.  What nobody shares is read once, whatever the number of devices.
    assert size <= opened.tensors.bytes_read <= 1.01 * size
    held = sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(read))
    assert held < 0.4 * size
    kernel = read["params"]["blocks" if scan else "block_0"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated


def test_a_device_alone_reads_its_share(saved, folder):
    """One process of several calls back for its own shards only: its share is what they hold."""
    from vlpjax.weights.importing import read_part
    from vlpjax.weights.matching import match_tensors, members

    opened = open_weights(folder)
    pieces = match_tensors(SMALL, members(saved[1]), opened.tensors.shapes, {}, "it")
    piece = next(piece for piece in pieces if piece.member.name == "block_0/attention/query/kernel")
    part = read_part(opened.tensors, piece, (slice(0, 16), slice(3, 4), slice(0, 2)))
    np.testing.assert_array_equal(part, saved[1]["params"]["block_0"]["attention"]["query"]["kernel"][:, 3:4])
    assert opened.tensors.bytes_read == part.nbytes


def test_scanned_and_unrolled_models_share_a_file(saved, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scan": True}))
    model, variables = from_pretrained(folder)
    assert model.scan
    stacked = variables["params"]["blocks"]["mlp"]["up"]["kernel"]
    for layer in range(3):
        np.testing.assert_array_equal(
            stacked[layer], saved[1]["params"][f"block_{layer}"]["mlp"]["up"]["kernel"]
        )
    save_pretrained(model, variables, folder.parent / "back")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(folder.parent / "back/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_several_towers_read_each_under_its_name(tmp_path):
    model = Towers.of({"left": Small(), "right": Small(scan=True)})
    variables = initial_variables(TWO, model)
    save_pretrained(model, variables, tmp_path / "model")
    again, read = from_pretrained(tmp_path / "model")
    assert list(again) == ["left", "right"]
    assert_equal(read, variables)
    names = set(load_file(tmp_path / "model/model.safetensors"))
    assert {"l.layers.0.attn.q.weight", "r.layers.0.attn.qkv.weight"} <= names


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floating_types_become_float32(folder, saved, kind):
    rewrite(folder, lambda tensors: tensors.update({name: x.astype(kind) for name, x in tensors.items()}))
    _, variables = from_pretrained(folder)
    kernel = variables["params"]["block_1"]["mlp"]["up"]["kernel"]
    expected = saved[1]["params"]["block_1"]["mlp"]["up"]["kernel"].astype(kind).astype(np.float32)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, expected)


def test_variables_can_be_asked_for_in_bfloat16(folder):
    _, variables = from_pretrained(folder, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
    with pytest.raises(UserError, match="dtype is 'int8'; there are 'float32'"):
        from_pretrained(folder, dtype="int8")


def test_prefixes_of_wrappers_and_what_holds_nothing_are_passed_over(folder, saved):
    def wrap(tensors):
        for name in list(tensors):
            if name.startswith("layers"):
                tensors[f"model.{name}"] = tensors.pop(name)
        tensors["model.rotary.inv_freq"] = np.ones(3, np.float32)
        tensors["tied.weight"] = tensors["patch.bias"]

    rewrite(folder, wrap)
    assert_equal(from_pretrained(folder)[1], saved[1])


def test_a_copy_stands_in_for_the_tensor_that_it_repeats(folder, saved):
    rewrite(folder, lambda tensors: tensors.update({"tied.weight": tensors.pop("patch.bias")}))
    assert_equal(from_pretrained(folder)[1], saved[1])


def test_tied_tensors_that_differ_are_told(folder):
    rewrite(folder, lambda tensors: tensors.update({"tied.weight": tensors["patch.bias"] + 1}))
    with pytest.raises(UserError, match="ties 'tied.weight' to 'patch.bias', but their values differ"):
        from_pretrained(folder)


WRONG = {
    "a missing tensor": (
        lambda tensors: tensors.pop("layers.1.mlp.up.weight"),
        r"1 parameters get no tensor: block_1/mlp/up/kernel \(from layers.1.mlp.up.weight\)",
    ),
    "a surplus tensor": (
        lambda tensors: tensors.update({"layers.7.extra": np.ones(3, np.float32)}),
        "1 tensors belong to no parameter: layers.7.extra",
    ),
    "another shape": (
        lambda tensors: tensors.update({"norm.weight": np.ones(17, np.float32)}),
        r"'norm.weight' has shape \(17,\), but the parameter 'final_norm/scale' of shape \(16,\) needs \(16,\)",
    ),
    "another number of dimensions": (
        lambda tensors: tensors.update({"layers.0.mlp.up.weight": np.ones(512, np.float32)}),
        r"'layers.0.mlp.up.weight' has shape \(512,\), but .* needs \(32, 16\)",
    ),
    "a quantised tensor": (
        lambda tensors: tensors.update({"norm.weight": np.ones(16, np.int8)}),
        "'norm.weight' has the type int8, which is no floating-point type",
    ),
    "the same tensor with and without a prefix": (
        lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.float32)}),
        "both 'model.norm.weight' and 'norm.weight'|both 'norm.weight' and 'model.norm.weight'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit_are_told_in_one_sentence(folder, case):
    change, message = WRONG[case]
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        from_pretrained(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_all_that_does_not_fit_is_told_and_long_lists_are_cut(folder):
    rewrite(
        folder,
        lambda tensors: [
            tensors.update({name.replace("mlp", "ffn"): tensors.pop(name)})
            for name in list(tensors)
            if "mlp" in name
        ],
    )
    with pytest.raises(UserError) as caught:
        from_pretrained(folder)
    assert "18 parameters get no tensor: " in str(caught.value) and "and 8 more" in str(caught.value)
    assert "18 tensors belong to no parameter: " in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"width": 24},
            r"has shape .*16.*, but the parameter .* of shape .*24.* the weights and the config disagree",
        ),
        ({"depth": 4}, "parameters get no tensor: block_3/"),
        ({"depth": 2}, "tensors belong to no parameter: layers.2."),
        ({"head": 5}, r"1 parameters get no tensor: head \(from head.weight\)"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        (
            {"model_type": "smal"},
            "model_type is 'smal', which is no known architecture; did you mean 'small'.*there are small, ",
        ),
        (
            {"model_type": "whisper"},
            "'whisper', which is no known architecture.*there are small, small_fused, two",
        ),
    ],
)
def test_a_config_that_disagrees_is_told(folder, fields, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(UserError, match=message):
        from_pretrained(folder)


def test_a_folder_without_a_config_needs_a_family(folder, saved):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="does not say what its weights are"):
        from_pretrained(folder)
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_equal(from_pretrained(folder, family="small")[1], saved[1])
    with pytest.raises(
        UserError, match="no family 'smoll'; did you mean 'small'.*there are small, small_fused, two"
    ):
        from_pretrained(folder, family="smoll")
    assert family_for(open_weights(folder), "two") is TWO


def test_a_folder_with_nothing_to_read_is_told(tmp_path):
    with pytest.raises(UserError, match="There is no folder or file"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no weights"):
        from_pretrained(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.ones(1, np.float32)}, tmp_path / name)
    with pytest.raises(
        UserError, match="several files of weights .a.safetensors, b.safetensors. and no index"
    ):
        from_pretrained(tmp_path)
