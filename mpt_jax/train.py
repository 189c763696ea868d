"""Trains an MPT: ``python -m mpt_jax.train --config configs/tiny.py``.

The same command again resumes where the last one stopped. Ctrl-C (or SIGTERM) saves a
checkpoint and stops; nothing is lost and no token is seen twice.

Several processes train one model: each runs this command, on a Cloud TPU pod or under
SLURM or Open MPI as it is, elsewhere with --coordinator, --processes and --process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import mpt_jax
from mpt_jax import cli, runtime
from mpt_jax.config import TrainConfig, flatten, resume_differences, to_json
from mpt_jax.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    ConfigError,
    DivergedError,
    MptError,
    UserError,
    run_verb,
)
from mpt_jax.validate import check_mesh

if TYPE_CHECKING:
    from mpt_jax.training.checkpoints import StoredStep
    from mpt_jax.training.metrics import Throughput
    from mpt_jax.training.peers import Peers
    from mpt_jax.training.stability import Verdict
    from mpt_jax.training.step import Objective, TrainState
    from mpt_jax.training.stop import Stop


def main(argv: Sequence[str]) -> int:
    """The verb: flags and config first, JAX only when there is something to run."""
    parser = cli.Parser(prog="python -m mpt_jax.train", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    add(
        "--workdir",
        metavar="DIR",
        help="checkpoints, metrics, plots; default runs/CONFIG; named on the last line",
    )
    add(
        "--print_config",
        action="store_true",
        help="print every knob and stop; * marks the command line's",
    )
    add(
        "--dry_run",
        action="store_true",
        help="print shapes, parameters, memory and tokens, compile the step, and stop",
    )
    add("--supervise", action="store_true", help="restart the trainer when it fails")
    add(
        "--profile",
        metavar="FIRST:LAST",
        type=_steps,
        help="trace these steps into WORKDIR/profile, for XProf (TensorBoard)",
    )
    for flag, (metavar, meaning) in PROCESS_FLAGS.items():
        variable = runtime.VARIABLES[flag]
        add(f"--{flag}", metavar=metavar, help=f"{meaning}; default ${variable}")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        config = cli.load_config(flags.config, overrides)
        stem = pathlib.Path(flags.config.partition(":")[0]).stem
        workdir = _folder(flags.workdir or f"runs/{stem}")
        if flags.print_config:
            print(cli.show_config(config, overrides))
        elif flags.dry_run:
            from mpt_jax.training.dry_run import dry_run

            print(dry_run(config))
        elif flags.supervise:
            from mpt_jax.training.supervise import supervise

            child = [a for a in argv if a != "--supervise"]
            command = [sys.executable, "-m", "mpt_jax.train", *child]
            return supervise(command, workdir=workdir, config=config.supervise)
        else:
            cluster = runtime.find_cluster(
                vars(flags), seconds=config.processes.arrival_seconds
            )
            outcome = train(config, workdir, cluster=cluster, profile=flags.profile)
            loss = outcome.validation_loss
            shown = f", validation loss {loss:.4f}" if loss is not None else ""
            if cluster is None or cluster.process == 0:
                print(f"step {outcome.step}{shown}: {workdir}", flush=True)
        return EXIT_OK

    code = run_verb(run, show_traceback="--traceback" in argv)
    if code and runtime.connected():
        # Python's own end would wait for the other processes, one of which may be dead.
        sys.stdout.flush()
        os._exit(code)
    return code


PROCESS_FLAGS = {
    "coordinator": ("HOST:PORT", "where process 0 is, for a job of several processes"),
    "processes": ("N", "how many there are"),
    "process": ("I", "which one this is, from 0"),
}


def _steps(text: str) -> tuple[int, int]:
    """Of --profile. Raises: ValueError: argparse names the flag and the text."""
    first, _, last = text.partition(":")
    if not 0 < int(first) <= int(last):
        raise ValueError
    return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: batches seen; loss: the last validation loss, if any."""

    step: int
    finished: bool
    validation_loss: float | None


