"""The command lines of the weight exchange, on a run and on what `transformers` wrote."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from safetensors.numpy import load_file

from tests.tiny import LENGTH, SIZE, run_config
from tools import export_torch, import_torch
from vlpjax import exchange
from vlpjax.checkpoint import Checkpoints, load_params, load_variables
from vlpjax.config import build, spec, to_json
from vlpjax.data.tiling import Tiling
from vlpjax.data.transforms import Decode, Normalize, Resize, Tiles
from vlpjax.errors import UserError
from vlpjax.experiment import build_modules
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.state import TrainState
from vlpjax.weights import Preprocessing, from_pretrained
from vlpjax.workdir import read_config


def write_run(workdir, config, seed=0):
    """A work directory as a run leaves it after 7 steps, with a teacher of the image tower."""
    modules, _ = build_modules(config, "float32")

    def call_all(towers):
        images = jax.numpy.zeros((1, SIZE, SIZE, 3))
        inputs = {"image": (images,), "text": (jax.numpy.ones((1, LENGTH), int),)}
        return {name: towers.call(name, *inputs.get(name, ())) for name in towers}

    towers = Towers.of(modules)
    variables = jax.jit(lambda: towers.init({"params": jax.random.key(seed)}, method=call_all))()
    variables = jax.tree.map(lambda leaf: leaf + 0.01, meta.unbox(variables))  # no bias is 0
    teacher = {"image": jax.tree.map(lambda leaf: 2 * leaf, variables["params"]["image"])}
    state = TrainState(
        step=jax.numpy.asarray(7),
        params=variables["params"],
        optimizer={},
        teachers={"ema": teacher},
        objectives={},
        statistics=variables.get("batch_stats", {}),
    )
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, state, {})
    checkpoints.wait()
    checkpoints.close()
    return towers, variables


def clip_config():
    """The tiny run with towers that CLIP can hold, and an objective with a name of its own."""
    config = run_config()
    config.towers.text.pool = "eot"
    config.towers.text.eos_id = 3
    config.objectives = dict(pairs=dict(weight=1.0, loss=spec(InfoNCE)))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "clip"
    return (workdir, *write_run(workdir, clip_config()))


def test_a_run_becomes_a_clip_that_transformers_loads(run, tmp_path, capsys):
    workdir, towers, variables = run
    assert export_torch.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: clip\n"
    model, report = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    ids = np.array([[5, 6, 3, 0, 0, 0, 0, 0], [7, 8, 9, 10, 3, 0, 0, 0]])
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids), torch.tensor(images.transpose(0, 3, 1, 2)))

    def both(towers):
        found = [towers["image"](images)["embedding"], towers["text"](ids)["embedding"]]
        scale = jax.numpy.exp(towers["pairs_logit_scale"]())
        unit = [x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True) for x in found]
        return scale * unit[0] @ unit[1].T

    ours = jax.jit(lambda: towers.apply(variables, method=both))()
    np.testing.assert_allclose(theirs.logits_per_image.numpy(), ours, rtol=1e-4, atol=1e-4)


def test_preprocessing_and_tokenizer_go_along(run, tmp_path):
    exchange.export_run(str(run[0]), str(tmp_path / "out"))
    fields = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert fields["size"] == {"height": SIZE, "width": SIZE} and fields["image_mean"] == [0.5] * 3
    assert (tmp_path / "out/spiece.model").stat().st_size > 1000


@pytest.mark.parametrize("params", ["student", "ema"])
def test_one_tower_of_the_student_or_of_a_teacher(run, tmp_path, params):
    workdir, _, variables = run
    name = exchange.export_run(
        str(workdir), str(tmp_path / "out"), tower="image", params=params, dtype="bfloat16"
    )
    assert name == "clip_vision"
    found = load_file(tmp_path / "out/model.safetensors")
    bias = next(tensor for key, tensor in found.items() if key.endswith("layers.0.mlp.fc1.bias"))
    expected = (2 if params == "ema" else 1) * np.asarray(
        variables["params"]["image"]["block_0"]["mlp"]["up"]["bias"]
    )
    np.testing.assert_array_equal(bias, expected.astype(bias.dtype))
    assert bias.dtype.name == "bfloat16"
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_what_cannot_be_exported_is_told_before_anything_is_written(run, tmp_path, capsys):
    workdir = str(run[0])
    conv = clip_config()
    conv.towers.image = spec(
        ViT,
        image_size=SIZE,
        patch=8,
        width=16,
        depth=1,
        heads=2,
        embedding=16,
        stem="conv",
        stem_norm="layer",
    )
    (tmp_path / "conv").mkdir()
    (tmp_path / "conv/config.json").write_text(to_json(conv))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text(to_json(clip_config()))
    out = tmp_path / "out"
    wrong = {
        "has no tower 'imag'; did you mean 'image'": [f"--workdir={workdir}", "--tower=imag"],
        "has no parameters of 'emma'; there are 'student', 'ema'": [f"--workdir={workdir}", "--params=emma"],
        "no family 'clop'; did you mean 'clip'": [f"--workdir={workdir}", "--family=clop"],
        "stem": [f"--workdir={tmp_path / 'conv'}", "--family=clip"],
        "No family can hold this Towers": [f"--workdir={tmp_path / 'conv'}"],
        "There is no run with checkpoints": [f"--workdir={tmp_path / 'empty'}"],
        "There is no run in": [f"--workdir={tmp_path / 'nothing'}"],
    }
    for message, arguments in wrong.items():
        assert export_torch.main([*arguments, f"--out={out}"]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert not out.exists()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A CLIP image tower as `transformers` writes it."""
    folder = tmp_path_factory.mktemp("theirs") / "vision"
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def test_a_folder_becomes_a_checkpoint_to_start_from(vision, tmp_path, capsys):
    out = tmp_path / "start"
    assert import_torch.main([f"--model={vision}", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}: image\n"
    model, variables = from_pretrained(vision)
    params = load_params(str(out))
    jax.tree.map(np.testing.assert_array_equal, params, {"image": variables["params"]})
    assert build(read_config(out).towers.image) == model
    assert (out / "preprocessor_config.json").is_file()


def test_a_checkpoint_of_an_imported_tower_is_exported_again(vision, tmp_path):
    exchange.import_folder(str(vision), str(tmp_path / "start"), tower="eye", mesh="fsdp=8")
    assert set(load_variables(str(tmp_path / "start"))["params"]) == {"eye"}
    exchange.export_run(str(tmp_path / "start"), str(tmp_path / "back"), tower="eye")
    before, after = load_file(vision / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_what_cannot_be_imported_is_told_and_leaves_nothing(vision, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(vision, broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-4])
    out = tmp_path / "out"
    wrong = {
        "is cut off": [f"--model={broken}"],
        "There is no folder or file": [f"--model={tmp_path / 'nothing'}"],
        "--mesh is 'fsdp'": [f"--model={vision}", "--mesh=fsdp"],
        "no family 'clop'": [f"--model={vision}", "--family=clop"],
    }
    for message, arguments in wrong.items():
        assert import_torch.main([*arguments, f"--out={out}"]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    exchange.import_folder(str(vision), str(out))
    with pytest.raises(UserError, match="is there already"):
        exchange.import_folder(str(vision), str(out))


def test_tiles_are_written_as_the_preprocessing_that_they_are():
    config, resolutions = run_config(), ((16, 32), (32, 16))
    config.evaluators = {}
    config.data.train.transforms = dict(
        decode=spec(Decode),
        tiles=spec(Tiles, tiling=spec(Tiling, tile=16, grid=2, resolutions=resolutions), resample="bilinear"),
        normalize=spec(Normalize, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)),
    )
    said = Preprocessing(
        (16, 16), interpolation="bilinear", mean=(0.5, 0.4, 0.3), std=(0.2,) * 3, resolutions=resolutions
    )
    assert exchange.preprocessing_of(config) == said
    config.data.train.transforms = dict(resize=spec(Resize, size=16), **config.data.train.transforms)
    assert exchange.preprocessing_of(config) is None  # resized twice, which no such file can say
