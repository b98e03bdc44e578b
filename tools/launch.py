"""Writes the job of a run for an engine that is there, and submits it: Slurm, Kubernetes, xpk, Cloud TPU VMs.

    python tools/launch.py --engine=slurm --name=clip --nodes=8 --gpus_per_node=8 --partition=gpu \\
        --config=experiments/contrastive/clip.py:paper --workdir=/shared/runs/clip --dry_run
    python tools/launch.py --engine=jobset --name=clip --topology=v5p:4x4x8 --slices=2 --image=REGISTRY/IMAGE \\
        --config=experiments/contrastive/clip.py:paper --workdir=/shared/runs/clip --config.mesh.replica=2
    python tools/launch.py --engine=xpk --name=clip --cluster=CLUSTER --topology=v6e:16x16 --image=... --config=...
    python tools/launch.py --engine=tpu_vm --name=TPU --zone=us-east5-a --config=... --workdir=...

``--dry_run`` prints exactly what would be submitted and does nothing.  ``--engine=NAME --help`` lists an engine's
options; ``--env.NAME=VALUE`` sets a variable for the job; ``--config.ANY.LEAF=VALUE`` goes to the run.  A run that
crashed is started again, at most ``--restarts`` times, and continues where its last checkpoint stands.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from tools._engines import ENGINES, Engine  # noqa: E402
from vlpjax.config import suggest  # noqa: E402
from vlpjax.errors import UserError, tells_mistakes  # noqa: E402

FOR_THE_RUN = ("config", "workdir", "mode")
SWITCHES = ("dry_run", "help")


def read(arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Options of the job, its environment, and the arguments of the run.

    Raises:
      UserError: something that is no option, or has no value.
    """
    options: dict[str, str] = {}
    env: dict[str, str] = {}
    run: list[str] = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not (equals or name in SWITCHES):
            raise UserError(f"{argument!r} is no option of this program; options are written --NAME=VALUE.")
        if name in FOR_THE_RUN or name.startswith("config."):
            run.append(argument)
        elif name.startswith("env."):
            env[name.removeprefix("env.")] = value
        else:
            options[name] = value
    return options, env, tuple(run)


def make(options: dict[str, str], env: dict[str, str], run: tuple[str, ...]) -> Engine:
    """The job.

    Raises:
      UserError: an unknown engine or option, one that is missing, or a value that is none.
    """
    kind = engine_class(options)
    given = {name: value for name, value in options.items() if name not in ("engine", *SWITCHES)}
    known = {item.name: item for item in dataclasses.fields(kind) if item.name not in ("command", "env")}
    for name in given:
        if name not in known:
            raise UserError(f"--engine={options['engine']} has no option --{name}{suggest(name, known)}.")
    missing = [
        name for name, item in known.items() if name not in given and item.default is dataclasses.MISSING
    ]
    missing += [name for name in ("config", "workdir") if not any(x.startswith(f"--{name}=") for x in run)]
    if missing:
        raise UserError(f"--{missing[0]} is missing; --engine={options['engine']} needs it.")
    values = {name: _value(name, text, known[name].type) for name, text in given.items()}
    return kind(command=("-m", "vlpjax.main", *run), env=env, **values)


def engine_class(options: dict[str, str]) -> type[Engine]:
    """The class that ``--engine`` names."""
    name = options.get("engine", "")
    if name not in ENGINES:
        raise UserError(f"--engine is {name!r}{suggest(name, ENGINES)}.")
    return ENGINES[name]


def _value(name: str, text: str, kind: Any) -> Any:
    """The text as what the field holds, a number or a text."""
    if kind != "int":
        return text
    if not text.isdecimal():
        raise UserError(f"--{name} is {text!r}, which is no whole number.")
    return int(text)


def explain(kind: type[Engine]) -> str:
    """The options of an engine, with their defaults."""
    lines = []
    for item in dataclasses.fields(kind):
        if item.name not in ("command", "env"):
            default = "needed" if item.default is dataclasses.MISSING else item.default
            lines.append(f"  --{item.name}={default}")
    return f"{kind.__doc__}\n" + "\n".join(lines)


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, env, run = read(arguments)
    if "help" in options or not arguments:
        print(explain(engine_class(options)) if "engine" in options else __doc__)
        return 0
    job = make(options, env, run)
    print(job.text() if "dry_run" in options else job.submit(), end="" if "dry_run" in options else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
