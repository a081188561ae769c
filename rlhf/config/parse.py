"""The command line of a stage, or of a command with a config: its own flags, and every field of its schema by dotted name.

`rlhf ppo ...` and the launched `stages/ppo.py ...` both parse with it, the second without the launch flags. tyro is
imported for `--help` alone, so that a plain start stays fast; what flags mean does not depend on it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, make_dataclass
from io import BytesIO, TextIOWrapper
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, overload

from rlhf.config import fields
from rlhf.config.commands import COMMANDS, POSITIONALS, ChatConfig, EvalConfig, GenerateConfig, RecordConfig, ScoreConfig
from rlhf.config.load import find_config, load
from rlhf.config.machines import Machines, machines_of, whole_number
from rlhf.config.schema import SHORT_FLAGS, STAGES, DpoConfig, GrpoConfig, KtoConfig, PpoConfig, RmConfig, SftConfig, Stage
from rlhf.config.sections import Section
from rlhf.errors import ConfigError, UsageError

Config = TypeVar("Config", bound=Section, covariant=True)
SCHEMAS: dict[str, type[Section]] = {**STAGES, **COMMANDS}
Drawn = tuple[str, Any, Any]
"""A field of a dataclass made for tyro to draw: name, type, default."""

METAVARS: dict[fields.Form, str] = {"boolean": "true|false", "integer": "INTEGER", "number": "NUMBER", "text": "TEXT"}


class Flag(NamedTuple):
    """A flag of the command itself. One without a metavar is a switch; a launch flag is not handed on to the stage."""

    name: str
    metavar: str
    help: str
    hint: str = ""
    launch: bool = False
    only: tuple[str, ...] = tuple(STAGES)


FLAGS = (
    Flag("config", "NAME|FILE", "A shipped config (`ppo`, `quickstart/ppo`) or a .yaml or .json file.", only=tuple(SCHEMAS)),
    Flag("launch", "NAME|FILE", "How to launch: a shipped file or one of yours.", "(default: auto)", launch=True),
    Flag(
        "nproc",
        "INTEGER",
        "Processes to start, over all machines.",
        "(default: the launch file's, or 1)",
        launch=True,
    ),
    Flag("num-machines", "INTEGER", "Machines the processes are spread over.", "(at least 1; default: 1)", launch=True),
    Flag("machine-rank", "INTEGER", "Number of this machine; the same command runs on each.", "(default: 0)", launch=True),
    Flag("main-address", "HOST[:PORT]", "Machine 0, as the others reach it.", "(default port: 29500)", launch=True),
    Flag("dry-run", "", "Print the resolved config, the plan and the launch command; touch nothing.", launch=True),
    Flag("unit-test", "", "Check PPO alone, on the config `unit-test` unless another is given.", only=("ppo",)),
    Flag("json", "", "Print the result as JSON.", only=tuple(SCHEMAS)),
    Flag("resume", "RUN", "Go on with this run, by the config in its run.json; other flags go over that."),
    Flag("allow-inexact-resume", "", "Go on from a checkpoint even where the result will not be equal to the bit."),
)

RUN_JSON, CONFIG_OF_RUN, CHECKPOINTS = "run.json", "config", "checkpoints"
"""Where a run has its config (rlhf/runs/manifest.py) and what it can go on from (rlhf/training/checkpoint.py)."""


@dataclass(frozen=True)
class Resume:
    """How an unfinished run in the output directory is to be gone on with."""

    step: int | None = None
    """The training checkpoint that was named; None: none was."""
    allow_inexact: bool = False
    """Whatever has changed; it is recorded."""


@dataclass(frozen=True)
class Invocation(Generic[Config]):
    """What one command line asks for."""

    stage: str
    config: Config
    config_file: Path | None
    launch: str
    nproc: int | None
    """None: as the launch file has it."""
    machines: Machines | None
    """None: as the launch file has it."""
    dry_run: bool
    unit_test: bool
    as_json: bool
    resume: Resume
    arguments: list[str]
    """The words for the stage script: all that were given, unchanged, but the launch flags."""


class _Words(NamedTuple):
    """The words of a command line, sorted by what they are."""

    own: dict[str, str]
    overrides: list[tuple[str, str]]
    arguments: list[str]


@overload
def parse(stage: Literal["sft"], argv: Sequence[str]) -> Invocation[SftConfig]: ...
@overload
def parse(stage: Literal["rm"], argv: Sequence[str]) -> Invocation[RmConfig]: ...
@overload
def parse(stage: Literal["dpo"], argv: Sequence[str]) -> Invocation[DpoConfig]: ...
@overload
def parse(stage: Literal["kto"], argv: Sequence[str]) -> Invocation[KtoConfig]: ...
@overload
def parse(stage: Literal["ppo"], argv: Sequence[str]) -> Invocation[PpoConfig]: ...
@overload
def parse(stage: Literal["grpo"], argv: Sequence[str]) -> Invocation[GrpoConfig]: ...
@overload
def parse(stage: Literal["chat"], argv: Sequence[str]) -> Invocation[ChatConfig]: ...
@overload
def parse(stage: Literal["generate"], argv: Sequence[str]) -> Invocation[GenerateConfig]: ...
@overload
def parse(stage: Literal["eval"], argv: Sequence[str]) -> Invocation[EvalConfig]: ...
@overload
def parse(stage: Literal["score"], argv: Sequence[str]) -> Invocation[ScoreConfig]: ...
@overload
def parse(stage: Literal["compare"], argv: Sequence[str]) -> Invocation[RecordConfig]: ...
@overload
def parse(stage: str, argv: Sequence[str]) -> Invocation[Stage]: ...
def parse(stage: str, argv: Sequence[str]) -> Invocation[Any]:
    """Read and validate a stage's command line; with `--help`, print the help and exit 0.

    Raises UsageError (exit 2) for words that cannot be read as flags, ConfigError (exit 78) with all mistakes in what
    the file and the flags say.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(stage))
        sys.exit(0)
    argv = _by_flags(stage, argv)
    words = _sort(stage, argv)
    machines = machines_of(words.own)
    nproc = whole_number(words.own, "nproc", 1, 1) if "nproc" in words.own else None
    alone = (nproc or 1) == 1 and not machines and words.own.get("launch", "auto") in ("auto", "cpu", "gpu")
    if "unit-test" in words.own and not alone:
        raise UsageError(
            "--unit-test: runs in one process; leave out --nproc, --num-machines, and any --launch but cpu and gpu"
        )
    flags = [flag.name for flag in _flags(stage)]
    if "resume" in words.own:
        file, step = _run_to_resume(stage, words.own)
        config = load(SCHEMAS[stage], file, words.overrides, flags, section=CONFIG_OF_RUN)
        _require_same_place(config, file.parent)
    else:
        name, step = words.own.get("config", "unit-test" if "unit-test" in words.own else None), None
        file = None if name is None else find_config(name)
        config = load(SCHEMAS[stage], file, words.overrides, flags)
    if "unit-test" in words.own:
        _require_precise(config)
    return Invocation(
        stage=stage,
        config=config,
        config_file=file,
        launch=words.own.get("launch", "auto"),
        nproc=nproc,
        machines=machines,
        dry_run="dry-run" in words.own,
        unit_test="unit-test" in words.own,
        as_json="json" in words.own,
        resume=Resume(step, "allow-inexact-resume" in words.own),
        arguments=words.arguments,
    )


