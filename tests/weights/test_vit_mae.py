"""Masked autoencoders, the encoder alone and with its decoder, equal `transformers`' in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests.weights import parity
from tests.weights.test_vit import SIZES, drawn, our_tower, pixels, their_tower
from vlpjax.errors import UserError
from vlpjax.models.mae import MAEDecoder
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families import family_named
from vlpjax.weights.family import initial_variables

DECODER: dict[str, Any] = dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=20
)  # fmt: skip
WHOLE = "vit_mae_with_decoder"
IMAGES = drawn(24, 24)
NOISE = np.random.default_rng(1).random((2, 9)).astype(np.float32)
SHUFFLED = np.argsort(NOISE, axis=1)
KEPT = 9 // 4


def whole_peer(**fields: Any) -> Any:
    """With random weights, and the positions of published files, which are never learned (a new peer has zeros)."""
    config = transformers.ViTMAEConfig(
        **SIZES, **DECODER, image_size=24, patch_size=8, mask_ratio=0.75, **fields
    )
    peer = transformers.ViTMAEForPreTraining(config)
    parity.randomize(peer)
    mask_token = peer.decoder.mask_token.detach().clone()
    with torch.no_grad():
        peer.decoder.initialize_weights(9)
        peer.decoder.mask_token.copy_(mask_token)
    assert peer.decoder.decoder_pos_embed.abs().max() > 0.9
    return peer


def published(name: str) -> str:
    """The name of a decoder's tensor in published files, which all versions of `transformers` read."""
    return name.replace("decoder_encoder.layer.", "decoder_layers.")


def run_theirs(model: Any) -> dict[str, Any]:
    out = model(pixels(IMAGES), noise=torch.from_numpy(NOISE), output_hidden_states=True)
    hidden = parity.hidden_states(out.hidden_states[:3])
    return {"predicted": out.logits, **hidden}


def run_ours(model: Towers, variables: Any) -> dict[str, Any]:
    def run(towers: Towers) -> dict[str, Any]:
        encoded = towers.call("image", IMAGES, keep=SHUFFLED[:, :KEPT], hidden=(0, 1))
        restore = np.argsort(SHUFFLED, axis=1)
        predicted = towers.call("mae_decoder", encoded["tokens"], restore, (3, 3), prefix=encoded["prefix"])
        return {"predicted": predicted, **parity.layers(encoded["hidden"])}

    return model.apply(variables, method=run)


def test_the_encoder_of_a_masked_autoencoder_equals_theirs(tmp_path: Path) -> None:
    order = torch.arange(9.0).repeat(2, 1)  # theirs shuffles the patches by this noise, also if it masks none
    config = transformers.ViTMAEConfig(**SIZES, image_size=24, patch_size=8, mask_ratio=0.0)
    parity.check(
        transformers.ViTMAEModel(config),
        tmp_path,
        lambda model: their_tower(model, IMAGES, noise=order),
        lambda model, variables: our_tower(model, variables, IMAGES),
        family="vit_mae",
    )


def test_the_decoder_of_a_masked_autoencoder_is_left_behind(tmp_path: Path) -> None:
    peer = whole_peer()
    peer.config.mask_ratio = 0.0
    peer.save_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = their_tower(peer.vit, IMAGES, noise=torch.arange(9.0).repeat(2, 1))
    parity.compare(jax.jit(lambda variables: our_tower(model, variables, IMAGES))(variables), expected)


def test_encoder_and_decoder_equal_theirs_under_the_same_mask(tmp_path: Path) -> None:
    peer = whole_peer()
    peer.save_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs", family=WHOLE)
    assert isinstance(model, Towers)
    run = jax.jit(lambda variables: run_ours(model, variables))
    with torch.no_grad():
        expected = run_theirs(peer)
    assert expected["predicted"].shape == (2, 9, 192)
    parity.compare(run(variables), expected)

    save_pretrained(model, variables, tmp_path / "back")
    parity.assert_identical(tmp_path / "theirs", tmp_path / "back", rename=published)
    with torch.no_grad():
        parity.compare(run_theirs(parity.load_theirs(tmp_path / "back")), expected, 1e-6)

    ours = parity.draw(variables)
    save_pretrained(model, ours, tmp_path / "ours")
    with torch.no_grad():
        parity.compare(run(ours), run_theirs(parity.load_theirs(tmp_path / "ours")))


