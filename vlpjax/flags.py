"""What the compiler is told beside the program: schedule communication so that it hides behind computation.

The one place for such options: the train step is compiled with them on real chips and by the planner alike, as
``compiler_options`` of ``jax.jit``.  Sources: https://docs.jax.dev/en/latest/gpu_performance_tips.html, and for TPUs
MaxText's list, https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from vlpjax.errors import UserError

# Regular expression of "platform-kind", as in config.mesh_rules -> options; those of all that match are taken.
OPTIONS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "tpu-.*",
        {
            # Collectives are started early, and go on beside the matrix products that do not need them.
            "xla_enable_async_all_gather": "true",
            "xla_enable_async_all_reduce": "true",
            "xla_enable_async_collective_permute": "true",
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            # Sums of gradients over the data-centre network wait until the next step needs them.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    ),
    # The compiler refuses it for chips with two-dimensional links (v5e, v6e).
    ("tpu-(?!.*lite).*", {"xla_tpu_enable_async_all_to_all": "true"}),
    (
        "gpu-.*",
        {
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_enable_while_loop_double_buffering": "true",
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
        },
    ),
)


# For devices that XLA_FLAGS simulates.  XLA's collectives on CPU devices block a thread until all have come, and
# independent ones may begin in another order on each device: with one thread per device, as is the default, some
# devices wait in one collective, others in another, and no thread is left for those that both wait for.  It aborts the
# process when a device comes 40 seconds late, which a device that shares a core with seven others may.
SIMULATED = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_cpu_collective_call_terminate_timeout_seconds=200",
)
DEVICES = "--xla_force_host_platform_device_count"
THREADS = "PJRT_NPROC"  # threads of a CPU client
THREADS_PER_DEVICE = 64


def simulate_devices(count: int | None = None) -> None:
    """Has XLA simulate CPU devices that wait for one another's collectives without running out of threads.

    To be called before JAX makes its first device.  What somebody chose stays.

    Args:
      count: of devices, unless XLA_FLAGS names one; None leaves it at that, and does nothing if it names none.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if count is not None and DEVICES not in flags:
        flags = f"{flags} {DEVICES}={count}".strip()
    if simulated := re.search(rf"{DEVICES}=(\d+)", flags):
        own = [flag for flag in SIMULATED if flag.partition("=")[0] not in flags]
        os.environ["XLA_FLAGS"] = " ".join([flags, *own])
        os.environ.setdefault(THREADS, str(THREADS_PER_DEVICE * int(simulated[1])))


def compiler_options(device: Any, own: Sequence[str] = ()) -> dict[str, str]:
    """The options for programs on such a device.

    Args:
      device: one of those that the program is for.
      own: ``config.compiler_options``, which replace and add.

    Raises:
      UserError: an option that is not written ``"name=value"``.
    """
    hardware = f"{device.platform}-{device.device_kind}"
    options: dict[str, str] = {}
    for pattern, found in OPTIONS:
        if re.fullmatch(pattern, hardware):
            options |= found
    for item in own:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise UserError(
                f"config.compiler_options holds {item!r}; an option is written 'name=value', such as "
                "'xla_tpu_scoped_vmem_limit_kib=65536'."
            )
        options[name.strip().removeprefix("--")] = value.strip()
    return options
