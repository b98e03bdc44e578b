"""Runs and folders of other libraries: a run becomes a folder that they load, a folder becomes a run to start from.

``tools/export_torch.py``, ``tools/import_torch.py`` and ``tools/extract_poa.py`` are the command lines of this module.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vlpjax.checkpoint import Checkpoints, load_variables
from vlpjax.config import TYPE, Config, build, resolve, spec, suggest, to_json
from vlpjax.data.tokenizers import Tokenizer
from vlpjax.data.transforms import CenterCrop, Normalize, Pad, Resize, Tiles, Trim
from vlpjax.errors import UserError
from vlpjax.experiment import build_modules
from vlpjax.mesh import Layout, make_layout
from vlpjax.models.elastic import ElasticViT, extract
from vlpjax.models.towers import Towers
from vlpjax.state import TrainState
from vlpjax.weights import Preprocessing, save_pretrained
from vlpjax.weights.encoders import BIAS, SCALE
from vlpjax.weights.exporting import complete_or_nothing, tokenizer_files
from vlpjax.weights.families import family_holding, family_named
from vlpjax.weights.families.vit_mae import MAE_DECODER
from vlpjax.weights.importing import family_for, read_variables
from vlpjax.weights.opening import open_weights
from vlpjax.workdir import read_config


def export_run(
    workdir: str,
    out: str,
    tower: str = "",
    params: str = "student",
    family: str = "",
    dtype: str = "float32",
    overwrite: bool = False,
) -> str:
    """Writes the folder; returns the name of the family that it is written as.

    Raises:
      UserError: a run, tower, teacher or family that there is not, or a model that no family can hold; nothing is
        written then.
    """
    config = read_config(workdir)
    modules, _ = build_modules(config, "float32")
    if tower and tower not in modules:
        raise UserError(f"The run in {workdir!r} has no tower {tower!r}{suggest(tower, modules)}.")
    names = {name: their_name(name, config) for name in modules}
    model = modules[tower] if tower else Towers.of({names[name]: module for name, module in modules.items()})
    # Asked before the checkpoint is read, which may take long.
    if family:
        family_named(family).describe(model)
    else:
        family = family_holding(model)[0].name
    variables = load_variables(workdir, params)
    if tower:
        kept = {kind: tree[tower] for kind, tree in variables.items() if tower in tree}
    else:
        kept = {kind: {names[name]: part for name, part in tree.items()} for kind, tree in variables.items()}
    parts = [modules[tower]] if tower else list(modules.values())
    save_pretrained(
        model,
        kept,
        out,
        family=family,
        dtype=dtype,
        preprocessing=preprocessing_of(config) if _any_has(parts, "image_size") else None,
        tokenizer=tokenizer_of(config) if _any_has(parts, "vocabulary") else None,
        overwrite=overwrite,
    )
    return family


def their_name(name: str, config: ConfigDict) -> str:
    """The name that families know a head by; a run may call its objective as it likes."""
    for head in (SCALE, BIAS, MAE_DECODER):
        if (
            len(config.objectives) == 1
            and name == f"{next(iter(config.objectives))}_{head.partition('_')[2]}"
        ):
            return head
    return name


def preprocessing_of(config: ConfigDict) -> Preprocessing | None:
    """How the run's evaluators (or, without any, its training) make images ready; None if they do not say it all."""
    for transforms in _pipelines(config):
        if any(_is_a(transforms[name], Trim, Pad) for name in transforms):
            continue
        steps = [
            build(transforms[name])
            for name in transforms
            if _is_a(transforms[name], Resize, CenterCrop, Tiles, Normalize)
        ]
        found: dict[type, Any] = {type(step): step for step in steps}
        resize, crop, tiles, normalize = (found.get(kind) for kind in (Resize, CenterCrop, Tiles, Normalize))
        if normalize is None:
            continue
        low, high = (-1.0, 1.0) if normalize.range == "-1..1" else (0.0, 1.0)
        values: dict[str, Any] = dict(
            value_range=(low, high),
            mean=tuple(normalize.mean or (0.0, 0.0, 0.0)),
            std=tuple(normalize.std or (1.0, 1.0, 1.0)),
        )
        if tiles is not None and resize is None and crop is None:
            tiling = tiles.tiling
            return Preprocessing(
                size=(tiling.tile, tiling.tile),
                interpolation=tiles.resample,
                resolutions=tuple((height, width) for height, width in tiling.resolutions),
                **values,
            )
        if (
            resize is None
            or tiles is not None
            or resize.mode == "pad"
            or (resize.mode == "shorter") != (crop is not None)
        ):
            continue
        size = crop.size if crop is not None else resize.size
        return Preprocessing(
            size=(size, size) if isinstance(size, int) else tuple(size),
            shortest_edge=resize.size if crop is not None else None,
            interpolation=resize.resample,
            **values,
        )
    return None


def tokenizer_of(config: ConfigDict) -> Tokenizer | None:
    """The run's tokenizer, if there is one."""
    for transforms in _pipelines(config):
        for name in transforms:
            step = transforms[name]
            if isinstance(step, ConfigDict) and "tokenizer" in step and _is_a(step.tokenizer, Tokenizer):
                tokenizer: Tokenizer = build(step.tokenizer)
                return tokenizer
    return None


