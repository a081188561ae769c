"""The verbs every stage shares: prepare a model, accumulate, step, report, save, resume, finish.

A stage owns its loop; this file owns what must be the same in all of them. Nothing here knows what is being trained.
Randomness and data order are functions of (seed, stage, purpose, step), so a training checkpoint is weights, optimizer state
and a few counters, and a resumed run is equal to the bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config.parse import Resume
from rlhf.config.schema import Stage
from rlhf.config.sections import Optimizer, Schedule
from rlhf.data.examples import Example, Examples
from rlhf.data.order import seed_of
from rlhf.data.templates import tokenizer_digests
from rlhf.errors import Paused, Preempted, without_secrets
from rlhf.fp8.apply import described
from rlhf.fp8.state import advance, forget_weights, fp8_layers
from rlhf.models.frozen import forget_rows
from rlhf.models.precision import cast_once
from rlhf.report.console import Console
from rlhf.report.records import NOTES, Records
from rlhf.report.stats import Stats
from rlhf.runs.lineage import differences, inexact
from rlhf.runs.manifest import MANIFEST, finish, write_json
from rlhf.training import saving
from rlhf.training.accumulation import MicroBatch, micro_batches
from rlhf.training.engines import Engine
from rlhf.training.fp8 import span
from rlhf.training.memory import memory_line, require_divided, require_memory
from rlhf.training.non_finite import NonFinite, finite_only
from rlhf.training.optimization import open_optimizer, schedule_factor, skip_frozen
from rlhf.training.processes import FILES_TIMEOUT, Peer
from rlhf.training.profiling import Profiler, ranged
from rlhf.training.reading import remarks
from rlhf.training.signals import StopRequest

IN_TABLE = ("rollout/length", "optimizer/lr")
"""Metrics in a terminal's table beside those that a stage shows."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Weights(Protocol):
    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors; all ranks ask together, and rank 0 keeps what comes."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


