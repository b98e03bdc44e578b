"""The planner on the real TPU compiler: its sums are those of arithmetic, and every mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.tiny import ROOT, model_config
from tools.plan import main as plan_several
from vlpjax.errors import UserError
from vlpjax.experiment import choose_precision
from vlpjax.flags import compiler_options
from vlpjax.main import main
from vlpjax.plan import check, refusal
from vlpjax.planning import topology
from vlpjax.plans import Plans, Setting, candidates, split_changes

EXPERIMENT = '''
"""An image classifier made of one scanned stack, for the planner."""

import optax
from vlpjax.config import spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import WebDataset
from vlpjax.experiment import base_config
from vlpjax.models.vit import ViT
from vlpjax.objectives.classification import Classification
from vlpjax.optim.optimizer import Optimizer, Schedule


def get_config():
    config = base_config()
    config.name = "classifier"
    config.duration = "100 steps"
    config.towers = dict(
        image=spec(ViT, image_size=64, patch=16, width=256, depth=6, heads=2, mlp_dim=1024, scan=True, remat="full")
    )
    config.objectives = dict(classify=dict(weight=1.0, loss=spec(Classification, tower="image", classes=256)))
    config.data = dict(example=dict(image="float32[64,64,3]", label="int32[]"), examples=10_000)
    config.data.train = spec(Pipeline, source=spec(WebDataset, tars="nowhere/0.tar"), transforms={}, batch_size=64)
    adam = spec(optax.scale_by_adam)
    config.optimizer = spec(Optimizer, direction=adam, learning_rate=1e-3, schedule=spec(Schedule))
    config.mesh_rules = (("tpu-TPU v5 lite-8", {"mesh.fsdp": 4, "mesh.tensor": 2}),)
    return config
'''


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What planning does to its process is undone after the test."""
    for variable, value in topology.ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "classifier.py"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planned(experiment: Path) -> tuple[dict[str, Any], str, str]:
    """The plan as JSON and as text, and the program; all that is compiled here, but for one layer."""
    files = experiment.with_name("plan.json"), experiment.with_name("plan.hlo")
    command = [
        sys.executable, "-m", "vlpjax.main", f"--config={experiment}", "--mode=plan",
        "--config.plan.topology=v5e:2x4", f"--plan_json={files[0]}", f"--plan_hlo={files[1]}",
    ]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # neither warnings nor the compiler's own noise
    return json.loads(files[0].read_text()), done.stdout, files[1].read_text()


def test_the_mesh_is_that_of_the_topology_and_its_rules(planned: Any) -> None:
    plan, text, program = planned
    assert (plan["chip"], plan["chips"], plan["mesh"]) == ("v5e", 8, {"fsdp": 4, "tensor": 2})
    assert (plan["batch"], plan["tokens"]) == (64, 0)  # rates are in images
    assert "num_partitions=8" in program
    assert "bf16" in program  # precision is that of the chips, not of this machine
    assert "classifier on v5e:2x4: 8 chips" in text


def test_flops_are_those_of_the_layers(planned: Any) -> None:
    plan = planned[0]
    tokens, width, hidden, depth = 64 * 17, 256, 1024, 6  # 16 patches and a class token for each image
    layers = depth * 2 * tokens * width * (4 * width + 2 * hidden)
    pairs = depth * 2 * 2 * 64 * 17 * 17 * width
    patches, head = 2 * (64 * 16) * (16 * 16 * 3) * width, 2 * 64 * width * 256
    expected = 3 * (layers + pairs + head) + 2 * patches
    assert plan["model_flops"] == pytest.approx(expected)
    # Rematerialisation computes the layers of the forward pass once more, but for what their gradients do not need.
    assert layers * 0.5 < plan["compiled_flops"] - plan["model_flops"] < layers * 1.1


def test_the_parts_of_memory_are_those_of_the_state(planned: Any) -> None:
    memory = planned[0]["memory"]
    parameters = 6 * (4 * 256 * 256 + 2 * 256 * 1024) * 4 / 8  # float32, over eight chips; the rest is small
    assert parameters < memory["parameters"] < 1.3 * parameters
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    parts = ("parameters", "optimizer", "teachers", "other", "batch", "temporaries")
    assert sum(memory[part] for part in parts) == pytest.approx(memory["peak"])
    assert planned[0]["fits"]


