"""``Pretrained``: towers of a new run that start from files, alone, locked, and out of a file of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.core import meta
from safetensors.numpy import load_file, save_file

from vlpjax.errors import UserError
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.heads import Scalar
from vlpjax.models.locked import Locked
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families import family_named
from vlpjax.weights.family import initial_variables
from vlpjax.weights.starting import Pretrained

IDS = jnp.array([[2, 5, 7, 0]])
BERT = TextTransformer(
    vocabulary=11, length=6, width=8, depth=2, heads=2, mlp_dim=12, causal=False, mask_padding=True, order="post",
    types=2, embedding_norm=True, final_norm=False, pool="cls", pooler=True, epsilon=1e-12,
)  # fmt: skip
OWN = BERT.clone(pooler=False, pool="mean", embedding=5, dropout=0.3)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a BERT, and its parameters."""
    folder = tmp_path_factory.mktemp("weights") / "bert"
    variables = initial_variables(family_named("bert"), BERT, seed=3)
    save_pretrained(BERT, variables, folder)
    return folder, variables["params"]


def fresh(model: Any) -> Any:
    """New variables of a text tower."""
    return meta.unbox(jax.jit(model.init)(jax.random.key(0), IDS))


def test_a_tower_takes_what_the_file_has_and_keeps_what_is_new(bert) -> None:
    folder, theirs = bert
    params = fresh(OWN)["params"]
    found, statistics = Pretrained(str(folder)).fill("text", OWN, params, {})
    assert set(found) == set(params) and statistics == {}
    for name, tree in found.items():
        expected = params if name == "projection" else theirs
        jax.tree.map(np.testing.assert_array_equal, tree, expected[name])


def test_of_a_locked_tower_it_is_the_tower_inside(bert) -> None:
    folder, theirs = bert
    model = Locked(OWN.clone(embedding=None), embedding=5)
    variables = fresh(model)
    found, statistics = Pretrained(str(folder)).fill(
        "text", model, variables["params"], variables["batch_stats"]
    )
    for name, tree in found["tower"].items():
        jax.tree.map(np.testing.assert_array_equal, tree, theirs[name])
    jax.tree.map(np.testing.assert_array_equal, found["projection"], variables["params"]["projection"])
    assert statistics is variables["batch_stats"]


def test_values_lie_where_those_lay_that_they_replace(bert) -> None:
    params = fresh(OWN)["params"]
    place = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec(None, "x"))
    kernel = params["block_1"]["mlp"]["up"]["kernel"]
    params["block_1"]["mlp"]["up"]["kernel"] = jax.device_put(kernel, place)
    found, _ = Pretrained(str(bert[0])).fill("text", OWN, params, {})
    assert found["block_1"]["mlp"]["up"]["kernel"].sharding == place
    expected = bert[1]["block_1"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(found["block_1"]["mlp"]["up"]["kernel"], expected)


def test_tensors_without_a_parameter_are_named_or_let_go(bert, tmp_path: Path) -> None:
    tensors = load_file(bert[0] / "model.safetensors")
    save_file({**tensors, "probe.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((bert[0] / "config.json").read_text())
    params = fresh(OWN)["params"]
    with pytest.raises(UserError, match=r"1 tensors belong to no parameter: probe\.weight"):
        Pretrained(str(tmp_path)).fill("text", OWN, params, {})
    Pretrained(str(tmp_path), unused=(r"probe\..*",)).fill("text", OWN, params, {})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(heads=4), r"TextTransformer.heads is 4, which .*bert cannot hold; there it is 2"),
        (dict(activation="relu"), r"TextTransformer.activation is 'relu'.*there it is 'gelu'"),
        (dict(depth=3), "TextTransformer.depth is 3"),
    ],
)
def test_a_tower_that_computes_something_else_is_told(bert, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Pretrained(str(bert[0])).fill("text", OWN.clone(**change), {}, {})


def test_a_tower_of_another_kind_is_told(bert) -> None:
    with pytest.raises(UserError, match="bert is a TextTransformer, but the tower 'image' is a ViT"):
        Pretrained(str(bert[0])).fill("image", ViT(image_size=4, patch=2, width=4, depth=1, heads=1), {}, {})


def test_a_parameter_that_the_file_lacks_is_named(bert) -> None:
    params = fresh(OWN)["params"]
    with pytest.raises(UserError, match=r"1 parameters get no tensor: projection/kernel/kernel"):
        Pretrained(str(bert[0]), new=()).fill("text", OWN, params, {})


def test_a_file_of_several_towers_gives_the_one_of_the_name(tmp_path: Path) -> None:
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=13, max_position_embeddings=6, **small),
        vision_config=dict(image_size=8, patch_size=4, **small),
        projection_dim=5,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    both, variables = from_pretrained(tmp_path)
    assert isinstance(both, Towers)
    theirs = variables["params"]["text"]
    tower = both.makers["text"]()
    zeros = jax.tree.map(jnp.zeros_like, theirs)
    found, _ = Pretrained(str(tmp_path), new=()).fill("text", tower, zeros, {})
    jax.tree.map(np.testing.assert_array_equal, found, theirs)
    anew, _ = Pretrained(str(tmp_path), unused=(r"text_projection\.weight",)).fill("text", tower, zeros, {})
    assert not np.any(anew["projection"]["kernel"]["kernel"])
    with pytest.raises(UserError, match="and none named 'words'"):
        Pretrained(str(tmp_path)).fill("words", Scalar(0.0), {}, {})


def test_a_model_with_images_gives_its_parts_by_name(tmp_path: Path) -> None:
    parts: dict[str, Any] = dict(
        image=ViT(
            image_size=8, patch=4, patch_bias=True, width=8, depth=1, heads=2, mlp_dim=12, pre_norm=False, pool="none",
            activation="gelu_tanh",
        ),
        connector=LinearConnector(12),
        decoder=Decoder(
            vocabulary=24, width=12, depth=1, heads=2, mlp_dim=16, norm="rms_offset", activation="gelu_tanh",
            embed_scale=12**0.5, length=8192,
        ),
    )  # fmt: skip
    whole = VisionLanguageModel(**parts, image_token=20, prefix_lm=True)
    variables = initial_variables(family_named("paligemma"), whole, seed=3)
    save_pretrained(whole, variables, tmp_path)
    for name, part in parts.items():
        theirs = variables["params"][name]
        found, _ = Pretrained(str(tmp_path), new=()).fill(
            name, part, jax.tree.map(jnp.zeros_like, theirs), {}
        )
        jax.tree.map(np.testing.assert_array_equal, found, theirs)
    # How it is run, and what a field stands for where it says nothing, are no differences.
    same = parts["decoder"].clone(kv_heads=2, head_dim=6, sequence_scheme="ring", remat="full")
    Pretrained(str(tmp_path), new=()).fill("decoder", same, variables["params"]["decoder"], {})
    with pytest.raises(UserError, match=r"Decoder.kv_heads is 1, which .* there it is 2"):
        Pretrained(str(tmp_path)).fill("decoder", parts["decoder"].clone(kv_heads=1), {}, {})
    with pytest.raises(UserError, match="holds the towers image, connector, decoder, and none named 'text'"):
        Pretrained(str(tmp_path)).fill("text", part, {}, {})
