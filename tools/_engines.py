"""What runs jobs: a dataclass per engine, which writes the job as text and hands it over.

The job is always the same command, which continues what an earlier attempt began; an engine adds where it runs and
how often it is started again.  Only crashes are: a mistake that the program itself explains (:data:`EXPLAINED`) ends
the job.
"""

from __future__ import annotations

import abc
import contextlib
import io
import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tools._tpus import Slice
from vlpjax.errors import UserError

EXPLAINED = 2  # the exit code of vlpjax.main after a sentence of its own
PORT = 55527  # of the coordinator, where no engine says one


@dataclass(frozen=True, kw_only=True)
class Engine(abc.ABC):
    """What every engine is told.

    Attributes:
      name: of the job.
      command: of every process, without what tells it about the others.
      env: variables that it finds in its environment.
      restarts: how often a job that crashed is started again, at most.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    restarts: int = 10

    pattern: ClassVar[str] = r"[A-Za-z0-9][-_.A-Za-z0-9]*"

    def __post_init__(self) -> None:
        if not re.fullmatch(self.pattern, self.name):
            raise UserError(
                f"--name is {self.name!r}; {type(self).__name__} takes names like {self.pattern}."
            )
        for variable in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", variable):
                raise UserError(f"--env.{variable} is no name of an environment variable.")
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}; it is 0 or more.")

    @abc.abstractmethod
    def text(self) -> str:
        """Exactly what is submitted."""

    @abc.abstractmethod
    def submit(self) -> str:
        """Hands :meth:`text` to the engine; returns what it says.

        Raises:
          UserError: the engine's program is missing or refuses.
        """

    @property
    def exports(self) -> str:
        """The variables, as lines of a shell."""
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.env.items())


@dataclass(frozen=True, kw_only=True)
class Slurm(Engine):
    """A batch job of Slurm, with a process per GPU, or per node where nodes have none.

    JAX finds the processes by Slurm's variables (https://docs.jax.dev/en/latest/multi_process.html), and gives each the
    GPU of its number on the node.  A job that crashed goes back into the queue under its own number, as one that was
    preempted does; ``SLURM_RESTART_COUNT`` counts both (https://slurm.schedmd.com/sbatch.html).

    Attributes:
      nodes, gpus_per_node: how many.
      cpus_per_task: of each process; 0 is Slurm's default.
      time: at most, as Slurm writes it.
      partition, account, qos, constraint: as ``sbatch`` takes them; empty ones are left out.
      directory: the checkout that runs, on a file system that the nodes share; the default is where the job is
        submitted.
      python: the interpreter there.
      image: a container, where the Pyxis plugin is installed.
      logs: folder for the output, on a shared file system.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    directory: str = ""
    python: str = "python"
    image: str = ""
    logs: str = "logs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes < 1 or self.gpus_per_node < 0:
            raise UserError(
                f"--nodes is {self.nodes} and --gpus_per_node {self.gpus_per_node}; there is a node at least."
            )
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time):
            raise UserError(f"--time is {self.time!r}; Slurm takes HOURS:MINUTES:SECONDS, or DAYS-HOURS.")

    @property
    def options(self) -> dict[str, str]:
        """What stands behind ``#SBATCH --``; an empty value is a switch."""
        asked = {
            "job-name": self.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.gpus_per_node or 1),
            "gpus-per-node": str(self.gpus_per_node or ""),
            "cpus-per-task": str(self.cpus_per_task or ""),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "output": f"{self.logs}/%x-%j.log",
        }
        return {name: value for name, value in asked.items() if value} | {
            "open-mode": "append",
            "requeue": "",
        }

    def text(self) -> str:
        head = "".join(f"#SBATCH --{name}{value and f'={value}'}\n" for name, value in self.options.items())
        container = [f"--container-image={self.image}"] if self.image else []
        line = ["srun", "--kill-on-bad-exit=1", *container, self.python, *self.command, "--coordinator=auto"]
        place = f"cd {shlex.quote(self.directory)}\n" if self.directory else ""
        return (
            f"#!/bin/bash\n{head}\n{self.exports}{place}{shlex.join(line)}\ncode=$?\n"
            f'if [ "$code" -ne 0 ] && [ "$code" -ne {EXPLAINED} ] '
            f'&& [ "${{SLURM_RESTART_COUNT:-0}}" -lt {self.restarts} ]; then\n'
            '  scontrol requeue "$SLURM_JOB_ID"\nfi\nexit "$code"\n'
        )

    def submit(self) -> str:
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "submitit is not installed, which hands jobs to Slurm: pip install 'vlpjax[launch]'; or save what "
                "--dry_run prints, and give it to sbatch."
            ) from error
        script = self.text()

        class Batch(submitit.SlurmExecutor):
            """Submits the script itself; submitit's own would run a pickled Python function."""

            def _make_submission_file_text(self, command: str, uid: str) -> str:
                del command, uid
                return script

        Path(self.logs).mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints what it raises
                job = Batch(folder=self.logs)._submit_command(shlex.join(self.command))
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            raise UserError(f"Slurm does not take the job: {' '.join(str(error).split())}") from error
        return f"job {job.job_id}"