def test_every_layer_is_gathered_forward_and_backward(planned: Any) -> None:
    moved = {(one["kind"], one["axes"]): one for one in planned[0]["step"]["collectives"]}
    layers = (
        6 * (4 * 256 * 256 + 2 * 256 * 1024) * 2 / 2
    )  # bfloat16, of which tensor=2 keeps a half on each chip
    assert moved["all-gather", "fsdp"]["amount"] == pytest.approx(2 * layers, rel=0.35)
    step = planned[0]["step"]
    assert step["seconds"] == pytest.approx(
        step["compute_seconds"] + step["kernel_seconds"] + step["untimed_seconds"] + step["exposed_seconds"]
    )


def test_the_rate_follows_from_the_step(planned: Any) -> None:
    plan = planned[0]
    seconds = plan["step"]["seconds"]
    assert plan["mfu"] == pytest.approx(plan["model_flops"] / (seconds * 8 * 197e12))
    assert plan["examples_per_second_and_chip"] == pytest.approx(64 / seconds / 8)
    assert plan["days"] == pytest.approx(100 * seconds / 86400)
    assert 0 < plan["evaluation"]["cycles"] < plan["step"]["cycles"] / 2


@pytest.mark.usefixtures("planner")
def test_settings_side_by_side(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [f"--config={experiment}", "--topology=v5e:2x2"]
    small = ["--set=plan.evaluation=False", "--set=towers.image.depth=1", f"--json={tmp_path}/plans.json"]
    assert plan_several([*base, *small, "--compare", "mesh.fsdp=2,mesh.tensor=2", "mesh.fsdp=3"]) == 0
    said, reason = capsys.readouterr().out, "config.mesh has fsdp=3, but there are 4 devices"
    assert "fsdp=2 tensor=2" in said
    assert f"mesh.fsdp=3: {reason}" in said
    found = json.loads((tmp_path / "plans.json").read_text())
    assert found["plans"]["mesh.fsdp=2,mesh.tensor=2"]["mesh"] == {"fsdp": 2, "tensor": 2}
    assert found["refused"]["mesh.fsdp=3"].startswith(reason)
    assert plan_several([*base, "--compare", "mesh.fsdp=3", "mesh.fsdp=5"]) == 2  # nothing is left to compare
    assert capsys.readouterr().err.startswith(f"error: {reason}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give one of --compare with settings, --search, and --weak with topologies."),
        (["--search", "--compare", "a=1"], "Give one of --compare"),
        (["--compare", "", "--remat=full"], "--remat belongs to --search"),
        (["--search", "--batch=64,many"], "--batch names 'many'; a batch is a whole number"),
        (["--search", "--json=nowhere/plans.json"], "there is no folder nowhere."),
        (["--compare", "", "--set=fast"], "The setting 'fast' has no value"),
        (["--compare", "", "--plot=weak.svg"], "--plot draws what --weak plans."),
        (["--weak", "v5e:2x2"], "Give --topology, or --weak with several of them."),
    ],
)
@pytest.mark.usefixtures("planner")
def test_options_that_do_not_go_together_are_told_before_anything_is_compiled(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_several(["--config=none.py", "--topology=v5e:2x2", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.usefixtures("planner")
def test_a_search_tries_all_combinations(experiment: Path) -> None:
    base = [("plan.topology", "v5e:2x4")]
    found = candidates(str(experiment), base, ["fsdp=8", "fsdp=2,tensor=4"], ["none", "full"], [32, 64])
    assert len(found) == 2 * 2 * 2
    assert found[0].name == "fsdp=8 remat=none batch=32"
    assert dict(found[-1].changes).items() >= {
        ("mesh.fsdp", "2"), ("mesh.tensor", "4"), ("mesh.ring", "1"), ("towers.image.remat", "full"),
        ("data.train.batch_size", "64"),
    }  # fmt: skip
    usual = candidates(str(experiment), base, [], [], [])
    assert [one.name for one in usual] == ["fsdp=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4", "fsdp=1,tensor=8"]
    few = candidates(str(experiment), [("plan.topology", "v5e:2x2")], [], [], [])
    assert [one.name for one in few] == ["fsdp=4", "fsdp=2,tensor=2", "fsdp=1,tensor=4"]
    with pytest.raises(UserError, match="--meshes names the axis 'data'"):
        candidates(str(experiment), base, ["data=8"], [], [])


def test_what_fits_comes_first_and_of_that_the_fastest() -> None:
    @dataclass
    class Fake:
        fits: bool
        examples_per_second: float

    plans: Any = Plans([("slow", Fake(True, 1)), ("large", Fake(False, 9)), ("fast", Fake(True, 3))])
    assert [name for name, _ in plans.ranked()] == ["fast", "slow", "large"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "There is no TPU topology 'v9:2x2'; forms that exist are v5e:16x16, v5p:4x4x8"),
        ("v5p-256", "There is no TPU topology 'v5p-256'"),
        ("v5p:16x16", "has 2 axes, and a slice of v5p has 3, as in 'v5p:4x4x8'"),
        ("v5e:32x32", "is larger than a pod of v5e"),
        ("v5p:3x5x7", "The TPU compiler knows no topology 'v5p:3x5x7'"),
    ],
)
@pytest.mark.usefixtures("planner")
def test_a_topology_that_does_not_exist_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        topology.devices_of(name)


@pytest.mark.usefixtures("planner")
def test_slices_are_told_apart_and_precision_is_that_of_the_devices() -> None:
    devices = topology.devices_of("v5e:2x2*2")
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
    assert choose_precision("auto", devices)[0] == "bfloat16"
    assert choose_precision("auto")[0] == "float32"
    assert "xla_tpu_enable_async_collective_fusion" in compiler_options(devices[0])


@pytest.mark.usefixtures("planner")
def test_mistakes_are_one_sentence(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str, mode: str = "plan") -> str:
        assert main([f"--config={experiment}", f"--mode={mode}", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    place = "--config.plan.topology=v5e:2x2"
    missing = told()
    assert "config.plan.topology is not set; name one, such as --config.plan.topology=v5p:4x4x8" in missing
    assert "config.mesh has fsdp=3, but there are 4 devices" in told(place, "--config.mesh.fsdp=3")
    assert "--coordinator starts one of several processes" in told(place, "--coordinator=auto")
    assert "there is no folder nowhere." in told(place, "--plan_hlo=nowhere/a.hlo")
    assert "--plan_json belongs to --mode=plan" in told("--plan_json=a", mode="describe")
    with monkeypatch.context() as patch:
        patch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
        assert "JAX_COORDINATOR_ADDRESS='host:1' makes this one of several" in told(place)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs no TPU: pip install 'libtpu==0\.0\.\d+\.\*'"):
        topology.require_compiler()


def test_the_compiler_alone_makes_no_machine_look_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def platforms(chips: list[str], packages: tuple[str, ...], chosen: str | None = None) -> str | None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        if chosen is not None:
            monkeypatch.setenv("JAX_PLATFORMS", chosen)
        with monkeypatch.context() as patch:
            patch.setattr(topology.glob, "glob", lambda pattern: chips)
            patch.setattr(topology.importlib.util, "find_spec", lambda name: name in packages or None)
            topology.ignore_absent_chips()
        return os.environ.get("JAX_PLATFORMS")

    assert platforms([], ("libtpu",)) == "cpu"
    assert platforms([], ("libtpu",), chosen="tpu") == "tpu"
    assert platforms([], ()) is None
    assert platforms(["/dev/accel0"], ("libtpu",)) is None
    assert platforms([], ("libtpu", "jax_cuda12_plugin")) is None


def test_shares_are_checked() -> None:
    config = model_config()
    config.plan.topology = "v5e:2x2"
    config.plan.attention_efficiency = 1.5
    with pytest.raises(UserError, match="attention_efficiency is 1.5; it is a share"):
        check(config)


def test_what_the_compiler_refuses_is_passed_on() -> None:
    large = refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded."
    )
    assert "does not fit: it needs 20.5G of 15.75G" in str(large)
    assert "refuses this step: UNIMPLEMENTED: no such thing." in str(
        refusal("UNIMPLEMENTED: no such\n thing.")
    )


def test_options_of_the_compiler() -> None:
    class Device:
        def __init__(self, platform: str, kind: str):
            self.platform, self.device_kind = platform, kind

    assert compiler_options(Device("cpu", "cpu")) == {}
    assert "xla_tpu_enable_async_all_to_all" in compiler_options(Device("tpu", "TPU v5"))
    assert "xla_tpu_enable_async_all_to_all" not in compiler_options(Device("tpu", "TPU v6 lite"))
    own = compiler_options(
        Device("gpu", "H100"), ("--xla_a=1", "xla_gpu_enable_latency_hiding_scheduler=false")
    )
    assert own["xla_a"] == "1"
    assert own["xla_gpu_enable_latency_hiding_scheduler"] == "false"
    with pytest.raises(UserError, match="holds 'fast'; an option is written 'name=value'"):
        compiler_options(Device("cpu", "cpu"), ("fast",))


def test_settings_are_split_at_commas_outside_of_brackets() -> None:
    assert list(split_changes("a=1,b=(2,3),c='x,y'")) == ["a=1", "b=(2,3)", "c='x,y'"]
    assert Setting.of("config.mesh.fsdp=4,seed=1").changes == (("mesh.fsdp", "4"), ("seed", "1"))
    assert Setting.of("") == Setting("", ())
    with pytest.raises(UserError, match="'fast' has no value"):
        Setting.of("fast")
