"""The training loop: read it from top to bottom."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from sss_jax import __version__
from sss_jax.axes import PyTree
from sss_jax.data.cases import Split
from sss_jax.data.pipeline import Loader
from sss_jax.data.sources import Source, open_source
from sss_jax.errors import Preempted
from sss_jax.options import Options
from sss_jax.ssl.volume import make_volume_function
from sss_jax.train import bad_cases, hosts, run
from sss_jax.train.checkpoint import Checkpointer
from sss_jax.train.guard import NonFiniteGuard, StopSignal, WorkdirLock
from sss_jax.train.log import MetricsLog, Progress
from sss_jax.train.mesh import make_driver
from sss_jax.train.optimizer import learning_rate
from sss_jax.train.pretrained import with_converted
from sss_jax.train.setup import set_up
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import root_key
from sss_jax.train.validate import validate


def train(
    options: Options,
    data: str | Path,
    workdir: Path,
    *,
    fresh: bool = False,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Train to the last step, resuming whatever `workdir` holds.

    Args:
        options: all settings.
        data: folder with images, labels and a split file; a prepared folder; or `synthetic:`.
        workdir: run folder: checkpoints, metrics.jsonl, config.json, run.json.
        fresh: discard an earlier run in `workdir`.
        skip_bad: begin without the cases that cannot be read; a run that goes on goes on without
            those that it began without.

    Returns:
        Steps done, best validation Dice and its step, wall time of this call in seconds.

    Raises:
        DataError, ConfigError, CheckpointError: nothing was trained.
        NonFiniteError: a loss or gradient was not finite; nothing bad was saved.
        Preempted: a signal asked to stop; the state is saved.
    """
    source = open_source(data, options)
    split = run.read_split(options, source)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held, StopSignal() as stop:
        hosts.refuse_differing([__version__, options, split.digest])
        begins = hosts.decided_by_lead(fresh or not (workdir / run.RUN).is_file())
        bad = bad_cases.find(source, split, options) if begins else {}

        def open_folder() -> None:
            held.enter_context(WorkdirLock(workdir))
            if begins:
                bad_cases.settle(bad, workdir, skip=skip_bad)
            used = split.without(bad_cases.left_out(workdir))
            run.refuse_empty(options, used, source.name)
            run.open_folder(workdir, options, used, source.name, fresh=fresh)

        hosts.led(open_folder)
        split = split.without(bad_cases.left_out(workdir))
        with Checkpointer(workdir / "checkpoints") as checkpointer, hosts.losses_of_peers():
            return _Run(options, source, split, workdir, checkpointer, stop).to_the_end()


