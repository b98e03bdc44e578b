"""Jobs for engines: what would be submitted says what it should, does what it says, and mistakes are one sentence."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import ROOT
from tools import launch
from tools._engines import EXPLAINED
from tools._tpus import Slice, topologies
from vlpjax.errors import UserError

RUN = ("--config=experiments/contrastive/clip.py:paper", "--workdir=/shared/clip", "--config.seed=3")
COMMAND = ["-m", "vlpjax.main", *RUN]
SLURM = ("--engine=slurm", "--name=clip", "--nodes=4", "--gpus_per_node=8", *RUN)
TPUS = ("--engine=jobset", "--name=clip", "--image=here/image", "--topology=v5p:4x4x8", *RUN)
GPUS = ("--engine=jobset", "--name=clip", "--image=here/image", "--nodes=4", *RUN)
XPK = ("--engine=xpk", "--name=clip", "--image=here/image", "--cluster=ours", "--topology=v6e:16x16", *RUN)
TPU_VM = ("--engine=tpu_vm", "--name=pod", "--zone=us-east5-a", *RUN)


def printed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``--dry_run`` prints."""
    assert launch.main([*arguments, "--dry_run"]) == 0
    return capsys.readouterr().out


def told(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a mistake."""
    assert launch.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these programs are found first; each also writes its arguments to ``NAME.said``."""
    for name, script in scripts.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\necho "$@" >> {folder}/{name}.said\n{script}\n')
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def calls(folder: Path, name: str) -> int:
    said = folder / f"{name}.said"
    return len(said.read_text().splitlines()) if said.exists() else 0


# --- Slurm --------------------------------------------------------------------------------------------------------


def test_a_slurm_job_asks_for_a_process_per_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(*SLURM, "--partition=gpu", "--time=2-12", "--env.WORDS=a b", capsys=capsys)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH")
    )
    assert options == {
        "job-name": "clip",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "2-12",
        "partition": "gpu",
        "output": "logs/%x-%j.log",
        "open-mode": "append",
        "requeue": "",
    }
    (command,) = [shlex.split(line) for line in lines if line.startswith("srun")]
    assert command == ["srun", "--kill-on-bad-exit=1", "python", *COMMAND, "--coordinator=auto"]
    assert "export WORDS='a b'" in lines
    assert not any(line.startswith("cd ") for line in lines)  # Slurm starts a job where it was submitted


def test_a_container_is_given_to_srun(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(*SLURM, "--image=here/image", capsys=capsys)
    assert "srun --kill-on-bad-exit=1 --container-image=here/image python -m" in text


@pytest.mark.parametrize(
    ("code", "restarted", "again"),
    [(0, 0, False), (1, 0, True), (EXPLAINED, 0, False), (1, 3, False), (137, 2, True)],
)
def test_a_slurm_job_that_crashed_is_queued_again_until_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, restarted: int, again: bool
) -> None:
    env = programs(tmp_path, srun=f"exit {code}", scontrol="")
    env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted)}
    script = printed(*SLURM, "--restarts=3", f"--directory={tmp_path}", capsys=capsys)
    assert subprocess.run(["bash", "-c", script], env=env, check=False).returncode == code
    assert calls(tmp_path, "srun") == 1
    assert ((tmp_path / "scontrol.said").read_text() if again else "") == ("requeue 7\n" if again else "")
    assert calls(tmp_path, "scontrol") == int(again)


def test_slurm_is_given_what_was_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: submitit sets up logging when it is imported, and closes what pytest listens to."""
    env = programs(tmp_path, srun="", sbatch=f'cp "$1" {tmp_path}/given; echo Submitted batch job 41')
    job = (*SLURM, f"--logs={tmp_path}/logs")

    def submit() -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "tools/launch.py", *job]
        return subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, check=False)

    done = submit()
    assert (done.returncode, done.stdout, done.stderr) == (0, "job 41\n", "")
    assert (tmp_path / "given").read_text() == printed(*job, capsys=capsys)
    programs(tmp_path, sbatch="echo no such partition >&2; exit 1")
    done = submit()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Slurm does not take the job: no such partition\n"


def test_a_slurm_job_is_printed_without_submitit_and_not_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "submitit is not installed" in told(*SLURM, capsys=capsys)
    assert "#SBATCH" in printed(*SLURM, capsys=capsys)


# --- Kubernetes ---------------------------------------------------------------------------------------------------


def parts(text: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A JobSet, its one replicated job, that job's spec, and its pod's."""
    manifest = json.loads(text)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    return manifest, replicated, job, job["template"]["spec"]