@dataclass(frozen=True, kw_only=True)
class JobSet(Engine):
    """A JobSet of Kubernetes, on slices of TPUs in GKE or on nodes with GPUs anywhere.

    - TPUs: a job per slice and a pod per host.  GKE tells each pod its slice and place, by which JAX finds the others
      (https://cloud.google.com/tpu/docs/tpu-gke-multislice).
    - GPUs: one job with a pod per node.  A pod's name follows from its number, so that no process has to ask the
      cluster, for which it would need a right.

    When a pod fails, all start again, at most ``restarts`` times (https://jobset.sigs.k8s.io/docs/concepts/).

    Attributes:
      image: the container.
      topology: of a slice, such as ``v5p:4x4x8``; empty for GPUs.
      slices: how many, of TPUs.
      nodes, gpus_per_node: how many, of GPUs.
      gpu: the nodes' label under ``cloud.google.com/gke-accelerator``; empty takes any.
      namespace: of Kubernetes.
      queue: of Kueue, where one admits jobs.
      service_account: of Kubernetes; empty is the default's.
    """

    image: str
    topology: str = ""
    slices: int = 1
    nodes: int = 0
    gpus_per_node: int = 8
    gpu: str = ""
    namespace: str = "default"
    queue: str = ""
    service_account: str = ""

    pattern: ClassVar[str] = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
    worker: ClassVar[str] = "worker"  # of the pods' names

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.topology) == bool(self.nodes):
            raise UserError(
                "A JobSet runs on TPUs (--topology=v5p:4x4x8) or on GPUs (--nodes=N): give one of the two."
            )
        if min(self.slices, self.gpus_per_node) < 1 or self.nodes < 0:
            raise UserError("--slices, --nodes and --gpus_per_node are 1 or more.")
        if self.slices > 1 and not self.topology:
            raise UserError(f"--slices={self.slices} is of TPUs; GPUs have --nodes.")
        if self.topology:
            Slice.parse(self.topology)

    def manifest(self) -> dict[str, Any]:
        """The object that Kubernetes is given, as JSON."""
        tpu = Slice.parse(self.topology) if self.topology else None
        pods = tpu.hosts if tpu else self.nodes
        metadata: dict[str, Any] = {"name": self.name, "namespace": self.namespace}
        if self.queue:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": self.queue}
        if tpu:  # a slice is a pool of nodes, and a job has one to itself
            metadata["annotations"] = {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            }
        job = {
            "parallelism": pods,
            "completions": pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # the set starts again, not a pod of it
            "podFailurePolicy": {"rules": [explained(self.worker)]},
            "template": {"spec": self._pod(tpu)},
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {
                    "maxRestarts": self.restarts,
                    "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
                },
                "network": {"enableDNSHostnames": True},
                "replicatedJobs": [
                    {"name": self.worker, "replicas": self.slices, "template": {"spec": job}},
                ],
            },
        }

    def _pod(self, tpu: Slice | None) -> dict[str, Any]:
        selector, resource = {}, {"nvidia.com/gpu": self.gpus_per_node}
        others = [
            f"--coordinator={self.name}-{self.worker}-0-0.{self.name}:{PORT}",
            f"--num_processes={self.nodes}",
            "--process_id=$(JOB_COMPLETION_INDEX)",  # Kubernetes puts the pod's number here
        ]
        ports = [PORT]
        if tpu:
            selector = {
                "cloud.google.com/gke-tpu-accelerator": tpu.generation.label,
                "cloud.google.com/gke-tpu-topology": tpu.topology,
            }
            resource, others, ports = (
                {"google.com/tpu": tpu.chips_per_host},
                ["--coordinator=auto"],
                [8471, 8431],
            )
        elif self.gpu:
            selector = {"cloud.google.com/gke-accelerator": self.gpu}
        container = {
            "name": self.worker,
            "image": self.image,
            "command": ["python", *self.command, *others],
            "env": [{"name": name, "value": value} for name, value in self.env.items()],
            "ports": [{"containerPort": port} for port in ports],
            "resources": {"limits": resource},
        }
        pod: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
        if selector:
            pod["nodeSelector"] = selector
        if self.service_account:
            pod["serviceAccountName"] = self.service_account
        if not tpu:  # what processes on a node share when GPUs exchange data; 64 MB without it
            container["volumeMounts"] = [{"name": "memory", "mountPath": "/dev/shm"}]
            pod["volumes"] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
        return pod

    def text(self) -> str:
        return json.dumps(self.manifest(), indent=2) + "\n"

    def submit(self) -> str:
        return run(["kubectl", "create", "--filename=-"], self.text())


def explained(container: str) -> dict[str, Any]:
    """The rule that a job ends whose program explained itself; the pod failed by itself then, and was not evicted."""
    return {
        "action": "FailJob",
        "onExitCodes": {"containerName": container, "operator": "In", "values": [EXPLAINED]},
    }