class _Run:
    """The parts of one run, and the loop over them."""

    def __init__(
        self,
        options: Options,
        source: Source,
        split: Split,
        workdir: Path,
        checkpointer: Checkpointer,
        stop: StopSignal,
    ) -> None:
        self.options, self.source, self.split, self.stop = options, source, split, stop
        self.checkpointer = checkpointer
        self.setup = set_up(options)
        model, optimizer, _, shapes = self.setup
        self.driver = make_driver(model, options, optimizer, shapes)
        index, count = self.driver.part
        self.loader = Loader(
            split,
            options.model,
            options.data,
            options.train,
            read=source.read,
            semi=options.semi.enabled,
            process_index=index,
            process_count=count,
        )
        self.log = MetricsLog(workdir, writes=hosts.is_lead())
        self.volume = make_volume_function(self.setup.model, options)
        self.guard = NonFiniteGuard(options.train.nonfinite_limit, self._case_names)

    def to_the_end(self) -> dict[str, Any]:
        began = time.monotonic()
        key = root_key(self.options.train.seed)
        state, start = self._start(key)
        key = self.driver.place_key(key)
        total = self.options.train.steps
        batches = self.loader.iterate(start)
        shown = None if hosts.is_lead() else io.StringIO()
        with (
            contextlib.closing(batches),
            self.log,
            Progress(total, start, stream=shown) as progress,
        ):
            self._catch_up(start, state, progress)
            self._steps(state, key, start, batches, progress)
        self.checkpointer.wait()
        best = self.checkpointer.best_step()
        return {
            "steps": total,
            "best_step": best,
            "best_val_dice": self.log.best("dice"),
            "seconds": round(time.monotonic() - began, 1),
        }

    def _case_names(self, step: int) -> list[str]:
        return sorted({name for names in self.loader.names(step).values() for name in names})

    def _start(self, key: jax.Array) -> tuple[PyTree, int]:
        """Return the state to go on from: the newest good one, or step 0."""
        options, driver = self.options, self.driver
        model, optimizer, memory, _ = self.setup

        def begin() -> PyTree:
            params = with_converted(init_all_params(model, options, key), options)
            return state_of(params, optimizer, memory)

        restored = self.checkpointer.restore(driver.target)
        self.log.truncate(restored.step if restored else 0)
        if restored:
            return driver.place_state(restored.state), restored.step
        # Converted weights are constants of hundreds of megabytes: not for a compiled function.
        state = driver.place_state(begin()) if options.model.init else driver.create(begin)
        return state, 0

    def _steps(
        self,
        state: PyTree,
        key: jax.Array,
        start: int,
        batches: Iterator[Any],
        progress: Progress,
    ) -> None:
        meter = _Meter(self.options)
        for step in range(start, self.options.train.steps):
            with meter.waiting():
                batch = self.driver.place_batch(next(batches))
            with jax.transfer_guard("disallow"):
                state, metrics = self.driver.step(state, batch, key)
            self.guard.watch(step, metrics["finite"], metrics)
            done = step + 1
            if done % self.options.train.log_every == 0 or done == self.options.train.steps:
                self._log(done, metrics, meter, progress)
            self._keep(done, state, progress, meter)

    def _log(self, done: int, metrics: PyTree, meter: "_Meter", progress: Progress) -> None:
        scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.guard.check(scalars)
        scalars.pop("finite")
        rate = learning_rate(self.options.optimizer, self.options.train.steps)(done - 1)
        row = {"kind": "train", "step": done, **scalars, "rate": float(rate), **meter.read()}
        self.log.write(row)
        progress.update(done, row)

    def _keep(self, done: int, state: PyTree, progress: Progress, meter: "_Meter") -> None:
        """Validate and save where it is time to, and stop where it was asked for."""
        train = self.options.train
        last = done == train.steps
        stop = self.stop.agreed(done)
        if not (self._due(done) or stop or done % train.save_every == 0):
            self.checkpointer.check()
            return
        self.guard.check()
        single = self.driver.fetch(state)
        if self._due(done) and not stop:
            self._validate_and_save(done, single, progress)
        else:
            run.save(self.checkpointer, done, single)
        meter.restart()
        if (stop or self._asked()) and not (last and self._validated(done)):
            self.checkpointer.wait()
            raise Preempted(
                f"stopped by {self.stop.reason} after step {done}; the state is saved, "
                "the same command goes on from there"
            )

    def _due(self, done: int) -> bool:
        train = self.options.train
        return done == train.steps or bool(train.eval_every and done % train.eval_every == 0)

    def _asked(self) -> bool:
        """Whether a signal asks to stop at once; with several processes the next step decides."""
        return self.stop.requested and jax.process_count() == 1

    def _validated(self, done: int) -> bool:
        if not self.split.val:
            return True
        rows = self.log.rows()
        known = any(r.get("kind") == "val" and r.get("step") == done for r in rows)
        return hosts.decided_by_lead(known)

    def _catch_up(self, start: int, state: PyTree, progress: Progress) -> None:
        """Do the validation that a stopped run still owes for the step it stopped at."""
        if start and self._due(start) and not self._validated(start):
            self._validate_and_save(start, self.driver.fetch(state), progress)

    def _validate_and_save(self, done: int, state: PyTree, progress: Progress) -> None:
        """Save the state with its validation score; without one if a signal came meanwhile."""
        scores = self._validate(state)
        run.save(self.checkpointer, done, state, scores)
        if scores is not None:
            row = {"kind": "val", "step": done, **scores}
            self.log.write(row)
            progress.message(_line(row))

    def _validate(self, state: PyTree) -> dict[str, float] | None:
        if not self.split.val:
            return None
        name = self.options.eval.weights
        params = state["ema"] if name == "ema" else state["params"]["net"]
        if "bank" in state:
            params = {"net": params, "bank": state["bank"]}
        params = self.driver.local(params)
        return validate(
            self.volume,
            params,
            self.split.val,
            self.options,
            self._asked,
            read=self.source.read,
        )


class _Meter:
    """Slices per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, options: Options) -> None:
        train = options.train
        clips = train.labelled_batch + train.unlabelled_batch * options.semi.enabled
        self._slices = clips * options.data.clip_slices
        self.restart()

    def restart(self) -> None:
        self._began, self._waited, self._steps = time.monotonic(), 0.0, 0

    def waiting(self) -> "_Meter":
        return self

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._waited += time.monotonic() - self._entered
        self._steps += 1

    def read(self) -> dict[str, float]:
        passed = max(time.monotonic() - self._began, 1e-9)
        rates = {
            "slices_per_s": round(self._slices * self._steps / passed, 2),
            "data_wait": round(self._waited / passed, 4),
        }
        self.restart()
        return rates


def _line(row: dict[str, Any]) -> str:
    return " ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
