"""A stage's needs put together: what is alive in each of its phases, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

from torch import nn

from rlhf.config.engines import Engine
from rlhf.config.schema import PolicyStage, Stage
from rlhf.fp8.plan import plan as fp8_plan
from rlhf.models.actor_critic import ActorCritic, unwrapped
from rlhf.models.frozen import lower_layers
from rlhf.training.memory import bytes_of, state_bytes
from rlhf.training.plan.cast import Cast, cast_of
from rlhf.training.plan.lengths import Lengths, lengths_of, micro_batch
from rlhf.training.plan.live import Peak, passing
from rlhf.training.plan.machines import CPU_GAPS, CPU_PROCESS, Machine
from rlhf.training.plan.needs import (
    FLOAT,
    FP8_COPIES,
    HALF,
    NF4_BYTES,
    experience_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    sampling_bytes,
    state_needs,
)


class Step(NamedTuple):
    """Of one process: rows of an optimizer step, and of a forward in it."""

    rows: int
    micro: int


@dataclass(frozen=True)
class Need:
    """Bytes of one process."""

    state: dict[str, float]
    """What is there from the first optimizer step to the last, by what for"""
    phases: dict[str, dict[str, float]]
    """What comes and goes in each phase, by what for"""
    host: float = 0.0
    """In the host's memory, of a process whose device is a GPU"""

    @property
    def peak(self) -> float:
        return self.lasting + self.passing

    @property
    def lasting(self) -> float:
        return sum(self.state.values())

    @property
    def passing(self) -> float:
        return max(sum(phase.values()) for phase in self.phases.values())

    def taken(self, kind: str) -> float:
        """What has to be there: on a CPU with the process itself, and with what glibc does not give back at once."""
        return self.peak + (CPU_PROCESS + CPU_GAPS * self.passing if kind == "cpu" else 0.0)


