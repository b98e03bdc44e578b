"""LLaVA 1.5 and LLaVA-NeXT: logits, hidden states and answers equal `transformers`', in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.weights import parity
from vlpjax.data.tiling import Tiling
from vlpjax.errors import UserError
from vlpjax.models.connectors import MlpConnector
from vlpjax.models.vision_language import expand_prompts, generate_with_images
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families import family_of

IMAGE, WORDS = 60, 59
VISION = dict(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
TEXT = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, max_position_embeddings=128,
)  # fmt: skip
PROMPTS = [[1, 5, IMAGE, 7, 8, 9], [3, IMAGE, 4, 4, 2, 11]]
IMAGES = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def pixels(images: np.ndarray) -> torch.Tensor:
    """The same images, channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3)))


def published(name: str) -> str:
    """The name of an image tower's tensor in published files, which all versions of `transformers` read."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def config(**fields: Any) -> Any:
    parts = dict(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT)
    )
    return transformers.LlavaConfig(**parts, image_token_index=IMAGE, **fields)


def outputs(found: Any) -> dict[str, Any]:
    """What `transformers` returns, by our names."""
    states = found.hidden_states
    return {
        "logits": found.logits,
        "tokens": states[-1],
        "hidden_0": states[1],
        "images": found.image_hidden_states,
    }


def run_theirs(ids: np.ndarray) -> Any:
    return lambda model: outputs(model(torch.from_numpy(ids), pixels(IMAGES), output_hidden_states=True))


def run_ours(ids: np.ndarray) -> Any:
    def run(model: Any, variables: Any) -> dict[str, Any]:
        found = model.apply(variables, jnp.asarray(ids), IMAGES, hidden=(0,))
        images = found["image_tokens"].reshape(-1, model.decoder.width)
        return {
            "logits": found["logits"],
            "tokens": found["tokens"],
            "hidden_0": found["hidden"][0],
            "images": images,
        }

    return run


CONFIGS = {
    "llava 1.5": (4, {}),
    "two layers, class tokens, no biases": (
        5,
        dict(
            vision_feature_layer=[1, -2], vision_feature_select_strategy="full", multimodal_projector_bias=False,
            projector_hidden_act="silu",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_in_both_directions(name: str, tmp_path: Path) -> None:
    count, fields = CONFIGS[name]
    ids = np.array(expand_prompts(PROMPTS, [[count]] * 2, IMAGE))
    peer = transformers.LlavaForConditionalGeneration(config(**fields))
    found = parity.check(peer, tmp_path, run_theirs(ids), run_ours(ids), rename=published)
    print(name, max(found.imported.values()), max(found.exported.values()))
    if name == "llava 1.5":
        with torch.no_grad():
            theirs = peer.generate(
                torch.from_numpy(ids),
                pixel_values=pixels(IMAGES),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
            )
        ours = generate_with_images(found.model, found.variables, ids, IMAGES, max_new_tokens=20)
        np.testing.assert_array_equal(ours.tokens, theirs[:, ids.shape[1] :])


RESOLUTIONS = ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))


@pytest.mark.parametrize("size", [(10, 30), (31, 20), (40, 41), (100, 9), (7, 5), (33, 64)])
def test_tiles_are_packed_as_theirs(size: tuple[int, int]) -> None:
    from transformers.models.llava_next import modeling_llava_next as theirs

    tiling, grid = Tiling(16, 4, RESOLUTIONS), theirs.get_anyres_image_grid_shape(size, list(RESOLUTIONS), 16)
    assert tiling.tiles(size) == theirs.image_size_to_num_patches(
        size, [list(one) for one in RESOLUTIONS], 16
    )
    index = torch.arange(1, 1 + 16 * tiling.tiles(size))  # (0 is left for the newline)
    tiles = index[16:].view(*grid, 4, 4).permute(0, 2, 1, 3).reshape(1, grid[0] * 4, grid[1] * 4)
    kept = torch.nn.functional.pad(theirs.unpad_image(tiles, size)[0], (0, 1)).flatten()
    np.testing.assert_array_equal(tiling.arrangement(size) + 1, torch.cat([index[:16], kept]))


def test_llava_next_equals_theirs_with_images_of_different_sizes(tmp_path: Path) -> None:
    sizes = [(20, 61), (35, 30)]
    fields: dict[str, Any] = dict(
        image_grid_pinpoints=[list(size) for size in RESOLUTIONS], image_token_index=IMAGE
    )
    fields["vision_config"] = transformers.CLIPVisionConfig(**VISION)
    fields["text_config"] = transformers.MistralConfig(**TEXT, sliding_window=9)
    peer = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**fields))
    tiling = Tiling(16, 2, RESOLUTIONS)
    counts = [len(tiling.arrangement(size)) for size in sizes]
    prompts = expand_prompts(PROMPTS, [[count] for count in counts], IMAGE)
    longest = max(map(len, prompts))
    ids = np.array([[*prompt, *[WORDS] * (longest - len(prompt))] for prompt in prompts])
    arrangement = tiling.arrangements([[size] for size in sizes])
    tiles = max(map(tiling.tiles, sizes))
    images = np.random.default_rng(1).standard_normal((2, tiles, 16, 16, 3)).astype(np.float32)

    def run_next(model: Any) -> dict[str, Any]:
        where = torch.tensor(sizes)
        return outputs(
            model(torch.from_numpy(ids), pixels(images), image_sizes=where, output_hidden_states=True)
        )

    def run(model: Any, variables: Any) -> dict[str, Any]:
        found = model.apply(variables, jnp.asarray(ids), images, arrangement=arrangement, hidden=(0,))
        packed = jnp.concatenate([found["image_tokens"][row, :count] for row, count in enumerate(counts)])
        return {
            "logits": found["logits"],
            "tokens": found["tokens"],
            "hidden_0": found["hidden"][0],
            "images": packed,
        }

    found = parity.check(peer, tmp_path, run_next, run, rename=published)
    print(max(found.imported.values()), max(found.exported.values()), counts)
    assert found.model.tiling == tiling
    assert counts[0] != counts[1]


def test_the_newer_spelling_of_names_is_read_too(tmp_path: Path) -> None:
    peer = parity.randomize(transformers.LlavaForConditionalGeneration(config()))
    parity.save_theirs(peer, tmp_path / "older")
    model, variables = from_pretrained(tmp_path / "older")
    (tmp_path / "newer").mkdir()
    tensors = {name: x.detach().numpy() for name, x in peer.named_parameters()}
    assert "model.language_model.norm.weight" in tensors and "lm_head.weight" in tensors
    save_file(tensors, tmp_path / "newer" / "model.safetensors")
    (tmp_path / "newer" / "config.json").write_bytes((tmp_path / "older" / "config.json").read_bytes())
    again, found = from_pretrained(tmp_path / "newer")
    assert again == model
    save_pretrained(model, variables, tmp_path / "a")
    save_pretrained(again, found, tmp_path / "b")
    parity.assert_identical(tmp_path / "a", tmp_path / "b")


def test_what_a_published_config_leaves_out_has_its_default() -> None:
    fields = {
        "model_type": "llava",
        "text_config": {
            "model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064, "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        },
    }  # fmt: skip
    theirs = transformers.LlavaConfig(
        **{name: value for name, value in fields.items() if name != "model_type"}
    )
    model: Any = family_of(fields).build(fields)
    again: Any = family_of(fields).build(theirs.to_dict())
    assert family_of(fields).describe(again) == family_of(fields).describe(model)
    assert (model.decoder.width, model.decoder.mlp_dim, model.decoder.depth) == (4096, 11008, 32)
    assert model.image_layers == (-2,) and model.image_token == 32000


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vision_feature_layer": 0}, "vision_feature_layer=0"),
        ({"vision_feature_select_strategy": "cls"}, "'cls'"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba'"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "'full'"),
    ],
)
def test_configs_that_cannot_be_represented_are_named(fields: dict[str, Any], told: str) -> None:
    whole = {"model_type": "llava", **fields}
    with pytest.raises(UserError, match=told):
        family_of(whole).build(whole)


def test_modules_that_it_cannot_hold_are_named() -> None:
    plain = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    family = family_of(plain)
    model: Any = family.build(plain)
    for changed, told in (
        (dict(connector=MlpConnector(4096, input_norm=True)), "input_norm"),
        (dict(prefix_lm=True), "prefix_lm"),
        (dict(image_layers=None), "image_layers"),
        (dict(image=model.image.clone(embedding=3)), "embedding"),
        (dict(tiling=Tiling(336, 24, ((336, 336),))), "tiling"),
    ):
        with pytest.raises(UserError, match=told):
            family.describe(model.clone(**changed))
