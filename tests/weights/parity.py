"""Comparison of an imported model with its PyTorch peer, in both directions, for the tests of every family.

A test makes a small PyTorch model and says how both sides are run; :func:`check` draws every parameter at random
(libraries start biases at 0 and norms at 1, which hides a wrong mapping), and does the rest: their weights here,
the same weights written back, and weights drawn here run there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as nn
from flax.core import meta
from safetensors.numpy import load_file

from vlpjax.weights import from_pretrained, save_pretrained

TOLERANCE = 1e-4  # of the largest magnitude of the compared array

Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class Parity:
    """What was measured: per compared array, the largest difference over the largest magnitude.

    Attributes:
      imported: their weights, run here.
      exported: weights drawn here, run there.
      model, variables: as imported, for what else a test wants to see.
      folder: holds ``theirs`` (saved by them), ``back`` (the same, saved by us), ``ours`` (drawn here).
    """

    imported: dict[str, float]
    exported: dict[str, float]
    model: nn.Module
    variables: Any
    folder: Path


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter anew: norm scales around 1, all other vectors around 0, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if "embed" not in name and "token" not in name else 4
                noise = noise * fan_in**-0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = 0.2 * noise
            parameter.copy_(noise.to(parameter.dtype))
    return model.eval()


def draw(variables: Any, seed: int = 1) -> Any:
    """Variables of the same shapes drawn anew, as :func:`randomize` does with theirs."""
    random = np.random.default_rng(seed)

    def one(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] == "kernel":
            return noise * leaf.size**-0.25  # between the roots of fan-in and fan-out
        return 1 + 0.2 * noise if names[-1] in ("scale", "var") else 0.2 * noise

    return jax.tree_util.tree_map_with_path(one, meta.unbox(variables))


def compare(
    found: Outputs, expected: Outputs, tolerance: float = TOLERANCE, what: str = ""
) -> dict[str, float]:
    """Largest difference over largest magnitude, per array; an assertion if one is above ``tolerance``."""
    assert set(found) == set(expected), f"{what}: outputs {sorted(found)} against {sorted(expected)}"
    differences = {}
    for name in expected:
        theirs = np.asarray(expected[name], np.float32)
        ours = np.asarray(found[name], np.float32)
        assert ours.shape == theirs.shape, f"{what} {name}: {ours.shape} against {theirs.shape}"
        assert np.isfinite(theirs).all(), f"{what} {name}: the peer's output is not finite"
        assert np.abs(theirs).max() > 0, f"{what} {name}: the peer's output is all 0, which shows nothing"
        differences[name] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    wrong = {name: value for name, value in differences.items() if not value <= tolerance}
    assert not wrong, f"{what}: {wrong} (tolerance {tolerance}; all: {differences})"
    return differences


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, by name."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_identical(
    folder: Path, other: Path, without: tuple[str, ...] = (), rename: Callable[[str], str] = str
) -> None:
    """Both folders hold the same tensors, bit for bit.

    Args:
      without: names of tensors that ``other`` need not hold.
      rename: of a name in the first folder, the name in the other, where there are two spellings.
    """
    before = {rename(name): tensor for name, tensor in tensors(folder).items() if name not in without}
    after = tensors(other)
    assert set(before) == set(after), sorted(set(before) ^ set(after))
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape, name
        assert tensor.tobytes() == before[name].tobytes(), f"{name} is not bit-identical"


def save_theirs(model: Any, folder: Path) -> None:
    """Saves as `transformers` does."""
    model.save_pretrained(folder)


def load_theirs(folder: Path) -> torch.nn.Module:
    """Loads with the class that config.json names, and fails on any missing, unexpected or misshapen tensor.

    Where that class is the one that ``AutoModel`` gives for the config, it is loaded by ``AutoModel``.
    """
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind = getattr(transformers, name)
    base = transformers.MODEL_MAPPING.get(kind.config_class, None)
    loader = transformers.AutoModel if kind is base else kind
    model, report = loader.from_pretrained(folder, output_loading_info=True)
    assert type(model) is kind
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], f"{problem}: {report[problem]}"
    return model.eval()


def check(
    peer: torch.nn.Module,
    folder: Path,
    theirs: Callable[[Any], Outputs],
    ours: Callable[[Any, Any], Outputs],
    *,
    tolerance: float = TOLERANCE,
    save: Callable[[Any, Path], None] = save_theirs,
    load: Callable[[Path], torch.nn.Module] = load_theirs,
    seed: int = 0,
    without: tuple[str, ...] = (),
    rename: Callable[[str], str] = str,
    family: str | None = None,
) -> Parity:
    """Their model here and ours there: equal outputs both ways, and the identical file back.

    Args:
      peer: the PyTorch model; its parameters are drawn anew.
      theirs: runs it (without gradients): named arrays, the final outputs and every hidden state.
      ours: runs ``(model, variables)`` on the same inputs: the same names.  It is compiled once.
      save, load: write the peer to a folder and read it from one; by default, of `transformers`.
      without, rename: of :func:`assert_identical`, from their file to ours.
      family: to write as, where another family could hold the model too.
    """
    randomize(peer, seed)
    (folder / "theirs").mkdir(parents=True)
    save(peer, folder / "theirs")
    model, variables = from_pretrained(folder / "theirs")
    run = jax.jit(lambda variables: ours(model, variables))
    with torch.no_grad():
        expected = theirs(peer)
    imported = compare(run(variables), expected, tolerance, "their weights here")

    save_pretrained(model, variables, folder / "back", family=family)
    assert_identical(folder / "theirs", folder / "back", without, rename)
    with torch.no_grad():
        # Equal tensors do not yet make an equal model: the config that we write must say the same.
        again = theirs(load(folder / "back"))
    compare(again, expected, 1e-6, "their weights, written here, there")

    drawn = draw(variables)
    save_pretrained(model, drawn, folder / "ours", family=family)
    with torch.no_grad():
        expected = theirs(load(folder / "ours"))
    exported = compare(run(drawn), expected, tolerance, "our weights there")
    return Parity(imported, exported, model, variables, folder)


def hidden_states(states: Any, prefix: str = "") -> dict[str, Any]:
    """``{"hidden_0": ...}`` from what `transformers` returns: the embeddings are left out, layers count from 0."""
    return {f"{prefix}hidden_{layer}": state for layer, state in enumerate(states[1:])}


def layers(hidden: Mapping[int, Any], prefix: str = "") -> dict[str, Any]:
    """The same names for a tower's ``"hidden"``."""
    return {f"{prefix}hidden_{layer}": state for layer, state in hidden.items()}