@dataclass
class Stages:
    """A stage with one config. What was sent through its models is kept, as most questions ask for the same micro-batches."""

    config: Stage
    rows: int | None = None
    """Said in place of the file's"""
    cast: Cast = field(init=False)
    lengths: Lengths = field(init=False)
    peaks: dict[Any, Peak] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cast = cast_of(self.config)
        self.lengths = lengths_of(self.config, self.rows, self.batch_size)

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step, over all processes."""
        config: Any = self.config
        return config.update.minibatch_size if isinstance(config, PolicyStage) else config.batch_size

    def step(self, processes: int, micro: int | None = None) -> Step:
        rows = ceil(self.batch_size / processes)
        return Step(rows, min(micro or self.config.micro_batch_size, rows))  # pyright: ignore[reportAttributeAccessIssue]

    def need(self, engine: Engine, processes: int, micro: int | None = None) -> Need:
        config, step = self.config, self.step(processes, micro)
        whole = self._state()
        state, host = state_needs(whole, whole["gradients"], engine, processes)
        if "weights" in engine.divided:
            state["gathered"] = self._gathered(engine)
        state |= self._more()
        phases = {"update": self._update(engine, processes, step, whole)}
        if isinstance(config, PolicyStage):
            host += experience_bytes(config.replies, config.rollout.max_new_tokens)
            phases = {"rollout": self._rollout(config, engine, processes), "score": self._score(engine, step), **phases}
        resting = state.pop("gradients", 0.0)  # cleared after a step: there in an update only
        phases["update"] = {"gradients": resting, **phases["update"]}
        return Need(state, phases, host)

    def _state(self) -> dict[str, float]:
        whole = state_bytes(self.cast.policy, *self.cast.frozen.values())
        if self.config.lora.base == "nf4":
            bases = [self.cast.policy, *([self.cast.frozen["reference"]] if "reference" in self.cast.frozen else [])]
            linear = {id(m.weight): m.weight for base in bases for m in base.modules() if isinstance(m, nn.Linear)}
            heads = {id(p) for base in bases if base.actor is not None for p in _head(base.actor)}
            whole["weights"] -= sum(
                w.numel() * (w.element_size() - NF4_BYTES)
                for w in linear.values()
                if not w.requires_grad and id(w) not in heads
            )
        return whole

    def _more(self) -> dict[str, float]:
        """Of options that keep something of their own."""
        config, more = self.config, {}
        if isinstance(config, PolicyStage) and config.ema_decay:
            more["moving average"] = float(bytes_of(self.cast.policy.actor.parameters()))  # pyright: ignore
        if isinstance(config, PolicyStage) and config.frozen_layers:
            hidden = _text_config(self.cast.policy).hidden_size
            tokens = config.replies * (self.lengths.mean.prompt + config.rollout.max_new_tokens)
            more["frozen cache"] = float(min(config.frozen_cache.limit_mib * 2**20, tokens * hidden * FLOAT))
        if config.fp8.recipe != "none":
            layers = {
                layer.name: layer.shape
                for part in self.cast.parts.values()
                for layer in fp8_plan(part, config.fp8)
                if layer.in_fp8
            }
            more["FP8 weights"] = float(FP8_COPIES * sum(rows * columns for rows, columns in layers.values()))
        return more

    def _gathered(self, engine: Engine) -> float:
        """Of divided weights what is whole at once: a layer at work, the next one on its way, and what is in no layer; under
        ZeRO-3 as much as its file allows."""
        part = next(iter(self.cast.parts.values()))
        inner = unwrapped(part)
        layers = lower_layers(inner, _text_config(self.cast.policy).num_hidden_layers)
        at_work = 2 * max(map(_size, layers)) + _size(inner) - sum(map(_size, layers))
        return max(at_work, min(FLOAT * engine.gathers, self._state()["weights"]))

    def _update(self, engine: Engine, processes: int, step: Step, whole: dict[str, float]) -> dict[str, float]:
        """Beside the gradients. In one process those of the first micro-batch come while its activations go."""
        peaks = []
        if processes > 1 or step.rows > step.micro:
            micro = step.micro if processes > 1 else min(step.micro, step.rows - step.micro)
            peaks.append(self._peak("policy", micro, 2, engine))
        if processes == 1:
            first = self._peak("policy", step.micro, 1, engine)
            peaks.append(Peak(max(0.0, first.size - whole["gradients"]), first.logits))
        highest = max(peaks, key=lambda peak: peak.size)
        logits = min(highest.logits, highest.size)
        return {"activations": highest.size - logits, "logits": logits}

    def _score(self, engine: Engine, step: Step) -> dict[str, float]:
        peaks = [self._peak(name, step.micro, 0, engine) for name in ("policy", *self.cast.frozen)]
        highest = max(peaks, key=lambda peak: peak.size)
        return {"activations": highest.size - highest.logits, "logits": highest.logits}

    def _rollout(self, config: PolicyStage, engine: Engine, processes: int) -> dict[str, float]:
        actor = self.cast.policy.actor
        assert actor is not None
        found = {"copy for sampling": float(bytes_of(actor.parameters()))} if "weights" in engine.divided else {}
        if config.rollout.engine == "vllm":
            return found or {"sampled by the server": 0.0}
        text, element = _text_config(self.cast.policy), HALF if config.precision == "bf16" else FLOAT
        if config.precision == "bf16":
            found["bf16 weights"] = float(HALF * sum(p.numel() for p in actor.parameters() if p.ndim >= 2))
        rows = min(config.rollout.generation_batch_size, ceil(config.replies / processes))
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        per_token = kv_bytes_per_token(text.num_hidden_layers, heads, width, element)
        prompt = self.lengths.longest[0].prompt
        sizes = rows, prompt, config.rollout.max_new_tokens, per_token, text.num_hidden_layers
        return found | {
            "KV cache": kv_cache_bytes(*sizes),
            "logits": float(sampling_bytes(rows, text.vocab_size, element)),
        }

    def _peak(self, who: str, micro: int, backward: int, engine: Engine) -> Peak:
        whole_logits, divided = engine.name == "zero3", "weights" in engine.divided
        key = who, micro, backward, whole_logits, divided
        if key not in self.peaks:
            model: ActorCritic = self.cast.policy if who == "policy" else self.cast.frozen[who]
            rows = micro_batch(self.config, self.lengths.longest[:micro])
            asked: Any = self.config
            entropy = isinstance(asked, PolicyStage) and asked.update.entropy_coef > 0 and who == "policy" and backward > 0
            how = {"bf16": asked.precision == "bf16", "divided": divided, "whole_logits": whole_logits}
            self.peaks[key] = passing(model, rows, backward=backward, entropy=entropy, **how)
        return self.peaks[key]


def largest_micro_batch(stage: Stages, engine: Engine, processes: int, machine: Machine) -> int | None:
    """The most rows of a forward that fit, up to those of a step; 0: not even one. None where no room is known.

    Memory grows about evenly with rows, so where it is known for two numbers the next guess lies on their line.
    """
    room, most = machine.room(processes), stage.step(processes).rows
    if room is None:
        return None

    def taken(micro: int) -> float:
        return stage.need(engine, processes, micro).taken(machine.kind)

    low, high = 0, most + 1  # `low` fits, `high` does not, as far as is known
    sizes = {1: taken(1)}
    if sizes[1] > room:
        return 0
    low, guess = 1, stage.step(processes).micro
    for _ in range(TRIES):
        if high - low <= 1:
            break
        guess = min(max(guess, low + 1), high - 1)
        sizes[guess] = taken(guess)
        low, high = (guess, high) if sizes[guess] <= room else (low, guess)
        slope = (sizes[guess] - sizes[1]) / (guess - 1) if guess > 1 else 0.0
        guess = int(1 + (room - sizes[1]) / slope) if slope > 0 else most
    return low


TRIES = 5


def _text_config(policy: ActorCritic) -> Any:
    return unwrapped(policy.actor or policy.critic).config.get_text_config()  # pyright: ignore


def _size(module: nn.Module) -> float:
    return float(bytes_of(module.parameters()))


def _head(actor: nn.Module) -> list[nn.Parameter]:
    output = unwrapped(actor).get_output_embeddings()
    return list(output.parameters()) if isinstance(output, nn.Module) else []
