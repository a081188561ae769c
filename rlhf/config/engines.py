"""What the engine of a launch file cannot be combined with. `rlhf` asks before anything is loaded, and a stage asks again."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from rlhf.config.schema import PolicyStage, Stage
from rlhf.errors import ConfigError

OFFLOADS = {"weights": "offload_param", "gradients": "offload_optimizer", "optimizer": "offload_optimizer"}
"""A part of the state -> the section of a DeepSpeed file that moves it to the host: gradients go where the moments are."""
REDUCE_BUCKET = 500_000_000
"""Elements that ZeRO exchanges at a time, where its file does not say (DeepSpeed's own default)."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered, where its file does not say (DeepSpeed's own default)."""


class Engine(NamedTuple):
    """`divides`: what each rank holds a part of only, as ZeRO counts it: 1 the optimizer's state, 2 gradients, 3 weights."""

    name: str
    divides: int
    offloaded: frozenset[str] = frozenset()
    """What of weights, gradients and optimizer lies in the host's memory."""
    bucket: int = 0
    """Elements of the buffers that ZeRO exchanges gradients through, which are allocated whole."""
    gathers: int = 0
    """Elements of divided weights that ZeRO-3 may hold whole at once, so as not to gather them again."""

    @property
    def divided(self) -> frozenset[str]:
        return frozenset(("optimizer", "gradients", "weights")[: self.divides])

    @classmethod
    def of_deepspeed(cls, stage: int, zero: dict[str, Any] | None = None) -> Engine:
        """`zero`: the section zero_optimization of the file."""
        zero = zero or {}
        buffers = 2 if zero.get("overlap_comm") and stage < 3 else 1
        bucket = buffers * int(zero.get("reduce_bucket_size", REDUCE_BUCKET)) if zero.get("contiguous_gradients", True) else 0
        gathers = int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)) if stage == 3 else 0
        return cls(f"zero{stage}", stage, offloaded(zero), bucket, gathers)


def offloaded(zero: dict[str, Any]) -> frozenset[str]:
    """What of the state the section zero_optimization of a DeepSpeed file moves to the host."""
    return frozenset(what for what, key in OFFLOADS.items() if (zero.get(key) or {}).get("device") in ("cpu", "nvme"))


def require_fit(config: Stage, engine: Engine) -> None:
    """Raises ConfigError where the engine cannot do what the config asks for."""
    if engine.name.startswith("zero") and config.precision == "fp64":
        raise ConfigError("precision fp64: DeepSpeed keeps its state in float32; use --launch ddp or fsdp")
    if engine.divides and config.fp8.recipe != "none" and config.fp8.probe.every:
        raise ConfigError("fp8.probe.every must be 0 with ZeRO and FSDP: the probe puts weights back that each rank has whole")
    if engine.divides == 3 and isinstance(config, PolicyStage) and config.frozen_layers:
        raise ConfigError(
            f"frozen_layers must be 0 in PPO with {engine.name}: it divides a layer for one role only, and these have several; "
            "use --launch ddp or zero2, or roles.mode adapters"
        )
    if engine.divides == 3 and config.lora.base != "plain":
        raise ConfigError(
            f"lora.base must be `plain` with {engine.name}: it cannot divide weights of 4 bits; use --launch zero2"
        )


def require_packages(config: Stage, engine: Engine) -> None:
    """Raises ConfigError where a package is not installed that the config or the engine needs."""
    if engine.name.startswith("zero") and find_spec("deepspeed") is None:
        raise ConfigError("the launch file asks for DeepSpeed, which is not installed: pip install 'rlhf[deepspeed]'")
    if config.lora.base == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError("lora.base: `nf4` needs the package bitsandbytes: pip install 'rlhf[qlora]'")
    require_trackers(config)
    for backend, package, extra in (("te", "transformer_engine", "fp8"), ("torchao", "torchao", "torchao")):
        if config.fp8.recipe != "none" and config.fp8.backend == backend and find_spec(package) is None:
            raise ConfigError(f"fp8.backend {backend}: {package} is not installed: pip install 'rlhf[{extra}]'")


def require_trackers(config: Stage) -> None:
    """Raises ConfigError where one is not installed, which accelerate would pass over."""
    for tracker in config.report.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(f"report.trackers: {tracker} is not installed: pip install {tracker}")


def checked_deepspeed(content: Any, place: str) -> dict[str, Any]:
    """A DeepSpeed config without values that are `auto`.

    Raises ConfigError for what is the stage's config to say, and for no stage of ZeRO.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: expected an object of settings")
    content = _without_auto(content)
    for name in ("optimizer", "scheduler", "fp16", "bf16"):
        section = content.get(name) or {}
        if not isinstance(section, dict) or section.get("enabled", bool(section)):
            raise ConfigError(f"{place} sets {name}, which belongs to the stage's config; leave it out")
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ConfigError(f"{place} has zero_optimization.stage {stage}, expected 1, 2 or 3")
    return content


def _without_auto(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value for key, value in content.items() if value != "auto"
    }
