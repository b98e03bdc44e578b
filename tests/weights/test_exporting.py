"""Writing pretrained folders: whole or not at all, in the form that others load."""

from __future__ import annotations

import json
import os

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from tests.weights.small import SMALL, Small
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.errors import UserError
from vlpjax.mesh import make_layout
from vlpjax.models.heads import Scalar
from vlpjax.weights import exporting, from_pretrained, save_pretrained
from vlpjax.weights.family import Family, boxed_shapes, initial_variables
from vlpjax.weights.layout import Rule

pytestmark = pytest.mark.usefixtures("small_families")


@pytest.fixture(scope="module")
def small():
    model = Small()
    return model, initial_variables(SMALL, model)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_says_what_it_holds(small, tmp_path):
    save_pretrained(*small, tmp_path / "a")
    assert names_in(tmp_path / "a") == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["architectures"] == ["SmallModel"] and config["model_type"] == "small"
    assert config["torch_dtype"] == "float32" and config["width"] == 16
    assert names_in(tmp_path) == ["a"]  # nothing is left beside it


def test_a_family_can_be_named(small, tmp_path):
    save_pretrained(*small, tmp_path / "a", family="small_fused")
    found = load_file(tmp_path / "a/model.safetensors")
    query = np.asarray(small[1]["params"]["block_1"]["attention"]["query"]["kernel"])
    assert found["layers.1.attn.qkv.weight"].shape == (48, 16)
    np.testing.assert_array_equal(found["layers.1.attn.qkv.weight"][:16], query.reshape(16, 16).T)
    _, again = from_pretrained(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, again, small[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_are_rounded_to_the_nearest(small, tmp_path, dtype):
    save_pretrained(*small, tmp_path / "a", dtype=dtype)
    found = load_file(tmp_path / "a/model.safetensors")["layers.0.mlp.up.weight"]
    own = np.asarray(small[1]["params"]["block_0"]["mlp"]["up"]["kernel"]).T
    np.testing.assert_array_equal(found, own.astype(dtype))
    bound = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]  # half a unit in the last place
    normal = np.abs(own) > np.finfo(np.float16).smallest_normal
    assert (np.abs(found.astype(np.float32) - own) <= bound * np.abs(own))[normal].all()
    assert json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == dtype


def test_bfloat16_weights_come_back_bit_for_bit(small, tmp_path):
    save_pretrained(*small, tmp_path / "a", dtype="bfloat16")
    model, variables = from_pretrained(tmp_path / "a")
    save_pretrained(model, variables, tmp_path / "b", dtype="bfloat16")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_large_models_become_several_files(small, tmp_path):
    save_pretrained(*small, tmp_path / "one")
    save_pretrained(*small, tmp_path / "many", max_shard_bytes=3000)
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [part.name for part in parts] == [
        f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)
    ]
    assert len(parts) > 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for part in parts:
        tensors = load_file(part)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 3000 or len(tensors) == 1
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == part.name
            np.testing.assert_array_equal(tensor, whole[name])
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path / "many")[1], small[1])


