"""The loop: restore, train, evaluate, save, stop.  It reads top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlpjax.checkpoint import Checkpoints, load_params
from vlpjax.config import build, suggest
from vlpjax.data.feed import HostReport, feed
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Evaluator, Result, shared_features
from vlpjax.observe.clock import Clock
from vlpjax.observe.environment import describe_environment
from vlpjax.observe.metrics import MetricWriter, disk_full_is_told
from vlpjax.observe.profiling import parse_profile, trace
from vlpjax.observe.progress import Progress
from vlpjax.observe.report import write_report
from vlpjax.observe.results import write_environment, write_evaluation
from vlpjax.processes import agreed
from vlpjax.rules import map_with_names, match_rules, tree_names
from vlpjax.run import Run
from vlpjax.state import TrainState, replicated_share
from vlpjax.step import initial_state, make_train_step
from vlpjax.weights.starting import Pretrained
from vlpjax.workdir import claim

log = logging.getLogger("vlpjax")

Evaluation = Callable[[TrainState], Result]


def train(config: ConfigDict, workdir: str, command: Sequence[str] = ()) -> TrainState:
    """Trains what ``config`` describes in ``workdir``, from where an earlier run stopped if there is one.

    Returns:
      the final state.

    Raises:
      UserError: whatever is wrong with the config, the data, the machine or the directory, in one sentence.
    """
    clock = Clock()
    with contextlib.ExitStack() as held:  # however the run ends, the directory is free afterwards
        with agreed():
            run = Run.from_config(config)
            if jax.process_index() == 0:
                held.enter_context(claim(workdir, config))
        return _train(run, workdir, command, clock)


def _train(run: Run, workdir: str, command: Sequence[str], clock: Clock) -> TrainState:
    """The loop itself, in a work directory that is taken."""
    config, writes = run.config, jax.process_index() == 0
    evaluators = prepare_evaluators(run)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    state, start = restore_or_initialize(run, checkpoints, clock)
    train_step: Any = make_train_step(run.experiment, run.layout, run.abstract[1], run.batch_shardings)
    total, batch_size = run.total_steps, run.pipeline.batch_size
    log_every = run.every(config.log.every, "config.log.every")
    save_every = run.every(config.checkpoint.every, "config.checkpoint.every")

    with (
        MetricWriter(workdir, start or None, enabled=writes) as writer,
        Progress(total, start, title=config.name, enabled=writes) as progress,
        feed(run.pipeline, run.batch_shardings, start, total) as batches,
        trace(workdir, parse_profile(config.profile)) as profiler,
    ):
        _introduce(run, progress, start, command, workdir if writes else "")
        clock.start()
        clock.tick(start, start * batch_size)
        for step in range(start + 1, total + 1):
            # A batch is drawn only after the step before it was evaluated and saved, so that a checkpoint and
            # the data that follow it never disagree.  Do not move this line.
            with clock.wait("input"):
                _, batch, report = next(batches)
            _tell_replaced(report, progress)
            profiler.before(step)
            with jax.transfer_guard("disallow"):  # a hidden copy to or from a device is an error
                if step == start + 1:
                    with clock.pause("compile"):
                        with agreed():  # collectives give up soon on a process that still compiles
                            train_step = train_step.lower(state, batch).compile()
                        state, metrics = jax.block_until_ready(train_step(state, batch))
                else:
                    state, metrics = train_step(state, batch)

            logs = step == total or (log_every and step % log_every == 0)
            saves = step == total or (save_every and step % save_every == 0)
            if logs or saves:
                values = _read(metrics, step)  # a state that is not finite is never saved
            if logs:
                clock.tick(step, step * batch_size)
                writer.write(step, values)
                writer.timing(step, _timing(clock))
            progress.update(
                step,
                loss=metrics["loss"],
                examples_per_second=clock.examples_per_second,
                input_wait=clock.input_wait,
                eta=clock.eta(step, total),
            )

            due = [
                name
                for name, (every, _) in evaluators.items()
                if step == total or (every and step % every == 0)
            ]
            if due:
                with clock.pause("evaluate"):
                    evaluate(run, evaluators, due, state, step, writer, progress, workdir if writes else "")
            if saves:
                with clock.pause("save"):
                    writer.sync()
                    checkpoints.save(
                        step, state, {"data": run.pipeline.data_state(step), "clock": clock.state()}
                    )
        if start == total:
            progress.message(f"The run in {workdir} is complete ({total} steps); nothing was left to train.")
        with clock.pause("save"):
            checkpoints.wait()
    checkpoints.close()
    if writes:
        with disk_full_is_told(Path(workdir) / "report.html"):
            progress.message(f"report: {write_report(workdir)}")
    return state


def restore_or_initialize(run: Run, checkpoints: Checkpoints, clock: Clock) -> tuple[TrainState, int]:
    """The state to start from, and its step.  The first that applies wins:

    1. The newest complete checkpoint of this work directory: everything, the data's place and the clock too.
    2. ``config.start.run``: the parameters of another run that ``config.start.rules`` take; the rest is new.
    3. New parameters, from the seed; towers that ``config.initialize`` names take theirs from files of weights.

    In cases 2 and 3 teachers start as copies of the student, then take their own ``checkpoint`` if they name one.
    """
    abstract, shardings = run.abstract
    newest = checkpoints.latest
    if newest is not None:
        if newest > run.total_steps:
            raise UserError(
                f"{checkpoints.directory} is at step {newest}, but the run has {run.total_steps} steps."
            )
        state, record = checkpoints.restore(newest, abstract, shardings)
        run.pipeline.check_state(record["data"])
        clock.restore(record["clock"])
        return state, newest
    make = jax.jit(lambda batch: initial_state(run.experiment, batch), out_shardings=shardings)
    sample = jax.tree.map(lambda x: jax.numpy.zeros((2, *x.shape[1:]), x.dtype), run.batch_shapes)
    state = _initialized(run, make(sample))
    if run.config.start.run:
        state = state.replace(params=_take(run, state.params, load_params(run.config.start.run)))
    if run.config.start.run or run.config.initialize:
        teachers = {name: teacher.initial(state.params) for name, teacher in run.experiment.teachers.items()}
        state = state.replace(teachers=jax.device_put(teachers, shardings.teachers))
    for name, teacher in run.experiment.teachers.items():
        if teacher.checkpoint:
            given = load_params(teacher.checkpoint)
            own = _placed(state.teachers[name], given, f"teachers.{name}.checkpoint={teacher.checkpoint!r}")
            state = state.replace(teachers={**state.teachers, name: own})
    return state, 0


def prepare_evaluators(run: Run) -> dict[str, tuple[int, Evaluation]]:
    """Per evaluator, how often it runs in steps and the evaluation; mistakes in its settings show here."""
    prepared = {}
    for name in run.config.evaluators:
        evaluator: Evaluator = build(run.config.evaluators[name])
        if evaluator.params != "student" and evaluator.params not in run.experiment.teachers:
            raise UserError(
                f"evaluators.{name}.params is {evaluator.params!r}; there are 'student'"
                f"{''.join(f', {teacher!r}' for teacher in run.experiment.teachers)}."
            )
        if evaluator.params != "student":
            state = run.abstract[0]
            moving = [tower for tower in run.config.towers if tower in state.teachers[evaluator.params]]
            moving = [tower for tower in moving if state.statistics.get(tower)]
            if moving:  # teachers keep no running statistics, and the student's are not theirs
                raise UserError(
                    f"evaluators.{name}.params is {evaluator.params!r}, whose tower {moving[0]!r} has BatchNorm; "
                    "running statistics are the student's alone, so set it to 'student'."
                )
        every = run.every(evaluator.every, f"config.evaluators.{name}.every")
        prepared[name] = (every, _with_params(evaluator, evaluator.make(run.experiment, run.layout)))
    return prepared


@shared_features()  # evaluators of one step encode the same data once
def evaluate(
    run: Run,
    evaluators: Mapping[str, tuple[int, Evaluation]],
    names: Sequence[str],
    state: TrainState,
    step: int,
    writer: MetricWriter | None,
    progress: Progress,
    workdir: str,
) -> dict[str, Result]:
    """Runs evaluators and writes what they find.  One that fails becomes a failed metric; the run goes on."""
    results = {}
    for name in names:
        title = run.config.evaluators[name].title or name
        try:
            result, error = evaluators[name][1](state), ""
        except Exception as exception:  # whatever it is, it must not end a run of weeks
            log.exception("evaluators.%s failed at step %d", name, step)
            result, error = Result({"failed": 1.0}), f"{type(exception).__name__}: {exception}"
        results[name] = result
        if writer is not None:
            writer.write(step, {f"eval/{name}/{key}": value for key, value in result.metrics.items()})
        if workdir:
            write_evaluation(workdir, name, title, step, result, error)
        scores = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
        progress.message(f"step {step}  {title}: {error or scores}")
    return results


def evaluate_only(config: ConfigDict, workdir: str) -> dict[str, Result]:
    """``--mode=eval``: evaluates the newest checkpoint of a run and writes its report anew."""
    with agreed():
        run = Run.from_config(config)
        if not (Path(workdir) / "checkpoints").is_dir():
            raise UserError(f"There is no run with checkpoints in {workdir!r}; train one with --mode=train.")
        if not config.evaluators:
            raise UserError("config.evaluators is empty; there is nothing to evaluate.")
    evaluators = prepare_evaluators(run)
    checkpoints = Checkpoints(workdir, read_only=True)
    if checkpoints.latest is None:
        raise UserError(f"The run in {workdir!r} has no complete checkpoint yet.")
    state, _ = checkpoints.restore(checkpoints.latest, *run.abstract)
    writes = jax.process_index() == 0
    step = checkpoints.latest
    with Progress(run.total_steps, step, enabled=writes) as progress:
        results = evaluate(
            run, evaluators, list(evaluators), state, step, None, progress, workdir if writes else ""
        )
        if writes:
            progress.message(f"report: {write_report(workdir)}")
    checkpoints.close()
    return results


def _with_params(evaluator: Evaluator, evaluation: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """The evaluation as a function of the state, on the parameters that the evaluator asks for."""

    def run(state: Any) -> Result:
        params = state.params
        if evaluator.params != "student":
            params = {**params, **state.teachers[evaluator.params]}
        return evaluation({"params": params, "batch_stats": state.statistics})

    return run


def _read(metrics: Mapping[str, jax.Array], step: int) -> dict[str, float]:
    values = {f"train/{name}": float(value) for name, value in jax.device_get(dict(metrics)).items()}
    if not (math.isfinite(values["train/loss"]) and math.isfinite(values["train/update_norm"])):
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise UserError(
            f"At step {step} {bad} is not finite; lower config.optimizer.learning_rate or set "
            "config.optimizer.clip_norm, and start from the newest checkpoint."
        )
    return values


def _timing(clock: Clock) -> dict[str, float]:
    return {
        "seconds": clock.training_seconds,
        "examples_per_second": clock.examples_per_second,
        "step_seconds": clock.step_seconds,
        "input_wait": clock.input_wait,
    } | {f"paused/{reason}": seconds for reason, seconds in clock.pauses.items()}


def _introduce(run: Run, progress: Progress, start: int, command: Sequence[str], workdir: str) -> None:
    """Says what is about to run, and writes it down."""
    abstract, shardings = run.abstract
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in abstract.params.items()}
    mesh = {axis: size for axis, size in run.layout.mesh.shape.items() if size > 1} or {"devices": 1}
    progress.message(f"towers: {', '.join(f'{name} {size:,}' for name, size in count.items())} parameters")
    progress.message(
        f"mesh: {', '.join(f'{axis}={size}' for axis, size in mesh.items())}; "
        f"{replicated_share(abstract.params, shardings.params):.1%} of the parameters' bytes are replicated"
    )
    progress.message(f"compute in {run.experiment.compute_dtype}: {run.experiment.precision_reason}")
    if start:
        progress.message(f"continuing after step {start} of {run.total_steps}")
    if workdir:
        extra = {
            "precision": {"compute": run.experiment.compute_dtype, "reason": run.experiment.precision_reason},
            "mesh": dict(run.layout.mesh.shape),
            "parameters": count,
        }
        write_environment(workdir, describe_environment(command, extra))


def _tell_replaced(report: HostReport, progress: Progress) -> None:
    for bad in report.bad:
        progress.message(f"bad example replaced: {bad}")


def _initialized(run: Run, state: Any) -> Any:
    """The state with the towers that ``config.initialize`` names filled from their files."""
    pretrained: dict[str, Pretrained] = build(run.config.initialize)
    makers = run.experiment.towers.makers
    for name, weights in pretrained.items():
        if name not in makers:
            raise UserError(f"config.initialize names the tower {name!r}{suggest(name, makers)}.")
        own = state.params[name], state.statistics.get(name, {})
        params, statistics = weights.fill(name, makers[name](), *own)
        state = state.replace(params={**state.params, name: params})
        if statistics:
            state = state.replace(statistics={**state.statistics, name: statistics})
    return state


def _take(run: Run, params: Any, given: Any) -> Any:
    """The parameters with those that ``config.start.rules`` take from another run."""
    what = f"config.start.run={run.config.start.run!r}"
    taken = match_rules(run.config.start.rules, tree_names(params), "config.start.rules")
    available = dict(zip(tree_names(given), jax.tree.leaves(given), strict=True))

    def choose(name: str, own: jax.Array) -> jax.Array:
        return _fitting(name, own, available, what) if taken[name] else own

    return map_with_names(choose, params)


def _placed(own: Any, given: Any, what: str) -> Any:
    available = dict(zip(tree_names(given), jax.tree.leaves(given), strict=True))
    return map_with_names(lambda name, leaf: _fitting(name, leaf, available, what), own)


def _fitting(name: str, own: jax.Array, available: Mapping[str, Any], what: str) -> jax.Array:
    if name not in available:
        raise UserError(f"{what} has no parameter {name!r}; leave it out by a rule, or choose another run.")
    if available[name].shape != own.shape:
        raise UserError(
            f"{what}: {name} has shape {available[name].shape}, and this model wants {own.shape}."
        )
    return jax.device_put(available[name], own.sharding)