def _pipelines(config: ConfigDict) -> Iterator[ConfigDict]:
    """The transforms of the evaluators' data, then of the training data."""
    for name in config.get("evaluators", {}):
        data = config.evaluators[name].get("data")
        if isinstance(data, ConfigDict) and "transforms" in data:
            yield data.transforms
    train = config.get("data", {}).get("train")
    if isinstance(train, ConfigDict) and "transforms" in train:
        yield train.transforms


def _is_a(node: Any, *kinds: type) -> bool:
    if not isinstance(node, ConfigDict) or TYPE not in node:
        return False
    described = resolve(node[TYPE])
    return isinstance(described, type) and issubclass(described, kinds)


def _any_has(modules: Sequence[nn.Module], field: str) -> bool:
    return any(hasattr(module, field) for module in modules)


def import_folder(
    model: str, out: str, tower: str = "", family: str = "", mesh: str = "", overwrite: bool = False
) -> Config:
    """Writes the work directory; returns its config.

    Raises:
      UserError: weights that cannot be read, or a directory that is there; nothing is written then.
    """
    opened = open_weights(model)
    chosen = family_for(opened, family or None)
    module = chosen.build(opened.config)
    if isinstance(module, Towers):
        if tower:
            raise UserError(
                f"{model} holds the towers {', '.join(module)}, which have names; --tower is for a single one."
            )
        modules = {name: make() for name, make in module.makers.items()}
    else:
        tower = tower or ("image" if hasattr(module, "image_size") else "text")
        modules = {tower: module}
    towers = {name: described(part) for name, part in modules.items()}
    config = Config(name=f"weights of {Path(model).name}", towers=towers, objectives={})
    with complete_or_nothing(Path(out).absolute(), overwrite=overwrite) as partial:
        assert partial is not None, "one process imports"
        variables = read_variables(chosen, module, opened, _layout(mesh))
        if tower:
            variables = {kind: {tower: tree} for kind, tree in variables.items()}
        _write_companions(Path(model), partial)
        _write_run(partial, config, variables, {"source": str(model), "family": chosen.name})
    return config


def extract_run(
    workdir: str,
    out: str,
    width: int,
    depth: int,
    tower: str = "image",
    params: str = "ema",
    overwrite: bool = False,
) -> Config:
    """Writes a work directory with a sub-network of a run's elastic tower, as an ordinary ViT; returns its config.

    Args:
      workdir: of a run of :class:`vlpjax.objectives.poa.POA`.
      width, depth: of the sub-network.
      params: whose parameters are cut: the name of a teacher, or ``"student"``.

    Raises:
      UserError: a run, tower, teacher or size that there is not; nothing is written then.
    """
    modules, _ = build_modules(read_config(workdir), "float32")
    elastic = modules.get(tower)
    if not isinstance(elastic, ElasticViT):
        known = [name for name, module in modules.items() if isinstance(module, ElasticViT)]
        raise UserError(f"The run in {workdir!r} has no elastic tower {tower!r}{suggest(tower, known)}.")
    variables = load_variables(workdir, params)
    cut, vit = extract(variables["params"][tower], elastic.tower, width, depth)
    config = Config(
        name=f"{width}x{depth} of {Path(workdir).name}",
        towers={tower: described(vit.clone(dtype=None))},
        objectives={},
    )
    with complete_or_nothing(Path(out).absolute(), overwrite=overwrite) as partial:
        assert partial is not None, "one process extracts"
        _write_run(partial, config, {"params": {tower: cut}}, {"source": str(workdir), "params": params})
    return config


def _write_run(workdir: Path, config: Config, variables: Any, record: dict[str, Any]) -> None:
    """A run before its first step: its config and its only checkpoint."""
    (workdir / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, _state(variables), record)
    checkpoints.wait()
    checkpoints.close()


def described(value: Any) -> Any:
    """The spec that builds a module (or another dataclass) like this one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            field.name
            for field in dataclasses.fields(value)
            if field.init and field.name not in ("parent", "name")
        ]
        return spec(type(value), **{field: described(getattr(value, field)) for field in fields})
    if isinstance(value, (tuple, list)):
        return tuple(described(item) for item in value)
    return value


def _state(variables: Any) -> TrainState:
    """The state of a run before its first step, of which there are only weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        optimizer={},
        teachers={},
        objectives={},
        statistics=variables.get("batch_stats", {}),
    )


def _layout(text: str) -> Layout | None:
    if not text:
        return None
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.lstrip("-").isdigit():
            raise UserError(f"--mesh is {text!r}; write axes and sizes, such as fsdp=8 or fsdp=4,tensor=2.")
        sizes[axis] = int(size)
    return make_layout(sizes)


def _write_companions(model: Path, out: Path) -> None:
    """The tokenizer and the preprocessing, where the folder has them."""
    folder = model if model.is_dir() else model.parent
    files: dict[str, bytes] = {}
    if model.suffix == ".gguf":
        from vlpjax.weights.gguf_files import gguf_tokenizer

        files = gguf_tokenizer(model)
    elif any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        files = tokenizer_files(folder)
    if files:
        (out / "tokenizer").mkdir()
    for name, content in files.items():
        (out / "tokenizer" / name).write_bytes(content)
    preprocessing = folder / "preprocessor_config.json"
    if preprocessing.is_file():
        shutil.copyfile(preprocessing, out / preprocessing.name)
