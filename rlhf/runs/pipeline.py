"""`rlhf run PIPELINE`: SFT, reward model and PPO in one output directory, each from the results of those before.

A pipeline.yaml names a config for each stage and what to set over it; a text there that begins with the name of a stage
(or with `world`) is a path in the output directory. Stages that are done and valid are kept; stale ones are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlhf import paths
from rlhf.config.fields import canonical, dotted
from rlhf.config.load import find_config, load
from rlhf.config.parse import FLAGS, Invocation, parse
from rlhf.config.schema import STAGES, Section
from rlhf.errors import ConfigError, DataError
from rlhf.runs import summary
from rlhf.runs.dry_run import describe
from rlhf.runs.execute import execute
from rlhf.runs.inputs import require_inputs
from rlhf.runs.launch import machines_of
from rlhf.runs.lineage import INPUT_FIELDS, SOURCES
from rlhf.runs.lock import check_output, run_lock
from rlhf.runs.manifest import MANIFEST, STATUS, changed_files, finish, new_manifest, read_json, versions

OF_ALL_STAGES = ("launch", "nproc", "dry-run", "json")
PLACES = ("world", *STAGES)


class World(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the conversations and preferences drawn."""


class Stages(Section):
    """Each stage: `config`, a file beside the pipeline's, and flags (without dashes) that are set over it."""

    sft: dict[str, str] | None = None
    rm: dict[str, str] | None = None
    dpo: dict[str, str] | None = None
    kto: dict[str, str] | None = None
    ppo: dict[str, str] | None = None
    grpo: dict[str, str] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Stages:
        for name, flags in self.items():
            if "config" not in flags:
                raise ValueError(f"{name} has no `config`; name the stage's config file, relative to this one")
            if "output" in flags:
                raise ValueError(f"{name}.output is not a choice: the stage writes to {name}/ in the pipeline's output")
        return self

    def items(self) -> list[tuple[str, dict[str, str]]]:
        """The stages there are, in the order they run."""
        return [(name, flags) for name in type(self).model_fields if (flags := getattr(self, name)) is not None]


class Pipeline(Section):
    output: str
    """Directory of the whole: each stage's run is a directory in it."""
    world: World | None = None
    """Generate the quickstart's chat world into world/."""
    stages: Stages


@dataclass(frozen=True)
class Request:
    """What the command line of `rlhf run` asks for."""

    pipeline: str
    output: str | None = None
    seed: int | None = None
    launch: str = "auto"
    nproc: int | None = None
    overrides: dict[str, dict[str, str]] = field(default_factory=dict)  # stage -> flag -> text
    allow_inexact_resume: bool = False
    as_json: bool = False
    dry_run: bool = False


def run_pipeline(request: Request) -> int:
    """Run what is not done yet, then print samples and figures; the exit code is that of the first stage that fails.

    Raises:
        ConfigError: the pipeline file, a stage's config or a flag is wrong; all are read before anything runs.
        DataError: something that is done was made from something else, or has changed since.
    """
    file, pipeline = read(request)
    if machines_of(request.launch, None).count > 1:
        raise ConfigError(f"--launch {request.launch}: a pipeline runs on one machine; start its stages one by one")
    output = Path(pipeline.output)
    invocations = [_parse(stage, flags, file, pipeline, request) for stage, flags in pipeline.stages.items()]
    if request.dry_run:
        for invocation in invocations:
            require_inputs(invocation, coming=output)
        print_plan(invocations, request.as_json)
        return 0
    check_output(output)
    if pipeline.world:
        said = make_world(output / "world", pipeline.world.seed if request.seed is None else request.seed)
        print(said, file=sys.stderr if request.as_json else sys.stdout, flush=True)
    for invocation in invocations:
        if code := execute(invocation, quiet=request.as_json, alone=False):
            return code
    figures = summary.summary(output)
    if request.as_json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        summary.show(figures, sys.stdout)
    return 0


def read(request: Request) -> tuple[Path, Pipeline]:
    """The pipeline's file and content. A name without a suffix is a directory of configs/."""
    named = request.pipeline.endswith((".yaml", ".yml", ".json"))
    shipped = sorted(place.parent.name for place in paths.CONFIGS.glob("*/pipeline.yaml"))
    if not named and request.pipeline not in shipped:
        raise ConfigError(f"{request.pipeline}: no such pipeline; there is {', '.join(shipped)}, or give a .yaml file")
    file = find_config(request.pipeline if named else f"{request.pipeline}/pipeline")
    pipeline = load(Pipeline, file, [("output", request.output)] if request.output else [])
    stages = dict(pipeline.stages.items())
    for stage in request.overrides:
        if stage not in stages:
            raise ConfigError(f"--{stage}...: {file} has no stage {stage}; it has {', '.join(stages)}")
        _refuse_own_flags(f"--{stage}.", request.overrides[stage], file)
    for stage, flags in stages.items():
        _refuse_own_flags(f"{file}: {stage}: ", {name: text for name, text in flags.items() if name != "config"}, file)
    return file, pipeline


