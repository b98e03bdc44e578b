"""Patch embedding: a product that equals a convolution, tubelets, and kernels for other patch sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.patches import PatchEmbedding, cut, inflate_kernel, resize_kernel
from vlpjax.models.positions_2d import resize_matrix

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A convolution whose stride is its kernel's size; [B, N, D]."""
    axes = "TYX"[-(kernel.ndim - 2) :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    tokens = jax.lax.conv_general_dilated(
        images, kernel, kernel.shape[:-2], "VALID", dimension_numbers=numbers
    )
    return np.asarray(tokens).reshape(len(images), -1, kernel.shape[-1])


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_patches_are_a_strided_convolution(channels: int) -> None:
    images, kernel, bias = draw(2, 8, 9, channels), draw(4, 3, channels, 5), draw(5)
    module = PatchEmbedding(patch=(4, 3), width=5, bias=True)
    params = {"projection": {"kernel": kernel.reshape(-1, 5), "bias": bias}}
    tokens = module.apply({"params": params}, images)
    np.testing.assert_allclose(tokens, convolve(images, kernel) + bias, rtol=1e-5, atol=1e-5)
    again = module.apply({"params": params}, cut(jnp.asarray(images), (4, 3)))
    np.testing.assert_array_equal(tokens, again)


def test_tubelets_are_a_strided_convolution_in_space_and_time() -> None:
    clips, kernel = draw(2, 4, 8, 6, 2), draw(2, 4, 3, 2, 5)
    tokens = PatchEmbedding(patch=(4, 3), width=5, tubelet=2).apply(
        {"params": {"projection": {"kernel": kernel.reshape(-1, 5)}}}, clips
    )
    np.testing.assert_allclose(tokens, convolve(clips, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["central", "average"])
def test_an_inflated_kernel_sees_in_a_still_clip_what_it_saw_in_the_image(how: str) -> None:
    image, kernel = draw(1, 4, 4, 3), draw(2 * 2 * 3, 5)
    clip = jnp.repeat(jnp.asarray(image)[:, None], 3, axis=1)
    before = cut(jnp.asarray(image), (2, 2)) @ kernel
    after = cut(clip, (2, 2), 3) @ inflate_kernel(jnp.asarray(kernel), 3, how)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_central_kernel_sees_the_middle_frame_only() -> None:
    clip = jnp.asarray(draw(1, 3, 2, 2, 1))
    kernel = inflate_kernel(jnp.asarray(draw(4, 5)), 3)
    changed = clip.at[:, 0].add(1.0).at[:, 2].add(1.0)
    np.testing.assert_array_equal(cut(clip, (2, 2), 3) @ kernel, cut(changed, (2, 2), 3) @ kernel)


@pytest.mark.parametrize(
    ("base", "patch", "how"),
    [
        ((4, 4), (6, 6), ("bilinear", False)),
        ((4, 3), (5, 7), ("bilinear", True)),
        ((3, 4), (3, 9), ("bicubic", True)),
    ],
)
def test_a_grown_kernel_gives_grown_patches_the_tokens_they_had(
    base: tuple[int, int], patch: tuple[int, int], how: tuple[str, bool]
) -> None:
    pixels, kernel = draw(2, *base, 3), draw(2 * base[0] * base[1] * 3, 5)
    down, along = (resize_matrix(old, new, *how) for old, new in zip(base, patch, strict=True))
    grown = np.einsum("yp,xq,tpqc->tyxc", down, along, pixels)
    resized = resize_kernel(jnp.asarray(kernel), base, patch, 2, *how)
    np.testing.assert_allclose(grown.reshape(-1) @ resized, pixels.reshape(-1) @ kernel, rtol=1e-4, atol=1e-4)


def test_a_shrunk_kernel_is_the_nearest_in_the_least_squares_sense() -> None:
    """Over white patches, no kernel of the small size is nearer to what the large one gives."""
    kernel = draw(4 * 4, 5)
    shrink = np.kron(resize_matrix(4, 2, "bilinear"), resize_matrix(4, 2, "bilinear"))  # [4, 16]
    best = np.linalg.lstsq(shrink.T, kernel, rcond=None)[0]
    np.testing.assert_allclose(resize_kernel(jnp.asarray(kernel), (4, 4), (2, 2)), best, atol=1e-5)


def test_the_kernel_is_stored_for_its_base_and_used_for_the_patch() -> None:
    images = draw(1, 12, 12, 3)
    module = PatchEmbedding(patch=6, width=5, base=4, bias=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]["projection"]
    assert shapes["kernel"].unbox().shape == (4 * 4 * 3, 5)
    params = {"kernel": draw(4 * 4 * 3, 5), "bias": draw(5)}
    kernel = resize_kernel(jnp.asarray(params["kernel"]), (4, 4), (6, 6))
    tokens = module.apply({"params": {"projection": params}}, images)
    np.testing.assert_allclose(
        tokens, cut(jnp.asarray(images), (6, 6)) @ kernel + params["bias"], rtol=1e-4, atol=1e-5
    )
    same = PatchEmbedding(patch=4, width=5, base=4, bias=True)
    plain = PatchEmbedding(patch=4, width=5, bias=True)
    tokens, wanted = (m.apply({"params": {"projection": params}}, images) for m in (same, plain))
    np.testing.assert_allclose(tokens, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "shape", "parts"),
    [
        (dict(patch=(4, 3)), (1, 8, 8, 3), ["8x8", "4x3"]),
        (dict(patch=4, tubelet=2), (1, 3, 8, 8, 3), ["3 frames", "2"]),
        (dict(patch=4, stem="conv", base=8), (1, 8, 8, 3), ["'conv'", "patch_base"]),
        (dict(patch=(4, 2), stem="conv"), (1, 8, 8, 3), ["'conv'", "square"]),
        (dict(patch=4, stem="conv"), (1, 4, 48), ["'conv'", "cut patches"]),
    ],
)
def test_what_does_not_work_is_told(fields: dict[str, Any], shape: tuple[int, ...], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        jax.eval_shape(PatchEmbedding(width=8, **fields).init, jax.random.key(0), jnp.zeros(shape))
    assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(UserError, match="'first'.*'central' and 'average'"):
        inflate_kernel(jnp.zeros((4, 2)), 2, "first")
