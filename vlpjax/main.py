"""The command line: ``python -m vlpjax.main --config=FILE[:argument] --workdir=DIR [--mode=...]``.

Every leaf of the config can be set: ``--config.optimizer.learning_rate=1e-3``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence

from vlpjax.errors import UserError

MODES = ("train", "eval", "describe", "plan")
PROCESSES = ("coordinator", "num_processes", "process_id", "join_seconds")
HELP = """python -m vlpjax.main --config=FILE[:ARGUMENT] --workdir=DIR [--mode=MODE] [--config.ANY.LEAF=VALUE ...]

  --config=FILE[:ARGUMENT]   an experiment, such as experiments/quickstart.py or experiments/quickstart.py:concept
  --config.ANY.LEAF=VALUE    sets a leaf of the config; unknown names and wrong types are errors
  --workdir=DIR              where checkpoints, metrics and the report go; a run that is there is continued
  --mode=train               train, evaluate, write report.html (the default)
  --mode=eval                evaluate the newest checkpoint in --workdir
  --mode=describe            print towers, parameters, shardings, FLOPs, memory and the whole config; no training
  --mode=plan                compile the train step for --config.plan.topology=v5p:8x8x4 (a TPU slice that need not be
                             there) and print memory, time, traffic and what bounds them; no training
  --plan_json=FILE           the plan as JSON too
  --plan_hlo=FILE            the text of the compiled program too, from which all sums are made
  --compilation_cache=DIR    where compiled programs are kept between runs (default:
                             $JAX_COMPILATION_CACHE_DIR, or a folder in ~/.cache);
                             empty turns it off
  --coordinator=HOST:PORT --num_processes=N --process_id=I
                             start one of several processes; --coordinator=auto is enough where JAX detects the
                             cluster (Slurm, Open MPI, Kubernetes, Cloud TPU)
  --join_seconds=300         how long a process waits for the others to be started
  --debug                    show the whole traceback of an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def run(arguments: Sequence[str]) -> int:
    """Parses the arguments and does what they ask for."""
    flags, overrides = parse(arguments)
    if "help" in flags or not arguments:
        print(HELP)
        return 0
    mode = flags.get("mode", "train")
    if mode not in MODES:
        raise UserError(f"--mode is {mode!r}; there are {', '.join(MODES)}.")
    if "config" not in flags:
        raise UserError(
            "--config is missing; name an experiment, such as --config=experiments/quickstart.py."
        )
    if mode not in ("describe", "plan") and not flags.get("workdir"):
        raise UserError(f"--workdir is missing; --mode={mode} needs a directory for the run.")
    if mode == "plan":
        return _plan(flags, overrides)
    for name in ("plan_json", "plan_hlo"):
        if name in flags:
            raise UserError(f"--{name} belongs to --mode=plan, and --mode is {mode}.")
    _start(flags)

    from vlpjax import config as configs
    from vlpjax.run import apply_mesh_rules

    config = apply_mesh_rules(configs.load(flags["config"]))
    configs.apply_overrides(config, overrides)
    if mode == "describe":
        from vlpjax.describe import describe

        print(describe(config))
        return 0
    from vlpjax import trainer

    if mode == "eval":
        trainer.evaluate_only(config, flags["workdir"])
    else:
        trainer.train(config, flags["workdir"], command=["python", "-m", "vlpjax.main", *arguments])
    return 0


def _plan(flags: dict[str, str], overrides: list[tuple[str, str]]) -> int:
    """``--mode=plan``."""
    for name in PROCESSES:
        if name in flags:
            raise UserError(
                f"--{name} starts one of several processes; planning is done by one alone, leave it out."
            )
    for name in ("plan_json", "plan_hlo"):  # before anything takes minutes
        folder = os.path.dirname(flags.get(name, "")) or "."
        if not os.path.isdir(folder):
            raise UserError(f"--{name}={flags[name]} cannot be written: there is no folder {folder}.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from vlpjax.planning import topology

    topology.prepare()
    from vlpjax.plan import load_for_topology, plan
    from vlpjax.planning.report import as_json, as_text

    found = plan(load_for_topology(flags["config"], overrides), flags.get("plan_hlo"))
    if "plan_json" in flags:
        with open(flags["plan_json"], "w", encoding="utf-8") as file:
            json.dump(as_json(found), file, indent=2)
    print(as_text(found))
    return 0


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Splits the arguments into flags and overrides ``(dotted path, text)``; both ``--a=b`` and ``--a b`` work."""
    known = ("config", "workdir", "mode", "compilation_cache", "plan_json", "plan_hlo", *PROCESSES)
    flags: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h", "--debug"):
            flags["debug" if argument == "--debug" else "help"] = "true"
            continue
        name, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or not (name in known or name.startswith("config.")):
            raise UserError(f"{argument!r} is no argument of this program; see --help.")
        if not equals:
            if not rest:
                raise UserError(f"{argument} has no value; write {argument}=VALUE.")
            value = rest.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        else:
            flags[name] = value
    return flags, overrides


def _start(flags: dict[str, str]) -> None:
    """What must happen before JAX makes its first device: cache, log levels, other processes."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    from vlpjax.flags import simulate_devices
    from vlpjax.planning.topology import ignore_absent_chips

    ignore_absent_chips()
    simulate_devices()
    import jax
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    caches = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "vlpjax", "compiled"))
    cache = flags.get("compilation_cache", default)
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from vlpjax.processes import join

    join(*(flags.get(name, "") for name in PROCESSES))


if __name__ == "__main__":
    sys.exit(main())