def _by_flags(stage: str, argv: Sequence[str]) -> list[str]:
    """The words, those given by their place with the flag that they stand for."""
    places = POSITIONALS.get(stage, ())
    count = next((place for place, word in enumerate(argv[: len(places)]) if word.startswith("-")), min(len(argv), len(places)))
    return [word for name, text in zip(places, argv[:count], strict=False) for word in (f"--{name}", text)] + [*argv[count:]]


def _run_to_resume(stage: str, own: Mapping[str, str]) -> tuple[Path, int | None]:
    """run.json of the run that --resume names, and the step where it names one checkpoint of it."""
    for other in ("config", "unit-test"):
        if other in own:
            raise UsageError(f"--resume: takes the config of the run; leave --{other} out")
    named = Path(expanduser(own["resume"]))
    checkpoint = re.fullmatch(r"step-(\d+)", named.name) if named.parent.name == CHECKPOINTS else None
    run = named.parent.parent if checkpoint else named
    if not (run / RUN_JSON).is_file():
        raise UsageError(f"--resume {named}: no run: {run} holds no {RUN_JSON}; name the --output of a run that was started")
    if checkpoint and not named.is_dir():
        there = ", ".join(sorted(path.name for path in named.parent.glob("step-*"))) or "none"
        raise UsageError(f"--resume {named}: no such checkpoint; there is {there}")
    try:
        made_by = json.loads((run / RUN_JSON).read_text("utf-8"))["stage"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--resume {named}: {run / RUN_JSON} is not the manifest of a run of ours") from None
    if made_by != stage:
        raise UsageError(f"--resume {named}: is a run of {made_by}: rlhf {made_by} --resume {named}")
    return run / RUN_JSON, int(checkpoint[1]) if checkpoint else None


def _require_same_place(config: Any, run: Path) -> None:
    if Path(config.output).resolve() != run.resolve():
        raise ConfigError(
            f"--resume {run} and output {config.output} are two places, and a run goes on where it is; start it from the "
            f"directory where it was started, as its paths are seen from there; or, if {run} was moved, give --output={run}"
        )


def _flags(stage: str) -> Iterator[Flag]:
    return (flag for flag in FLAGS if stage in flag.only)


def _require_precise(config: Any) -> None:
    if config.precision == "bf16":
        raise ConfigError("precision: the unit test compares numbers closer than bf16 can tell apart; use fp32 or fp64")
    if config.fp8.recipe != "none":
        raise ConfigError("fp8.recipe: the unit test compares numbers closer than FP8 can tell apart; use `none`")


def _sort(stage: str, argv: Sequence[str]) -> _Words:
    own_flags = {flag.name: flag for flag in _flags(stage)}
    words = _Words({}, [], [])
    position = 0
    while position < len(argv):
        word, *rest = argv[position:]
        if not word.startswith("--") or word == "--":
            raise UsageError(f"`{word}`: expected a flag, as in `--output DIR`; `rlhf {stage} --help` lists them")
        name, equals, text = word[2:].partition("=")
        flag = own_flags.get(name.replace("_", "-"))
        is_switch = flag is not None and not flag.metavar
        takes_next = not equals and not is_switch and bool(rest) and not rest[0].startswith("--")
        if flag and flag.name in words.own:
            raise UsageError(f"--{flag.name}: given twice; keep one")
        if is_switch and equals:
            raise UsageError(f"--{name}: takes no value; leave `={text}` out")
        if takes_next:
            text = rest[0]
        elif not equals and not is_switch:
            text = _alone(stage, name, flag)
        if flag:
            words.own[flag.name] = text
        else:
            words.overrides.append((name, text))
        taken = argv[position : position + 1 + takes_next]
        if not (flag and flag.launch):
            words.arguments.extend(taken)
        position += len(taken)
    return words


def _alone(stage: str, name: str, flag: Flag | None) -> str:
    """The value of a flag without one: true for a boolean; an unknown flag is left to `load`, which knows what is near.

    Raises UsageError for all others.
    """
    schema = SCHEMAS[stage]
    meant = fields.at(schema, fields.canonical(schema, name))
    if meant and meant.form == "boolean":
        return "true"
    if flag or meant:
        expected = flag.metavar if flag else meant.expected if meant else ""
        raise UsageError(f"--{name}: the value is missing; expected {expected}")
    return ""


def help_text(stage: str) -> str:
    """Every flag of a stage with its unit, range and default, a box for each section."""
    import tyro

    schema = SCHEMAS[stage]
    page = make_dataclass(
        stage,
        [
            *(_drawn(flag.name, flag.metavar, flag.help, flag.hint) for flag in _flags(stage)),
            *_twin(schema),
        ],
    )
    description = f"{schema.__doc__}\n\nFlags go over the config file. `-` and `_` are the same inside a flag's name."
    places = POSITIONALS.get(stage, ())
    if places:
        instead = " ".join(f"{fields.flag_for(name)} {name.upper()}" for name in places)
        description += f"\n`{' '.join(map(str.upper, places))}` may also be given as `{instead}`."
    # tyro draws frames where the encoding has them; a buffer, unlike StringIO, has an encoding to ask.
    drawing = TextIOWrapper(BytesIO(), encoding=sys.stdout.encoding)
    with redirect_stdout(drawing), suppress(SystemExit):
        # every help text is given above; for sections, which have none, tyro would read sources to find one in a comment
        tyro.cli(
            page,
            prog=" ".join(["rlhf", stage, *map(str.upper, places)]),
            description=description,
            args=["--help"],
            config=(tyro.conf.HelptextFromCommentsOff,),
        )
    drawing.seek(0)
    return drawing.read()


def _twin(section: type[Section], prefix: str = "") -> list[Drawn]:
    """The section's fields for tyro to draw; all are text to it: our words, not its guesses, say what a field takes."""
    import tyro

    drawn = []
    for name, field in fields.of_section(section).items():
        if field.section:
            inner = make_dataclass(name, _twin(field.section, f"{prefix}{name}."))
            drawn.append((name, inner, dataclasses.field(default_factory=inner)))
        elif field.named_sections:
            inner = make_dataclass(name, _twin(field.named_sections, f"{prefix}{name}.NAME."))
            drawn.append(_drawn(f"{name}.NAME.FIELD", "VALUE", field.description, f"(default: {field.default_text})"))
            look = tyro.conf.arg(name=f"{name}.NAME")
            drawn.append((f"{name}_NAME", Annotated[inner, look], dataclasses.field(default_factory=inner)))
        else:
            hints = [field.limits, "required" if field.required else f"default: {field.default_text}"]
            hint = f"({'; '.join(filter(None, hints))})"
            key = f"{name}.NAME" if field.form == "mapping" else name
            short = [f"--{SHORT_FLAGS[prefix + name]}"] if prefix + name in SHORT_FLAGS else []
            drawn.append(_drawn(key, _metavar(field), field.description, hint, short))
    return drawn


def _metavar(field: fields.Field) -> str:
    if field.item:
        kind = _metavar(field.item)
        return f"{kind},..." if field.form == "list" else kind
    return "|".join([*(field.choices or [METAVARS[field.form]]), *(["none"] if field.nullable else [])])


def _drawn(name: str, metavar: str, description: str, hint: str, short: Sequence[str] = ()) -> Drawn:
    import tyro

    look = tyro.conf.arg(name=name, metavar=metavar, help=description, help_behavior_hint=hint, aliases=list(short))
    attribute = name.replace("-", "_").replace(".", "_")
    if metavar:
        return attribute, Annotated[str, look], dataclasses.field(default="")
    return attribute, Annotated[bool, tyro.conf.FlagCreatePairsOff, look], dataclasses.field(default=False)