def _refuse_own_flags(where: str, flags: Mapping[str, str], file: Path) -> None:
    """Raises ConfigError for a flag that a stage of a pipeline has no say in, with `-` or `_` in its name."""
    given = {name.replace("_", "-") for name in flags}
    if "output" in given:
        raise ConfigError(f"{where}output: a stage writes into the pipeline's output; set that with --output")
    if "config" in given:
        raise ConfigError(f"{where}config: {file} says it; edit a copy of that file")
    if for_all := given.intersection(OF_ALL_STAGES):
        raise ConfigError(f"{where}{min(for_all)}: holds for all stages; give --{min(for_all)} to `rlhf run`")
    if elsewhere := given.intersection(flag.name for flag in FLAGS if flag.launch):
        raise ConfigError(f"{where}{min(elsewhere)}: a pipeline runs on one machine; start its stages one by one")


def arguments(stage: str, flags: dict[str, str], file: Path, pipeline: Pipeline, request: Request) -> list[str]:
    """The stage's command line: the pipeline file's flags, over them --seed, over that the flags for this stage."""
    inside = {
        name: str(Path(pipeline.output) / text) if is_place(stage, name) and text.split("/")[0] in PLACES else text
        for name, text in flags.items()
    }
    seed = {} if request.seed is None else {"seed": str(request.seed)}
    merged: dict[str, str] = {}
    for layer in (inside, seed, request.overrides.get(stage, {})):
        merged |= {dotted(canonical(STAGES[stage], name)): text for name, text in layer.items()}
    merged["config"] = str(file.parent / flags["config"])
    merged["output"] = str(Path(pipeline.output) / stage)
    merged |= {"launch": request.launch} | ({"nproc": str(request.nproc)} if request.nproc else {})
    switches = ["--allow-inexact-resume"] if request.allow_inexact_resume else []
    return [f"--{name}={text}" for name, text in merged.items()] + switches


def is_place(stage: str, flag: str) -> bool:
    """Whether the flag names what the stage reads: elsewhere `grpo` and `dpo` are words like others."""
    field = dotted(canonical(STAGES[stage], flag))
    return field in INPUT_FIELDS.values() or field.startswith(SOURCES)


def make_world(directory: Path, seed: int) -> str:
    """Generate the chat world unless it is there, and say which.

    Raises:
        DataError: it is there, but of another seed or no longer as it was generated.
    """
    if (directory / MANIFEST).is_file():
        manifest = read_json(directory / MANIFEST)
        way_out = f"delete {directory} to make it again, or choose another --output"
        if manifest["seed"] != seed:
            raise DataError(f"{directory}: is the world of seed {manifest['seed']}, not {seed}; {way_out}")
        if changed := changed_files(directory, manifest):
            raise DataError(f"{directory}: changed since it was generated: {', '.join(changed)}; {way_out}")
        return f"world: done, kept: {directory}"
    from rlhf.data.chat_world import write_world

    with run_lock(directory):
        manifest = new_manifest("world", {"seed": seed}, sys.argv, seed, 1, 1, {}, versions())
        write_world(directory, seed)
        finish(directory, manifest, {}, outputs=_results(directory))
    return f"world: generated {directory}"


def print_plan(invocations: list[Invocation[Any]], as_json: bool) -> None:
    """The dry run of some stages."""
    plans = [describe(invocation) for invocation in invocations]
    if as_json:
        print(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
        return
    for plan in plans:
        print(f"{plan['stage']}: {json.dumps(plan['config'], indent=2)}\n")
        print("\n".join([*plan["batches"], "", *plan["commands"], "", "would write:"]))
        print("\n".join(f"  {name}" for name in plan["writes"]) + "\n")


def _parse(stage: str, flags: dict[str, str], file: Path, pipeline: Pipeline, request: Request) -> Invocation[Any]:
    try:
        return parse(stage, arguments(stage, flags, file, pipeline, request))
    except ConfigError as error:  # flags that nobody typed: say where they come from
        raise ConfigError(f"{file}, stage {stage}:\n{error}") from None


def _results(directory: Path) -> list[str]:
    ours = (MANIFEST, STATUS)
    return sorted(path.name for path in directory.iterdir() if path.name not in ours and not path.name.startswith("."))
