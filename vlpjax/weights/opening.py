"""A folder (or file) of weights, whatever its format: the config and the tensors that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlpjax.errors import UserError
from vlpjax.weights.safetensors_files import open_safetensors
from vlpjax.weights.tensors import Tensors

CONFIGS = ("config.json", "open_clip_config.json")

# Where weights are looked for, first to last.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "*.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "*.pth",
    "*.pt",
    "*.bin",
    "*.gguf",
    "*.onnx",
)


@dataclass(frozen=True)
class Opened:
    """What a folder holds.

    Attributes:
      path: the folder or file.
      config: of the architecture; empty if there is none beside the weights.
      tensors: the weights.
    """

    path: Path
    config: dict[str, Any]
    tensors: Tensors


def open_weights(path: str | Path) -> Opened:
    """Opens a folder, or one file of weights.

    Nothing but names, types and shapes is read yet, and nothing that a file holds is executed.

    Raises:
      UserError: there is no such folder, it holds no weights, or they are damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"There is no folder or file {str(path)!r}; name the folder of a model's config.json."
        )
    file = path if path.is_file() else weights_file(path)
    folder = file.parent
    if file.suffix == ".gguf":
        from vlpjax.weights.gguf_files import open_gguf

        config, tensors = open_gguf(file)
        return Opened(path, config, tensors)
    return Opened(path, _read_config(folder), _opener(file)(file))


def weights_file(folder: Path) -> Path:
    """The file in a folder that holds its weights, or the index of several.

    Raises:
      UserError: none, or several without an index.
    """
    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(item.name for item in found)
            raise UserError(
                f"{folder} holds several files of weights ({names}) and no index; name one of them."
            )
        if found:
            return found[0]
    raise UserError(f"{folder} holds no weights; known are {', '.join(_WEIGHTS)}.")


def _opener(file: Path) -> Callable[[Path], Tensors]:
    name = file.name
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return open_safetensors
    if name.endswith((".bin", ".bin.index.json", ".pth", ".pt")):
        from vlpjax.weights.torch_pickle import open_pickle

        return open_pickle
    if name.endswith(".onnx"):
        from vlpjax.weights.onnx_files import open_onnx

        return open_onnx
    raise UserError(f"{file} is no file of weights; known are {', '.join(_WEIGHTS)}.")


def _read_config(folder: Path) -> dict[str, Any]:
    for name in CONFIGS:
        file = folder / name
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is not JSON ({error}).") from error
            if not isinstance(config, dict):
                raise UserError(f"{file} must hold the fields of a config, not a {type(config).__name__}.")
            return config
    return {}