def test_towers_as_they_are_trained_are_written_with_the_positions_that_they_compute(tmp_path: Path) -> None:
    """An oblong grid, and a tower that pools and computes its positions as the published runs do."""
    model = Towers.of(
        {
            "image": ViT(
                image_size=(16, 24), patch=8, width=24, depth=2, heads=3, mlp_dim=40, patch_bias=True, class_tokens=1,
                positions="sincos", sincos_form="mae", pool="mean", pre_norm=False,
            ),
            "mae_decoder": MAEDecoder(192, width=16, depth=1, heads=2),
        }
    )  # fmt: skip
    variables = parity.draw(initial_variables(family_named(WHOLE), model))
    save_pretrained(model, variables, tmp_path / "ours")
    again, found = from_pretrained(tmp_path / "ours", family=WHOLE)
    images, restore = drawn(16, 24), np.argsort(SHUFFLED[:, :6], axis=1).argsort(axis=1)

    def run(model: Any, variables: Any) -> Any:
        def both(towers: Towers) -> Any:
            encoded = towers.call("image", images, keep=np.argsort(restore, axis=1)[:, :3])
            return towers.call("mae_decoder", encoded["tokens"], restore, (2, 3), prefix=encoded["prefix"])

        return jax.jit(lambda variables: model.apply(variables, method=both))(variables)

    parity.compare({"predicted": run(again, found)}, {"predicted": run(model, variables)}, 1e-5)
    bare = ({"params": variables["params"]["image"]}, tmp_path / "encoder")
    save_pretrained(model.makers["image"](), *bare, family="vit_mae")
    encoder = parity.tensors(tmp_path / "encoder")
    table = parity.tensors(tmp_path / "ours")["vit.embeddings.position_embeddings"]
    np.testing.assert_array_equal(encoder["embeddings.position_embeddings"], table)
    assert table.shape == (1, 7, 24) and not table[:, 0].any()


def test_positions_of_the_decoder_that_are_not_the_fixed_ones_are_told(tmp_path: Path) -> None:
    whole_peer().save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    for wrong, told in (
        (tensors["decoder.decoder_pos_embed"] + 0.5, "'decoder.decoder_pos_embed' is off by 0.5"),
        (
            tensors["decoder.decoder_pos_embed"][:, 1:],
            r"shape \(1, 9, 16\), but the module computes .*\(1, 10, 16\)",
        ),
    ):
        wrong = np.ascontiguousarray(wrong)
        save_file({**tensors, "decoder.decoder_pos_embed": wrong}, tmp_path / "theirs" / "model.safetensors")
        with pytest.raises(UserError, match=told):
            from_pretrained(tmp_path / "theirs", family=WHOLE)


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        (MAEDecoder(192, width=16, depth=1, heads=2, cross=True), "MAEDecoder.cross is True"),
        (MAEDecoder(64, width=16, depth=1, heads=2), "MAEDecoder.features is 64"),
        (MAEDecoder(192, width=16, depth=1, heads=2, epsilon=1e-5), "MAEDecoder.epsilon is 1e-05"),
    ],
)
def test_decoders_that_it_cannot_hold_are_told(tmp_path: Path, decoder: MAEDecoder, told: str) -> None:
    encoder = ViT(image_size=16, patch=8, width=16, depth=1, heads=2, pre_norm=False, patch_bias=True)
    model = Towers.of({"image": encoder, "mae_decoder": decoder})
    with pytest.raises(UserError, match=told):
        save_pretrained(model, {}, tmp_path / "ours", family=WHOLE)


def test_a_config_says_what_the_decoder_is(tmp_path: Path) -> None:
    whole_peer().save_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs", family=WHOLE)
    save_pretrained(model, variables, tmp_path / "back")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert {name: ours[name] for name in (*DECODER, "architectures", "mask_ratio")} == {
        name: theirs[name] for name in (*DECODER, "architectures", "mask_ratio")
    }
    with pytest.raises(UserError, match="qkv_bias=False"):
        family_named(WHOLE).build({**theirs, "qkv_bias": False})