def test_a_job_set_has_a_job_per_slice_and_a_pod_per_host(capsys: pytest.CaptureFixture[str]) -> None:
    manifest, replicated, job, pod = parts(
        printed(*TPUS, "--slices=2", "--env.A=1", "--queue=q", capsys=capsys)
    )
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "clip"
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert list(manifest["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 32, 32)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    (container,) = pod["containers"]
    assert container["image"] == "here/image"
    assert container["command"] == ["python", *COMMAND, "--coordinator=auto"]
    assert container["env"] == [{"name": "A", "value": "1"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_on_gpus_a_pod_knows_the_others_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    manifest, replicated, job, pod = parts(printed(*GPUS, "--gpu=nvidia-h100-80gb", capsys=capsys))
    (container,) = pod["containers"]
    assert (replicated["replicas"], job["parallelism"], job["completionMode"]) == (1, 4, "Indexed")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    first = f"clip-{replicated['name']}-0-0.clip"  # JobSet-job-replica-pod, and the subdomain that is the JobSet's
    assert container["command"][-3:] == [
        f"--coordinator={first}:{container['ports'][0]['containerPort']}",
        "--num_processes=4",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@pytest.mark.parametrize("job", [TPUS, GPUS])
def test_a_job_set_starts_again_as_a_whole_until_the_limit_and_not_after_an_explained_end(
    job: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, _, job_spec, pod = parts(printed(*job, "--restarts=4", capsys=capsys))
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 4
    assert manifest["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (rule,) = job_spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [EXPLAINED]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert (job_spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")


def test_kubernetes_is_given_what_was_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = programs(tmp_path, kubectl=f"cat > {tmp_path}/given; echo jobset created")
    monkeypatch.setenv("PATH", env["PATH"])
    assert launch.main(list(TPUS)) == 0
    assert capsys.readouterr().out == "jobset created\n"
    assert (tmp_path / "kubectl.said").read_text().split()[0] == "create"
    assert (tmp_path / "given").read_text() == printed(*TPUS, capsys=capsys)
    programs(tmp_path, kubectl="cat > /dev/null; echo a hint; echo no such namespace >&2; exit 1")
    assert "kubectl ended with code 1: no such namespace" in told(*TPUS, capsys=capsys)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "kubectl is not installed" in told(*TPUS, capsys=capsys)


# --- Google Cloud -------------------------------------------------------------------------------------------------


def test_an_xpk_workload_names_the_slice_and_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(*XPK, "--slices=2", "--restarts=5", "--env.A=b c", "--zone=us-east5-a", capsys=capsys)
    program, *arguments = shlex.split(text)
    assert [program, *arguments[:2]] == ["xpk", "workload", "create"]
    options = [argument.removeprefix("--").partition("=")[::2] for argument in arguments[2:]]
    assert dict(options) == {
        "workload": "clip",
        "cluster": "ours",
        "tpu-type": "v6e-16x16",
        "num-slices": "2",
        "docker-image": "here/image",
        "priority": "medium",
        "max-restarts": "5",
        "restart-on-user-code-failure": "",
        "zone": "us-east5-a",
        "env": "A=b c",
        "command": shlex.join(["python", *COMMAND, "--coordinator=auto"]),
    }


def test_every_host_of_a_tpu_runs_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = shlex.split(printed(*TPU_VM, "--project=ours", capsys=capsys))
    assert line[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert {"--zone=us-east5-a", "--project=ours", "--worker=all"} <= set(line)
    assert line[-1].startswith("--command=cd ~/vlpjax && nohup bash -c ")
    many = shlex.split(printed(*TPU_VM, "--slices=2", capsys=capsys))
    assert many[3] == "queued-resources" and "--node=all" in many


@pytest.mark.parametrize(("code", "attempts"), [(0, 1), (1, 3), (EXPLAINED, 1)])
def test_a_host_starts_again_after_a_crash_until_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, attempts: int
) -> None:
    env = programs(tmp_path, python3=f'echo "$WORDS" > {tmp_path}/words; exit {code}', sleep="", nohup='"$@"')
    env["HOME"] = str(tmp_path)
    job = (*TPU_VM, "--restarts=2", f"--directory={tmp_path}", "--env.WORDS=it's here")
    remote = shlex.split(printed(*job, capsys=capsys))[-1].removeprefix("--command=")
    done = subprocess.run(
        ["bash", "-c", f"{remote}; wait"], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the output goes to ~/pod.log\n"
    assert (tmp_path / "python3.said").read_text() == f"{' '.join(COMMAND)} --coordinator=auto\n" * attempts
    assert (tmp_path / "words").read_text() == "it's here\n"
    assert (tmp_path / "pod.log").read_text().endswith(f"ended with {code}\n")


def test_a_host_can_run_a_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = programs(tmp_path, sudo="", nohup='"$@"') | {"HOME": str(tmp_path)}
    job = (*TPU_VM, "--image=here/image", f"--directory={tmp_path}", "--env.A=1")
    remote = shlex.split(printed(*job, capsys=capsys))[-1].removeprefix("--command=")
    subprocess.run(["bash", "-c", f"{remote}; wait"], env=env, capture_output=True, check=True)
    said = (tmp_path / "sudo.said").read_text()
    assert f"--volume={tmp_path}:/work" in said
    assert said.endswith(f"--env=A here/image python3 {' '.join(COMMAND)} --coordinator=auto\n")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("v5p:4x4x8", 32),
        ("v5e:16x16", 64),
        ("v6e:2x4", 2),
        ("v6e:1x1", 1),
        ("tpu7x:4x4x4", 16),
        ("v4:2x2x1", 1),
        ("v5p:16x16x24", 1536),
    ],
)
def test_a_slice_has_hosts(text: str, hosts: int) -> None:
    found = Slice.parse(text)
    assert (found.hosts, f"{found.kind}:{found.topology}") == (hosts, text)


def test_tori_are_made_of_cubes() -> None:
    known = topologies("v5p")
    assert {"4x4x12", "4x8x8", "8x16x20", "12x12x36"} <= set(known)
    assert not {"4x8x4", "2x4x8", "4x4x6", "16x16x28"} & set(known)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--engine=slrum",), ["'slrum'", "did you mean 'slurm'", "tpu_vm"]),
        (("--name=x",), ["--engine is ''"]),
        (("--engine=slurm", *RUN), ["--name is missing", "--engine=slurm"]),
        (("--engine=slurm", "--name=x", "--config=a.py"), ["--workdir is missing"]),
        (("--engine=jobset", "--name=x", *RUN), ["--image is missing"]),
        (("--engine=xpk", "--name=x", "--image=i", "--cluster=c", *RUN), ["--topology is missing"]),
        ((*SLURM, "--node=4"), ["no option --node", "did you mean 'nodes'"]),
        ((*SLURM, "--nodes=four"), ["--nodes is 'four'", "whole number"]),
        ((*SLURM, "--nodes=0"), ["--nodes is 0"]),
        ((*SLURM, "--time=soon"), ["--time is 'soon'", "HOURS:MINUTES:SECONDS"]),
        ((*SLURM, "--env.A-B=1"), ["A-B", "environment"]),
        ((*SLURM, "nodes=4"), ["'nodes=4' is no option"]),
        ((*SLURM, "--nodes"), ["'--nodes'", "--NAME=VALUE"]),
        ((*TPUS, "--name=My_Run"), ["'My_Run'", "JobSet takes names"]),
        ((*TPUS, "--nodes=2"), ["give one of the two"]),
        ((*GPUS, "--slices=2"), ["--slices=2 is of TPUs"]),
        ((*TPUS, "--topology=v5p:4x4x9"), ["no slice 4x4x9 of v5p", "144 chips", "4x4x8"]),
        ((*TPUS, "--topology=v5e:8x32"), ["no slice 8x32", "16x16"]),
        ((*TPUS, "--topology=v5q:4x4x4"), ["no TPU 'v5q'", "did you mean 'v5"]),
        ((*TPUS, "--topology=v5p-128"), ["'v5p-128'", "v5p:4x4x8"]),
        ((*XPK, "--topology=v6e"), ["'v6e' is not of the form v6e:1x1"]),
        ((*XPK, "--slices=0"), ["--slices is 0"]),
        ((*TPU_VM, "--zone=europe"), ["'europe'", "us-east5-a"]),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: tuple[str, ...], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = told(*arguments, "--dry_run", capsys=capsys)
    assert all(part in sentence for part in parts), sentence


def test_an_engine_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--engine=xpk", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--cluster=needed" in said and "--slices=1" in said
    assert launch.main(["--help"]) == 0
    assert "--dry_run" in capsys.readouterr().out
    with pytest.raises(UserError, match="no option of this program"):
        launch.read(["-x"])