def _folder(workdir: str) -> pathlib.Path:
    """Raises: UserError: a URL, which would become a folder of that name, here."""
    if "://" in workdir:
        raise UserError(
            "expected a folder; mount the bucket on every host (gcsfuse) and name "
            "the folder where it is",
            location=f"--workdir {workdir}",
        )
    return pathlib.Path(workdir).absolute()


def train(
    config: TrainConfig,
    workdir: pathlib.Path,
    *,
    objective: Objective | None = None,
    cluster: runtime.Cluster | None = None,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Trains until ``config.total_steps`` or a signal, resuming from ``workdir``.

    Args:
      objective: what to minimise; default next-token prediction.
      cluster: the processes that train together, each of which calls this.
      profile: first and last step to trace.
    Raises: MptError of every kind; see errors.py for the exit codes.
    """
    from mpt_jax.training.peers import Peers
    from mpt_jax.training.progress import say
    from mpt_jax.training.stop import Stop

    def stop_early(name: str) -> None:
        text = f"{name}: no step was done yet; the same command starts again"
        peers.leave(EXIT_OK, text)
        say(text)

    peers = Peers(cluster, config.processes)
    with Stop(stop_early) as stop:
        try:
            # Before JAX counts its devices. That they run the same is checked first.
            peers.meet(_what_runs(config))
            if cluster is not None:
                runtime.connect(cluster)
            outcome = _train(
                config,
                workdir,
                peers=peers,
                stop=stop,
                objective=objective,
                profile=profile,
            )
            peers.close()
        except MptError as error:
            peers.leave(error.exit_code, f"{error.kind}: {error}")
            raise
        except Exception as error:
            peers.blame()
            peers.leave(EXIT_INTERNAL, f"{type(error).__name__}: {error}")
            raise
    runtime.disconnect()
    return outcome


def _what_runs(config: TrainConfig) -> dict[str, str]:
    import jax

    versions = {"mpt_jax": mpt_jax.__version__, "jax": jax.__version__}
    return versions | {path: repr(value) for path, value in flatten(config).items()}


def _train(
    config: TrainConfig,
    workdir: pathlib.Path,
    **more: Any,
) -> Outcome:
    import jax

    from mpt_jax import partitioning

    if problems := check_mesh(config, jax.device_count()):
        raise ConfigError(problems)
    with contextlib.ExitStack() as stack:
        compiled = config.compilation_cache
        if compiled == "auto":
            cpu = jax.default_backend() == "cpu"
            compiled = "" if cpu else workdir / "compiled"
        stack.enter_context(runtime.compilation_cache(compiled))
        stack.enter_context(partitioning.use(partitioning.make_mesh(config.mesh)))
        run = Run(config, workdir, stack, **more)
        run.start()
        run.loop()
        run.finish()
        return Outcome(run.step, run.finished, run.validation_loss)


class Run:
    """A run in progress: its program, data, sinks and position."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        stack: contextlib.ExitStack,
        *,
        peers: Peers,
        stop: Stop,
        objective: Objective | None,
        profile: tuple[int, int] | None,
    ):
        import jax

        from mpt_jax.data import feed
        from mpt_jax.partitioning import current_mesh
        from mpt_jax.training import placing
        from mpt_jax.training.agreement import Agreement
        from mpt_jax.training.checkpoints import Checkpoints
        from mpt_jax.training.goodput import Goodput
        from mpt_jax.training.profiling import Profile
        from mpt_jax.training.progress import Progress
        from mpt_jax.training.stability import SpikeDetector
        from mpt_jax.training.step import make_program
        from mpt_jax.training.watchdog import Watchdog
        from mpt_jax.training.writers import MetricsWriter

        self.config, self.workdir, self.stop = config, workdir, stop
        self.first = jax.process_index() == 0  # of all processes it alone reports
        self.goodput = Goodput()
        name = "stuck.txt" if self.first else f"stuck-{jax.process_index()}.txt"
        self.watchdog = stack.enter_context(
            Watchdog(
                config.watchdog_seconds,
                dump_path=workdir / name,
                blame=peers.behind,
                tell=peers.leave,
            )
        )
        peers.where = self.watchdog.where
        # Until the loop begins.
        self.starting = stack.enter_context(contextlib.ExitStack())
        self.starting.enter_context(self.watchdog.pause("starting"))
        # First: it refuses a bad directory or a second trainer at once.
        self.checkpoints = stack.enter_context(
            Checkpoints(workdir / "checkpoints", config.checkpoint)
        )
        self.program = make_program(config, current_mesh(), objective=objective)
        self.agreement = Agreement(self.program.mesh)
        self.share = placing.share(
            self.program.batch_sharding, (config.global_batch_size, config.seq_len)
        )
        self.profile = Profile(profile, workdir / "profile")
        stack.callback(self.profile.close)
        self.detector = SpikeDetector(config.stability)
        self.warm, self.rollbacks = False, 0
        self.validation: list[dict[str, Any]] = []
        self.validation_loss: float | None = None
        self.stored = self.checkpoints.latest_valid()
        if self.stored is not None:
            if found := resume_differences(self.stored.meta["config"], config):
                raise ConfigError(
                    [*found, "use another --workdir, or the old values"],
                    location=f"cannot resume {self.stored.path}",
                )
        self.step = self.stored.step if self.stored else 0
        if self.first:
            (workdir / "config.json").write_text(to_json(config) + "\n")

        self.tokenizer = feed.tokenizer(config)
        source = feed.open_source(
            config,
            split="train",
            tokenizer=self.tokenizer,
            process_index=self.share.index,
            process_count=self.share.count,
            rows=self.share.rows,
        )
        self.source = stack.enter_context(contextlib.closing(source))
        self.progress = stack.enter_context(
            Progress(config.total_steps, start_step=self.step, enabled=self.first)
        )
        self.writer = stack.enter_context(
            MetricsWriter(workdir, config.log, start_step=self.step, enabled=self.first)
        )
        self.meter = self._make_meter()

    def _make_meter(self) -> Throughput:
        import jax

        from mpt_jax.models.mpt import count_params
        from mpt_jax.training.metrics import Throughput, flops_per_token, peak_flops

        config = self.config
        peak = peak_flops(jax.devices()[0].device_kind)
        n_params = count_params(config.model)
        self.progress.message(
            f"{n_params:,} parameters on {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}; {config.tokens_per_step:,} tokens a step,"
            f" {config.total_steps * config.tokens_per_step:,} in all; {self.workdir}"
        )
        return Throughput(
            config.total_steps,
            start_step=self.step,
            tokens_per_step=config.tokens_per_step,
            flops=flops_per_token(config.model, config.seq_len, n_params),
            peak_flops=peak * jax.device_count() if peak else None,
        )

    # ------------------------------------------------------------- start and resume

    def start(self) -> None:
        """Sets ``self.state``: restored, from checkpoint.init_from, or fresh."""
        import jax

        from mpt_jax.training.goodput import read_report

        config = self.config
        self.progress.message(self.source.describe())
        if self.stored is not None:
            self._restore(self.stored, rewind_data=True)
            self.progress.message(f"resumed from {self.stored.path}")
            if "goodput" in self.stored.meta:
                report = read_report(self.workdir / "goodput.json")
                self.goodput.restore(self.stored.meta["goodput"], report=report)
            return
        self.state = self.program.init(jax.random.key(config.seed))
        if config.checkpoint.init_from:
            from mpt_jax.training.checkpoints import restore_params

            stored = self.program.stored.params
            params = restore_params(config.checkpoint.init_from, stored)
            arranged = self.program.to_memory({"params": params})
            self.state = self.state._replace(**arranged)
            self.progress.message(f"parameters from {config.checkpoint.init_from}")

    def _restore(self, stored: StoredStep, *, rewind_data: bool) -> None:
        from mpt_jax.training.step import TrainState

        struct = self.program.stored
        restored = stored.restore(
            struct.params, _without_params(struct), part=self.source.part
        )
        items = {"params": restored.params, **restored.opt_state}
        self.state = TrainState(**self.program.to_memory(items))
        self.step = stored.step
        self.detector.load_state_dict(restored.meta["detector"])
        if rewind_data:
            self.source.restore(restored.data)
            self.rollbacks = restored.meta["rollbacks"]

    def save(self, *, wait: bool = False) -> None:
        part = self.source.part
        writes = self.first if part == (0, 1) else self.share.first
        stored = self.program.to_stored(self.state._asdict(), on_host=True)
        tokenizer = self.tokenizer  # None for synthetic tokens
        self.checkpoints.save(
            self.step,
            params=stored.pop("params"),
            opt_state=stored,
            data=self.source.state() if writes else None,
            part=part,
            meta={
                "config": dataclasses.asdict(self.config),
                "detector": self.detector.state_dict(),
                "rollbacks": self.rollbacks,
                "goodput": self.goodput.state(),
                "tokens": {"eos_token_id": tokenizer.eos_id} if tokenizer else {},
            },
            tokenizer=tokenizer.files if tokenizer else {},
            wait=wait,
        )

    # ------------------------------------------------------------------------- loop

    @property
    def finished(self) -> bool:
        return self.step >= self.config.total_steps

    def loop(self) -> None:
        """Steps until the end or a signal.

        Metrics of a step are fetched after the next one is dispatched, so the device
        never waits for the host; saving and evaluating settle the last step first.
        """
        self.starting.close()
        pending, stop = None, False
        # A stop that comes after a step was dispatched waits until it is settled.
        while not (self.finished or (stop and pending is None)):
            with (
                self.goodput.spend("data"),
                self.meter.data_wait(),
                self.watchdog.waiting_for(self.source.name),
            ):
                # While the last step runs; so does the copy to the devices.
                batch = self._device_batch(next(self.source))
            # Of this batch, too; computed only where it will be written.
            seen = self.source.metrics() if self._logs(self.step + 1) else {}
            self.agreement.ask(stop=bool(self.stop.signal))
            self.profile.begin(self.step + 1)
            self.watchdog.enter()
            with self._compiling():
                self.state, metrics = self.program.step(self.state, batch)
            self.stop.arm()
            self.step += 1
            settled, pending = pending, (self.step, metrics, seen)
            good = settled is None or self._settle(*settled)
            stop, now = self.agreement.answer(stop=bool(self.stop.signal))
            save = self.checkpoints.due(self.step, now=now)
            every = self.config.eval.every_steps
            evaluate = self.finished or bool(every and self.step % every == 0)
            evaluate = evaluate and self.config.eval.batches > 0
            if good and (save or evaluate or stop or self.finished):
                good, pending = self._settle(*pending), None
            if not good:
                self._roll_back()
                pending = None
                continue
            self.watchdog.beat(self.step)
            if evaluate:
                with self._aside("evaluation"):
                    self.evaluate()
            if save:
                with self._aside("checkpoint"):
                    self.save()

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """Time in here is not the steps'."""
        with self.meter.pause(), self.goodput.spend(kind), self.watchdog.pause(kind):
            yield

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Around a dispatch, which compiles the step the first time."""
        if self.warm:
            yield
        else:
            with self.goodput.spend("compile"), self.watchdog.pause("compiling"):
                yield

    def _logs(self, step: int) -> bool:
        every = self.config.log.every_steps
        return step % every == 0 or step in (1, self.config.total_steps)

    def _device_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        from mpt_jax.training import placing

        return placing.place(batch, self.program.batch_sharding, self.share)

    def _settle(
        self, step: int, metrics: dict[str, Any], seen: dict[str, float]
    ) -> bool:
        """Reads a finished step's metrics; False when it calls for a rollback."""
        import jax

        from mpt_jax.training.stability import Verdict

        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        finite = bool(values.pop("finite"))
        if not self.warm:  # the time so far was compilation
            self.meter.restart(step)
            self.goodput.started()
            self.warm = True
        self.profile.end(step)
        if self._logs(step) or not finite:
            values |= self.meter.log(step).metrics() | seen
            values["goodput"] = self.goodput.share()
            self.writer.write(step, {**values, "finite": int(finite)})
            self.progress.update(step, values)
        verdict = self.detector.observe(step, values["loss"], finite=finite)
        if verdict is Verdict.SKIPPED:
            self.progress.message(f"step {step}: not finite, update not applied")
        return verdict in (Verdict.OK, Verdict.SKIPPED) or self._diverged(step, verdict)

    def _diverged(self, step: int, verdict: Verdict) -> bool:
        """Acts on a spike or on too many non-finite steps: True goes on."""
        from mpt_jax.training.stability import Verdict

        c = self.config.stability
        policy = c.spike if verdict is Verdict.SPIKE else c.nonfinite
        if policy == "ignore":
            self.progress.message(f"loss spike, ignored: {self.detector.reason}")
            return True
        if policy != "rollback":
            raise DivergedError(self.detector.reason)
        return False

    def _roll_back(self) -> None:
        """Back to the newest checkpoint from before the trouble; on with newer data.

        The data position stays: the batches since that checkpoint are skipped, as if
        they had never been in the stream.
        """
        reason, since = self.detector.reason, self.detector.bad_since
        limit = self.config.stability.max_rollbacks
        if self.rollbacks >= limit:
            raise DivergedError(f"{reason}; {limit} rollbacks did not help")
        stored = self.checkpoints.latest_valid(before=since)
        if stored is None:
            raise DivergedError(f"{reason}; no checkpoint is from before step {since}")
        seen = self.step
        self._restore(stored, rewind_data=False)
        self.rollbacks += 1
        self.writer.rewind(self.step)
        self.meter.restart(self.step)
        self.progress.message(
            f"{reason}; rolled back to step {self.step} (rollback {self.rollbacks} of "
            f"{limit}), {seen - self.step} batches are skipped"
        )

    def evaluate(self) -> None:
        """Mean loss over the same validation batches each time."""
        from mpt_jax.data import feed

        if not self.validation:
            n = self.config.eval.batches
            self.validation = feed.validation_batches(
                self.config, n, tokenizer=self.tokenizer, rows=self.share.rows
            )
        ce = weight = 0.0
        for batch in self.validation:
            sums = self.program.evaluate(self.state.params, self._device_batch(batch))
            ce, weight = ce + float(sums.ce), weight + float(sums.weight)
        self.validation_loss = ce / max(weight, 1.0)
        self.writer.write(self.step, {"validation_loss": self.validation_loss})
        self.progress.message(
            f"step {self.step}: validation loss {self.validation_loss:.4f}"
        )

    # -------------------------------------------------------------------------- end

    def finish(self) -> None:
        """Saves what is not saved yet; at the end, also shows a sample."""
        with self._aside("checkpoint"):
            if self.step and self.step != self.checkpoints.last_step:
                self.save()
            if self.finished and self.config.sample.max_tokens:
                self._sample()
            self.checkpoints.wait()
        self.progress.message(self.goodput.describe())
        if self.first:
            self.goodput.write(self.workdir / "goodput.json")
        if not self.finished:
            name = self.stop.name if self.stop.signal else "another process was stopped"
            self.progress.message(
                f"{name}: saved step {self.step}; the same command goes on from there"
            )

    def _sample(self) -> None:
        from mpt_jax.generation.sample import sample

        c, tokenizer = self.config.sample, self.tokenizer
        params = self.program.to_stored({"params": self.state.params})["params"]
        ids = sample(
            self.config.model,
            params,
            tokenizer.encode(c.prompt),
            max_tokens=c.max_tokens,
            temperature=c.temperature,
            seed=self.config.seed,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )
        text = c.prompt + tokenizer.decode(ids)
        if self.first:
            (self.workdir / "sample.txt").write_text(text + "\n")
        self.progress.message(f"--- sample\n{text}\n---")


def _without_params(state: TrainState) -> dict[str, Any]:
    """All of a state but its parameters, which are a checkpoint item of their own."""
    return {k: v for k, v in state._asdict().items() if k != "params"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