@dataclass(frozen=True, kw_only=True)
class Xpk(Engine):
    """A workload of xpk on slices of TPUs in GKE (https://github.com/AI-Hypercomputer/xpk).

    Attributes:
      image: the container.
      cluster: made with ``xpk cluster create``.
      topology: of a slice, such as ``v5p:4x4x8``.
      slices: how many.
      project, zone: of Google Cloud; empty are gcloud's own.
      priority: of the workload.
    """

    image: str
    cluster: str
    topology: str
    slices: int = 1
    project: str = ""
    zone: str = ""
    priority: str = "medium"

    pattern: ClassVar[str] = JobSet.pattern

    def __post_init__(self) -> None:
        super().__post_init__()
        Slice.parse(self.topology)
        if self.slices < 1:
            raise UserError(f"--slices is {self.slices}; it is 1 or more.")

    def line(self) -> list[str]:
        """The command of xpk."""
        tpu = Slice.parse(self.topology)
        return [
            "xpk", "workload", "create",
            f"--workload={self.name}",
            f"--cluster={self.cluster}",
            # By its topology: the number of cores is that of several.
            f"--tpu-type={tpu.generation.accelerator}-{tpu.topology}",
            f"--num-slices={self.slices}",
            f"--docker-image={self.image}",
            f"--priority={self.priority}",
            f"--max-restarts={self.restarts}",
            "--restart-on-user-code-failure",  # xpk counts every exit of a program as that
            *([f"--project={self.project}"] if self.project else []),
            *([f"--zone={self.zone}"] if self.zone else []),
            *(f"--env={name}={value}" for name, value in self.env.items()),
            f"--command={shlex.join(['python', *self.command, '--coordinator=auto'])}",
        ]  # fmt: skip

    def text(self) -> str:
        return shlex.join(self.line()) + "\n"

    def submit(self) -> str:
        return run(self.line())


@dataclass(frozen=True, kw_only=True)
class TpuVM(Engine):
    """Cloud TPU VMs that are there: every host of the TPU named ``name`` runs the command, in the background.

    A crash ends the processes of all hosts, and each starts its own again
    (https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh).

    Attributes:
      zone, project: of Google Cloud; an empty project is gcloud's own.
      slices: more than 1 means a queued resource with as many nodes.
      directory: the checkout on the hosts.
      python: the interpreter there.
      image: a container that runs instead, from ``directory``.
    """

    zone: str
    project: str = ""
    slices: int = 1
    directory: str = "~/vlpjax"
    python: str = "python3"
    image: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise UserError(f"--zone is {self.zone!r}; zones are called like us-east5-a.")
        if self.slices < 1:
            raise UserError(f"--slices is {self.slices}; it is 1 or more.")

    def script(self) -> str:
        """What a host does: attempts, until one ends well or explains itself."""
        line = shlex.join([self.python, *self.command, "--coordinator=auto"])
        if self.image:
            variables = "".join(f" --env={name}" for name in self.env)
            line = (
                "sudo --preserve-env docker run --rm --privileged --network=host "
                f'--volume="$PWD":/work --workdir=/work{variables} {shlex.quote(self.image)} {line}'
            )
        return (
            f"{self.exports}for attempt in $(seq 0 {self.restarts}); do\n  {line}\n  code=$?\n"
            f'  if [ "$code" -eq 0 ] || [ "$code" -eq {EXPLAINED} ]; then break; fi\n  sleep 10\ndone\n'
            'echo "ended with $code"\n'
        )

    def line(self) -> list[str]:
        """The command of gcloud."""
        group = ["tpu-vm"] if self.slices == 1 else ["queued-resources"]
        log = f"~/{self.name}.log"
        remote = (
            f"cd {self._directory()} && nohup bash -c {shlex.quote(self.script())} >> {log} 2>&1 < /dev/null & "
            f"echo 'the output goes to {log}'"
        )
        return [
            "gcloud", "compute", "tpus", *group, "ssh", self.name,
            f"--zone={self.zone}",
            *([f"--project={self.project}"] if self.project else []),
            "--worker=all",
            *(["--node=all"] if self.slices > 1 else []),
            f"--command={remote}",
        ]  # fmt: skip

    def _directory(self) -> str:
        """Quoted, but for the home folder's sign."""
        home, slash, rest = self.directory.partition("/")
        return f"~{slash}{shlex.quote(rest) if rest else ''}" if home == "~" else shlex.quote(self.directory)

    def text(self) -> str:
        return shlex.join(self.line()) + "\n"

    def submit(self) -> str:
        return run(self.line())


ENGINES: dict[str, type[Engine]] = {"slurm": Slurm, "jobset": JobSet, "xpk": Xpk, "tpu_vm": TpuVM}


def run(line: Sequence[str], given: str = "") -> str:
    """Runs a program and returns what it says.

    Raises:
      UserError: it is not installed, or it fails.
    """
    try:
        done = subprocess.run(line, input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"{line[0]} is not installed; install it, or use what --dry_run prints where it is."
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        raise UserError(f"{line[0]} ended with code {done.returncode}: {said[-1]}")
    return done.stdout.strip()
