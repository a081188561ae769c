"""An Accelerate config file, read before `accelerate launch` reads it: what is wrong is said at once, with nothing loaded."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rlhf import paths
from rlhf.config.engines import Engine, checked_deepspeed
from rlhf.errors import ConfigError, UsageError

# Unquoted NO is false to YAML.
Kind = Annotated[str, BeforeValidator(lambda value: "NO" if value is False else value)]


class DeepspeedSection(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    deepspeed_config_file: str | None = None
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None


class LaunchFile(BaseModel):
    """The fields that decide what is started; accelerate knows many more, which it checks itself."""

    model_config = ConfigDict(extra="allow", strict=True)

    distributed_type: Annotated[Kind, Field(pattern="^(NO|MULTI_[A-Z]+|DEEPSPEED|FSDP)$")] = "NO"
    num_processes: Annotated[int, Field(ge=1)] = 1
    num_machines: Annotated[int, Field(ge=1)] = 1
    machine_rank: Annotated[int, Field(ge=0)] | None = None
    main_process_ip: str | None = None
    main_process_port: Annotated[int, Field(ge=1, lt=1 << 16)] | None = None
    mixed_precision: Any = None
    use_cpu: bool = False
    deepspeed_config: DeepspeedSection | None = None

    def engine(self, file: Path) -> Engine:
        """Raises ConfigError for a DeepSpeed config that is none, UsageError where there is none of that name."""
        if self.distributed_type == "FSDP":
            return Engine("fsdp", 3)
        if self.distributed_type != "DEEPSPEED":
            return Engine("ddp", 0)
        section = self.deepspeed_config or DeepspeedSection()
        if section.deepspeed_config_file is None:
            return Engine.of_deepspeed(2 if section.zero_stage is None else section.zero_stage)  # accelerate's default
        found = paths.shipped_or_own(section.deepspeed_config_file)
        if found is None:
            named = f"deepspeed_config_file {section.deepspeed_config_file}"
            raise UsageError(f"{file}: {named}: no such file, neither here nor among those shipped")
        try:
            content = json.loads(found.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{found}: not a DeepSpeed config: {error}") from error
        zero = checked_deepspeed(content, str(found))["zero_optimization"]
        return Engine.of_deepspeed(zero["stage"], zero)


def find_launch_file(launch: str) -> Path:
    file = Path(launch) if launch.endswith((".yaml", ".yml", ".json")) else paths.CONFIGS / "launch" / f"{launch}.yaml"
    if file.is_file():
        return file
    names = ", ".join(sorted(path.stem for path in (paths.CONFIGS / "launch").glob("*.yaml")))
    raise UsageError(f"--launch {launch}: no file {file}; there are auto, {names}, or give an Accelerate config file")


def read_launch_file(file: Path, nproc: int) -> LaunchFile:
    """Raises ConfigError for all that is wrong with its values, UsageError where it cannot start so many processes."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not an Accelerate config: expected `name: value` lines; `accelerate config` writes one")
    mistakes = [f"{file}: {key}: unknown; did you mean {near[0]}?" for key in content if (near := _near(str(key)))]
    try:
        settings = LaunchFile.model_validate({key: value for key, value in content.items() if _is_given(key, value)})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            where = ".".join(map(str, detail["loc"]))
            mistakes.append(f"{file}: {where}: given {detail['input']!r}, {_expected(detail)}")
        raise ConfigError("\n".join(mistakes)) from None
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    _check_start(file, settings, nproc)
    return settings


def _check_start(file: Path, settings: LaunchFile, nproc: int) -> None:
    if settings.mixed_precision not in (None, "no", False):
        raise ConfigError(
            f"{file}: mixed_precision is {settings.mixed_precision}; precision belongs to the stage's config: "
            "set `precision` there and `mixed_precision: no` here"
        )
    if (settings.machine_rank or 0) >= settings.num_machines:
        raise ConfigError(f"{file}: machine_rank {settings.machine_rank}: expected 0 to {settings.num_machines - 1}")
    if settings.distributed_type == "MULTI_CPU" or (settings.use_cpu and nproc > 1):
        raise UsageError(f"{file}: Accelerate would start one process without mpirun; use --launch cpu --nproc N")
    if settings.distributed_type == "NO" and nproc > 1:
        raise UsageError(f"{file}: starts one process, --nproc asks for {nproc}; use --launch ddp")


def _near(key: str) -> list[str]:
    """What a key that is none of ours was probably meant to be; accelerate's other keys are like none of them."""
    return [] if key in LaunchFile.model_fields else get_close_matches(key, LaunchFile.model_fields, n=1, cutoff=0.9)


def _is_given(key: Any, value: Any) -> bool:
    """accelerate's own files have `deepspeed_config: {}` and empty values for what is not used; a count is not left empty."""
    return isinstance(key, str) and not (value == {} and key == "deepspeed_config")


def _expected(detail: Any) -> str:
    if detail["loc"] == ("distributed_type",):
        return "expected NO, MULTI_GPU, DEEPSPEED or FSDP"
    return detail["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
