"""Chips that are not there: the TPU compiler's description of a slice, by its name, without any TPU.

The compiler is part of the package ``libtpu``; see https://docs.jax.dev/en/latest/aot.html for compiling without
devices.  A name such as ``"v5p:4x4x8"`` gives the generation and how many chips stand along each axis of its torus;
``"v6e:16x16*4"`` is four such slices, joined by the data-centre network.
"""

from __future__ import annotations

import glob
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from vlpjax.errors import UserError

# Generation -> axes of its torus, an example, and the largest slice.  Source: docs.cloud.google.com/tpu/docs.
GENERATIONS = {
    "v5e": (2, "v5e:16x16", (16, 16)),
    "v5p": (3, "v5p:4x4x8", (16, 20, 28)),
    "v6e": (2, "v6e:16x16", (16, 16)),
    "TPU7x": (3, "TPU7x:4x4x8", (16, 24, 24)),
}
FORMS = ", ".join(example for _, example, _ in GENERATIONS.values())

# Read by libtpu when it is loaded: it must not look for chips, ask for metadata, or mind another process.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


def prepare() -> None:
    """Sets the environment for planning; must come before JAX makes its first device.

    Raises:
      UserError: the process is one of several, or the compiler is not installed.
    """
    for name in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS"):
        if os.environ.get(name):
            raise UserError(
                f"Planning is done by a single process, and {name}={os.environ[name]!r} makes this one of several; "
                f"unset it (env -u {name} ...)."
            )
    require_compiler()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    # A program from the cache has lost what the compiler says about it.
    jax.config.update("jax_enable_compilation_cache", False)


def ignore_absent_chips() -> None:
    """Keeps JAX from looking for TPUs, and saying that there are none, where only their compiler is installed.

    A choice that somebody made (``JAX_PLATFORMS``) stays, and so does a machine with TPUs or with JAX for GPUs.
    """
    gpus = any(importlib.util.find_spec(f"jax_{kind}_plugin") for kind in ("cuda12", "cuda13", "rocm7"))
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not gpus and not chips:
        os.environ["JAX_PLATFORMS"] = "cpu"


def require_compiler() -> None:
    """Raises ``UserError`` unless the TPU compiler is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"Planning needs the TPU compiler, which is not installed; it needs no TPU: {compiler_command()} (Linux, "
            "x86-64)."
        )


def compiler_command() -> str:
    """The command that installs the TPU compiler that belongs to the JAX that is installed."""
    from importlib import metadata

    wanted = [
        requirement.partition(";")[0].strip()
        for requirement in metadata.requires("jax") or []
        if requirement.startswith("libtpu")
    ]
    return f"pip install '{wanted[0].replace(' ', '')}'" if wanted else "pip install -e '.[plan]'"


def parse(name: str) -> tuple[str, tuple[int, ...], int]:
    """Generation, chips along each axis, and number of slices of a topology's name.

    Raises:
      UserError: no such form, generation, number of axes or size.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name.strip())
    generations = {known.lower(): known for known in GENERATIONS}
    if not found or found[1].lower() not in generations:
        raise UserError(
            f"There is no TPU topology {name!r}; forms that exist are {FORMS}, and v6e:16x16*4 for four slices."
        )
    generation = generations[found[1].lower()]
    sizes = tuple(map(int, found[2].split("x")))
    axes, example, largest = GENERATIONS[generation]
    if len(sizes) != axes:
        raise UserError(
            f"The topology {name!r} has {len(sizes)} axes, and a slice of {generation} has {axes}, as in {example!r}."
        )
    if any(size > most for size, most in zip(sorted(sizes), sorted(largest), strict=True)):
        limit = "x".join(map(str, largest))
        raise UserError(
            f"The topology {name!r} is larger than a pod of {generation}, which has {limit} chips; several slices are "
            f"written as {generation}:{limit}*2."
        )
    slices = int(found[3] or 1)
    if min(sizes) < 1 or slices < 1:
        raise UserError(f"The topology {name!r} has a size of 0; every size is 1 or more, as in {example!r}.")
    return generation, sizes, slices


def chips_of(name: str) -> int:
    """How many chips a topology has.

    Raises:
      UserError: no such topology.
    """
    _, sizes, slices = parse(name)
    return math.prod(sizes) * slices


def devices_of(name: str) -> Sequence[Any]:
    """The devices of a topology, for which programs can be compiled but not run.

    Raises:
      UserError: no such topology, or no compiler.
    """
    require_compiler()
    generation, sizes, slices = parse(name)
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{'x'.join(map(str, sizes))}", **several
        ).devices
    except Exception as error:  # the compiler's own exceptions have no common class of their own
        reason = (
            str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        )
        raise UserError(
            f"The TPU compiler knows no topology {name!r} ({reason}); forms that exist are {FORMS}."
        ) from error
