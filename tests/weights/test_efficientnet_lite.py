"""EfficientNet-lite weights: equal to an independent PyTorch network, also with the numbers that were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional

from tests.weights import real
from tests.weights.parity import compare
from vlpjax.errors import UserError
from vlpjax.models.efficientnet import EfficientNetLite
from vlpjax.weights import from_pretrained, save_pretrained

IMAGES = (
    np.random.default_rng(0).normal(size=(3, 75, 90, 3)).astype(np.float32)
)  # grids of odd sizes on the way


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does: so much that ceil(size / stride) positions fit, more at the end."""

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        padding: list[int] = []
        for size, side, stride in zip(
            grid.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            lacking = max((-(-size // stride) - 1) * stride + side - size, 0)
            padding += [lacking // 2, lacking - lacking // 2]
        return super().forward(functional.pad(grid, padding))


class Residual(nn.Module):
    """One block, with the published names."""

    def __init__(self, before: int, after: int, expand: int, side: int, stride: int):
        super().__init__()
        wide = before * expand
        if expand > 1:
            self._expand_conv, self._bn0 = Same(before, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = Same(wide, wide, side, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv, self._bn2 = Same(wide, after, 1, bias=False), nn.BatchNorm2d(after, eps=1e-3)
        self.shortcut = before == after and stride == 1

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        hidden = grid
        if hasattr(self, "_expand_conv"):
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return grid + hidden if self.shortcut else hidden


class Network(nn.Module):
    """lite0, written down block by block: (channels, expansion, side of the kernel, stride)."""

    BLOCKS = (
        (16, 1, 3, 1),
        (24, 6, 3, 2), (24, 6, 3, 1),
        (40, 6, 5, 2), (40, 6, 5, 1),
        (80, 6, 3, 2), (80, 6, 3, 1), (80, 6, 3, 1),
        (112, 6, 5, 1), (112, 6, 5, 1), (112, 6, 5, 1),
        (192, 6, 5, 2), (192, 6, 5, 1), (192, 6, 5, 1), (192, 6, 5, 1),
        (320, 6, 3, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        sizes = [32, *(after for after, *_ in self.BLOCKS)]
        self._blocks = nn.ModuleList(
            Residual(before, *fields) for before, fields in zip(sizes, self.BLOCKS, strict=False)
        )
        self._conv_head, self._bn1 = Same(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            grid = block(grid)
        tokens = functional.relu6(self._bn1(self._conv_head(grid))).flatten(2).transpose(1, 2)
        pooled = tokens.mean(1)
        return {"tokens": tokens, "pooled": pooled, "logits": self._fc(pooled)}


@pytest.fixture(scope="module")
def imported() -> tuple[EfficientNetLite, Any]:
    """The published file, which has no config."""
    return from_pretrained(real.file("efficientnet_lite0"), family="efficientnet_lite0")


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return torch.load(real.file("efficientnet_lite0"), weights_only=True)


def test_the_published_network_computes_what_pytorch_computes(imported, published) -> None:
    model, variables = imported
    network = Network()
    network.load_state_dict(published)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))))
    found = dict(jax.jit(model.apply)(variables, IMAGES))
    np.testing.assert_array_equal(found.pop("embedding"), found["pooled"])
    print(compare(found, expected))


def test_it_is_written_bit_for_bit_as_it_was_read(imported, published, tmp_path: Path) -> None:
    model, variables = imported
    save_pretrained(model, variables, tmp_path / "back")
    written = load_file(tmp_path / "back" / "model.safetensors")
    learned = {name: x for name, x in published.items() if not name.endswith("num_batches_tracked")}
    assert set(written) == set(learned) and len(learned) == 247
    for name, tensor in learned.items():
        assert written[name].dtype == np.float32
        assert written[name].tobytes() == tensor.contiguous().numpy().tobytes(), name
    Network().load_state_dict({name: torch.from_numpy(x) for name, x in written.items()})
    again, values = from_pretrained(tmp_path / "back")  # this folder has a config
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, values, variables)


def test_a_file_without_config_must_be_named() -> None:
    with pytest.raises(UserError, match=r"does not say what its weights are.*name a family"):
        from_pretrained(real.file("efficientnet_lite0"))
    with pytest.raises(UserError, match=r"did you mean 'efficientnet_lite\d'"):
        from_pretrained(real.file("efficientnet_lite0"), family="efficientnet_lite")


def test_another_size_is_told() -> None:
    with pytest.raises(UserError, match=r"_blocks\.\d+\..* has shape .*the weights and the config disagree"):
        from_pretrained(real.file("efficientnet_lite0"), family="efficientnet_lite1")


@pytest.mark.parametrize("change", [{"width": 1.3}, {"embedding": 8}, {"epsilon": 1e-5}])
def test_what_the_family_cannot_hold_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(
        UserError, match=rf"EfficientNetLite\.{field} is {change[field]!r}; in EfficientNet-lite0"
    ):
        save_pretrained(EfficientNetLite(**change), {}, tmp_path / "new", family="efficientnet_lite0")


def test_a_prefix_of_parallel_training_is_read(published, imported, tmp_path: Path) -> None:
    arrays = {f"module.{name}": np.ascontiguousarray(x.numpy()) for name, x in published.items() if x.ndim}
    save_file(arrays, tmp_path / "weights.safetensors")
    _, variables = from_pretrained(tmp_path, family="efficientnet_lite0")
    jax.tree.map(np.testing.assert_array_equal, variables, imported[1])