@pytest.mark.parametrize("scan", [False, True])
def test_sharded_variables_are_written_as_whole_ones(tmp_path, scan):
    model = Small(heads=8, depth=3, scan=scan)
    variables = initial_variables(SMALL, model)
    layout = make_layout({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(
        variables, {"params": layout.shard_parameters(boxed_shapes(SMALL, model)["params"])}
    )
    save_pretrained(model, variables, tmp_path / "whole")
    save_pretrained(model, placed, tmp_path / "sharded")
    whole, sharded = (tmp_path / name / "model.safetensors" for name in ("whole", "sharded"))
    assert whole.read_bytes() == sharded.read_bytes()


def test_tensors_are_gathered_one_at_a_time(small, tmp_path, monkeypatch):
    events = []
    gather, write = exporting._gather, exporting.write_safetensors

    def gathered(leaf, layer):
        events.append("gather")
        return gather(leaf, layer)

    def writing(file, kinds, arrays):
        def watched():
            for name, array in arrays:
                events.append(name)
                yield name, array

        write(file, kinds, watched())

    monkeypatch.setattr(exporting, "_gather", gathered)
    monkeypatch.setattr(exporting, "write_safetensors", writing)
    save_pretrained(*small, tmp_path / "a")
    assert set(events[::2]) == {"gather"} and "gather" not in events[1::2]


class Stop(Exception):
    pass


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_nothing_under_its_name(small, tmp_path, monkeypatch, there):
    if there:
        save_pretrained(*small, tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    gather, count = exporting._gather, iter(range(100))

    def stops(leaf, layer):
        if next(count) == 5:
            raise Stop
        return gather(leaf, layer)

    monkeypatch.setattr(exporting, "_gather", stops)
    with pytest.raises(Stop):
        save_pretrained(*small, tmp_path / "a", overwrite=there)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "a").exists() == there


def test_a_folder_has_its_name_only_when_it_is_complete(small, tmp_path, monkeypatch):
    """At every file operation from the first to the last, the name has everything under it or is not there."""
    seen = []
    rename = os.rename

    def watched(source, target):
        seen.append((tmp_path / "a").exists())
        rename(source, target)
        assert names_in(tmp_path / "a") == ["config.json", "model.safetensors"]

    monkeypatch.setattr(os, "rename", watched)
    save_pretrained(*small, tmp_path / "a")
    assert seen == [False]


def test_a_folder_that_is_there_stays_unless_told_otherwise(small, tmp_path):
    (tmp_path / "a").mkdir()
    save_pretrained(*small, tmp_path / "a")  # an empty folder is nobody's
    (tmp_path / "a/extra.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        save_pretrained(*small, tmp_path / "a")
    assert (tmp_path / "a/extra.txt").read_text() == "mine"
    save_pretrained(*small, tmp_path / "a", overwrite=True)
    assert names_in(tmp_path / "a") == ["config.json", "model.safetensors"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        save_pretrained(*small, tmp_path / "file")


def without(variables, *path):
    (*outer, last) = path
    copy = jax.tree.map(lambda leaf: leaf, variables)
    inner = copy
    for name in outer:
        inner = inner[name]
    del inner[last]
    return copy


def test_what_cannot_be_written_is_told_before_anything_is(small, tmp_path):
    model, variables = small
    wrong = {
        "No family can hold this Scalar .*small: a Scalar is not Small": (Scalar(1.0), variables, {}),
        "no family 'smal'; did you mean 'small'": (model, variables, {"family": "smal"}),
        "dtype is 'int8'": (model, variables, {"dtype": "int8"}),
        "they lack 'params/final_norm/scale'": (
            model,
            without(variables, "params", "final_norm", "scale"),
            {},
        ),
        "they hold too much: 'params/block_1/": (Small(depth=1), variables, {}),
        r"has shape \(16, 2, 8\); the module wants \(16, 4, 4\)|the module wants": (
            Small(heads=4),
            variables,
            {},
        ),
        "holds no tokenizer": (model, variables, {"tokenizer": tmp_path}),
    }
    for message, (module, given, options) in wrong.items():
        with pytest.raises(UserError, match=message):
            save_pretrained(module, given, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def broken(*rules):
    return Family("small", ("small",), "S", SMALL.build, SMALL.describe, rules, SMALL.example)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (SMALL.rules[1:], r"1 parameters get no tensor: patches/projection/kernel \(no rule\)"),
        (
            (*SMALL.rules[:1], Rule("patches/projection/bias", "norm.bias"), *SMALL.rules[2:]),
            "write both .* as 'norm.bias'",
        ),
        (
            (Rule(("final_norm/scale", "final_norm/other"), "norm", "(n d) -> n d"), *SMALL.rules),
            "'norm' holds 2 parameters, of which the model has only final_norm/scale",
        ),
        (
            (Rule(("final_norm/scale", "block_0/mlp/up/bias"), "norm", "(n d) -> n d"), *SMALL.rules),
            r"can hold only parameters of one shape, not .*\(16,\), .*\(32,\)",
        ),
        (
            (Rule("final_norm/scale", "norm", "(a b) -> (a b)"), *SMALL.rules),
            "'final_norm/scale' of shape .16,. cannot be written as 'norm'.*the size of 'a', 'b' is not known",
        ),
    ],
)
def test_rules_that_do_not_give_every_parameter_its_place_are_told(
    small, tmp_path, monkeypatch, rules, message
):
    monkeypatch.setattr(exporting, "family_named", lambda _: broken(*rules))
    with pytest.raises(UserError, match=message):
        save_pretrained(*small, tmp_path / "a", family="small")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_goes_with_the_weights(small, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "unrelated.txt").write_text("")
    save_pretrained(*small, tmp_path / "a", tokenizer=source)
    assert names_in(tmp_path / "a") == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    settings = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text('{"own": 1}')
    save_pretrained(*small, tmp_path / "b", tokenizer=source)
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text()) == {"own": 1}
    with pytest.raises(UserError, match="holds no tokenizer"):
        save_pretrained(*small, tmp_path / "none", tokenizer=tmp_path / "a/nothing")
    assert not (tmp_path / "none").exists()


def test_a_tokenizer_of_ours_is_saved_with_the_weights(small, tmp_path):
    ours = SentencePieceTokenizer("bundled:emoji1594.spm.model")
    save_pretrained(*small, tmp_path / "a", tokenizer=ours)
    assert {"spiece.model", "tokenizer.json", "tokenizer_config.json"} <= set(names_in(tmp_path / "a"))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    assert theirs.encode("red heart, two people").ids == ours.encode("red heart, two people")