class Training:
    """One run of one stage in one process. Made by `open_training`."""

    def __init__(
        self,
        stage: str,
        config: Stage,
        accelerator: Accelerator,
        engine: Engine,
        console: Console,
        stop: StopRequest,
        resume: Resume,
    ) -> None:
        self.stage, self.config, self.console, self.stop = stage, config, console, stop
        self.accelerator, self.engine = accelerator, engine
        self.resume = resume
        self.run = Path(config.output)
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        names = "metrics.jsonl", "samples.jsonl", NOTES, "alarms.jsonl"
        self.metrics, self.samples, self.notes, self.alarms = (Records(self.run / name) for name in names)
        self.pause_for = ""
        """Why the run is to be saved and stopped when the step at hand is done, on every rank; empty: it is not."""
        self.manifest: dict[str, Any] = {}
        self.non_finite = NonFinite(self)
        self.weights: dict[str, Weights] = {}
        self.states: dict[str, Stateful] = {"non_finite": self.non_finite}
        self.result: dict[str, Any] = {}
        self.stats, self.profiler = Stats(), Profiler(self)
        self.frozen: list[nn.Module] = []
        self.listeners: list[Callable[[dict[str, float]], None]] = []
        """Are given each step's metrics, on every rank."""
        self.diverted = False
        """Whether metrics go elsewhere for a while, so that trackers are not told."""
        self.asked: dict[str, set[bytes]] = {}
        """By data file: digests of the prompts in it."""
        self.peers: list[Peer] = []
        self.patient: Any = torch.distributed.new_group(backend="gloo", timeout=FILES_TIMEOUT) if self.world_size > 1 else None
        self.step_done, self.tokens_done = 0, 0.0
        self._times: dict[str, float] = {}

    # ---- what takes part ---------------------------------------------------------------------------------------------

    def remember(self, **states: Stateful) -> None:
        """State beside weights and optimizer that a checkpoint must hold; called before `prepare`."""
        self.states |= states

    def remember_weights(self, **weights: Weights) -> None:
        """Tensors beside those of the policy that a checkpoint must hold; called before `prepare`."""
        self.weights |= weights

    def prepare(self, policy: nn.Module, optimizer: Optimizer, schedule: Schedule, length: int) -> nn.Module:
        """Restores the latest checkpoint, if any, and hands model and optimizer to the engine.

        Args:
            length: the run's length in the schedule's steps, or in tokens if that is its unit.
        """
        self.schedule, self.length, self.policy = schedule, length, policy
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in policy.parameters())
        memory = memory_line(self.policy, self.frozen, self.engine, self.world_size)
        require_memory(self)
        saving.require_room(self)
        optimizer_state = saving.restore(self)
        self._keep_no_whole_weights(policy)
        self.model = self.engine.prepare(self.policy, partial(open_optimizer, config=optimizer), optimizer.max_grad_norm)
        self.engine.restore_optimizer(optimizer_state)
        skip_frozen(self.engine.optimizer)
        self.note(
            f"trains {trained:,} of {whole:,} weights on {self.world_size} x {self.device.type} in {self.config.precision}, "
            f"{self.engine.name}; AdamW's state in {str(next(policy.parameters()).dtype).removeprefix('torch.')}"
        )
        self.note(memory)
        require_divided(self.engine, self.world_size)
        if in_fp8 := described(self.policy):
            self.note(in_fp8)
        return self.model

    def prepare_frozen(self, model: nn.Module) -> Any:
        """Gives a frozen model the device, the precision and the sharding of the trained one; call what comes back.

        Called before `prepare`, which restores what a checkpoint holds of it.
        """
        self.frozen.append(model)
        self._keep_no_whole_weights(model)
        return self.engine.prepare_frozen(model)

    def _keep_no_whole_weights(self, model: nn.Module) -> None:
        for layer in fp8_layers(model).values() if "weights" in self.engine.divided else ():
            layer.keeps_weights = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no LoRA dropout."""
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[nn.Module]:
        """The plain module with whole weights, for a rollout, which has another shape for each token: too many to compile."""
        with (
            self.accelerator.autocast(),
            torch.compiler.set_stance("force_eager"),
            self.engine.gathered() as plain,
            cast_once(plain),
        ):
            yield plain

    def record_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError where a run in progress was begun with another one: a model may have only a name."""
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            self.note(
                f"pad and end are one token, {tokenizer.eos_token!r}: masks tell them apart, not ids, so ends are learned"
            )
        now = tokenizer_digests(tokenizer)
        changes = differences({name: self.manifest.get(name, digest) for name, digest in now.items()}, now)
        if changes and not self.resume.allow_inexact:
            raise inexact(self.run, self.stage, changes)
        if changes:
            self.manifest["inexact_resumes"] = [*self.manifest.get("inexact_resumes", []), changes]
        self.manifest |= now
        if self.is_main:
            write_json(self.run / MANIFEST, self.manifest)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Step numbers from where the run stands to its end; between them the run is saved, and stopped if asked."""
        while self.progress() < 1:
            if span.is_due(self):
                yield from span.probed_span(self)
                self._pause_if_asked()
                continue
            yield from self.one_step()
            signal_number = self._agree_to_stop()
            every = self.config.checkpoint.every
            if signal_number or self.pause_for or (every and self.step_done % every == 0):
                self.save()
            self._pause_if_asked()
            if signal_number:
                raise Preempted(signal_number)
        self.profiler.close()

    def one_step(self) -> Iterator[int]:
        """The number of the step at hand, and what ends it."""
        step = self.step_done
        self._reseed(step)
        self._started, self._times, self.stats = time.monotonic(), {}, Stats()
        self.non_finite.begin_step()
        forget_rows(self.policy, *self.frozen)
        self.profiler.begin()
        yield step
        self.step_done = step + 1
        if self.non_finite.steps_taken:
            advance(self.policy, self._largest)

    def stop_if_asked(self) -> None:
        """Ends the run without saving; its last checkpoint is where it goes on."""
        if signal_number := self._agree_to_stop():
            raise Preempted(signal_number)

    def _pause_if_asked(self) -> None:
        """Where the run has been saved; one that is over has nothing to pause."""
        if self.pause_for and self.progress() < 1:
            raise Paused(self.pause_for)

    def progress(self) -> float:
        """Part of the run that is done."""
        return (self.tokens_done if self.schedule.unit == "tokens" else self.step_done) / self.length

    def accumulate(self, items: Sequence[Any], size: int, more: bool = False) -> Iterator[MicroBatch]:
        """This rank's micro-batches; gradients are exchanged with the last one only, or not yet if `more` are to follow."""
        micros = micro_batches(items, size, self.rank, self.world_size)
        for number, micro in enumerate(micros, start=1):
            self.non_finite.items = micro.items
            with self.engine.accumulating(last=number == len(micros) and not more):
                yield micro

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's part of a loss already divided by its global count.

        The engines average gradients over ranks; the loss is a sum over them, hence the factor.
        """
        self.engine.backward(self.non_finite.watched(loss) * self.world_size)

    def optimizer_step(self, tokens: float = 0.0, frozen_roles: Sequence[str] = ()) -> bool:
        """One optimizer step. `tokens` advances a schedule counted in tokens; `frozen_roles` keep their weights to the bit.

        Returns whether it was taken; not where a loss or the gradient is not finite: weights and optimizer are as they were.
        Raises CheckFailed where `non_finite` has that end the run.
        """
        before = self.progress()
        self.tokens_done += tokens
        after = before + 1 / self.length if self.schedule.unit != "tokens" else self.progress()
        factor = schedule_factor(self.schedule, before, min(after, 1.0))
        groups = self.engine.optimizer.param_groups
        for group in groups:
            group["lr"], group["frozen"] = group["peak"] * factor, group["role"] in frozen_roles
        norm = self.engine.step()
        forget_weights(self.policy)
        self.stats.put({"optimizer/lr": groups[0]["lr"]})
        if taken := self.non_finite.accepts(norm):
            self.stats.add("optimizer/grad_norm", norm)
        return taken

    # ---- between ranks -----------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def wait_for_main(self) -> None:
        """Until rank 0 has read, hashed or written files, which may take it longer than any exchange of tensors may."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.patient)

    def most(self, count: int) -> int:
        """The largest of a number over all ranks."""
        return max(self.gather(count))

    def _largest(self, values: Tensor) -> Tensor:
        """The largest of each number over all ranks."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    # ---- randomness --------------------------------------------------------------------------------------------------

    def seed(self, *purpose: object) -> int:
        return seed_of(self.config.seed, self.stage, *purpose)

    def _reseed(self, step: int) -> None:
        """What still draws from global generators (LoRA dropout) follows from the step as well."""
        seed = self.seed("step", step, self.rank)
        random.seed(seed)
        torch.manual_seed(seed)

    # ---- report ------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Says it, and keeps it in notes.jsonl; what a step that is run again says again stays one line."""
        self.console.note(text)
        if self.is_main:
            self.notes.append_once(self.step_done, {"text": without_secrets(text)})

    def read(self, path: str, found: Examples[Example], what: str) -> list[Example]:
        """The examples of a file, after saying what became of it."""
        held_out = getattr(getattr(self.config, "data", None), "eval", None)
        for note in remarks(path, found, what, self.asked, path == held_out and bool(self.asked)):  # training rows come first
            self.note(note)
        self.asked[path] = set(found.asked)
        return found.items

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        with ranged(name):
            yield
        self._times[f"time/{name}_s"] = self._times.get(f"time/{name}_s", 0.0) + time.monotonic() - start

    def reduce(self, stats: Stats) -> dict[str, float]:
        """Means over all ranks."""
        return Stats.merged(self.gather(stats.plain())).means()

    def report(self, step: int, tokens: float, show: Sequence[str]) -> dict[str, float]:
        """Writes the step's metrics line, of what is finite; `tokens` is how many this step handled over all ranks."""
        values = finite_only(self.reduce(self.stats))
        times = self._times | {"time/step_s": time.monotonic() - self._started}
        self.profiler.end(step)
        for listener in self.listeners:
            listener(values)
        if self.is_main:
            self.metrics.append(step + 1, values | {"tokens": tokens} | {name: round(t, 6) for name, t in times.items()})
            if not self.diverted:
                self.accelerator.log(values, step=step + 1)
            after = self.progress() if self.schedule.unit == "tokens" else (step + 1) / self.length
            self.console.step(
                step + 1,
                min(after, 1.0),
                tokens,
                {name.split("/")[-1]: values[name] for name in show if name in values},
                {name: values[name] for name in (*show, *IN_TABLE) if name in values},
            )
        return values

    def record_evaluation(
        self, step: int, values: Mapping[str, float], samples: Sequence[dict[str, Any]] = ()
    ) -> dict[str, float]:
        """Writes, and returns, a metrics line of what is finite: an evaluation of the weights after `step` steps."""
        forget_rows(self.policy, *self.frozen)
        values = self.non_finite.evaluated(step, self.gather(dict(values))[0])  # a scorer may tell each rank something else
        if self.is_main:
            self.metrics.append_once(step, values)
            for sample in samples:
                self.samples.append_once(step, sample)
            if not self.diverted:
                self.accelerator.log(values, step=step)
        return values

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Commits a training checkpoint of the steps done so far."""
        saving.save(self)

    def consolidate(self) -> None:
        """Training is over: whole weights go into the plain models of rank 0, whatever held them until now."""
        self.engine.consolidate(keep=self.is_main)

    def all_models(self) -> nn.ModuleList:
        return nn.ModuleList([self.policy, *self.frozen])

    def finish(self, result: Mapping[str, Any], outputs: Sequence[str]) -> None:
        """Marks the run done; `outputs` are what later stages read."""
        self.console.close()
        self.wait_for_main()
        if self.is_main:
            finish(self.run, self.manifest, dict(result), outputs)
        self.wait_for_main()
        self.accelerator.end_training()

    def _agree_to_stop(self) -> int:
        return max(self.gather(self.stop.pending()))
