"""`rlhf data`: what a file of training data holds, before anything is trained on it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config.arguments import Parser, positive
from rlhf.errors import ConfigError, DataError, OutputError, UsageError

if TYPE_CHECKING:
    from rlhf.data.shapes import Kind

USAGE = """\
rlhf data check FILE [--stage STAGE] [--against FILE] [--columns.prompt NAME ...] [--json]
                     [--model MODEL [--config NAME] [--max-length N] [--too-long fail|skip|truncate|split]]
rlhf data preview FILE --model MODEL [--rows N] [--config NAME] [--max-length N] [--stage STAGE] [--columns.prompt NAME ...]
rlhf data split FILE TRAIN EVAL [--part 0.1] [--stage STAGE] [--columns.prompt NAME ...] [--json]
rlhf data clean FILE OUTPUT [--keep-html] [--stage STAGE] [--columns.prompt NAME ...] [--json]

  FILE is .jsonl, .jsonl.gz, .json or .parquet; .txt: a prompt a line. --stage: sft, rm, dpo, kto or ppo; without it, what
  the first rows can be.
  check     the shape of its rows, every mistake with its place (exit 65), and what is odd: duplicates, contradictions, lengths,
            HTML, broken encodings, longer replies preferred; with a model, which rows a run has, by the stage's defaults, those
            of a config and these flags: what is too long, which pairs are equal once cut (a run that would stop: exit 65);
            --against: prompts that stand in another file as well (train and eval, say)
  preview   rows as a model gets them: each token, what is trained on in colour (between ⟦ ⟧ where there is none), where
            replies end, two BOS as an error
  split     TRAIN and EVAL (.jsonl): a row's place follows from a hash of its prompt, so equal prompts stay on one side, and
            a file that grows keeps its split
  clean     OUTPUT (.jsonl) and OUTPUT.report.json: without bad rows, duplicates and equal pairs; broken encodings mended
            where that is certain, HTML and control characters taken out. FILE stays as it is.
  --columns.FIELD NAME      our name of a column and the file's; --json-key NAME: plain text"""

KINDS: dict[str, Kind] = {"sft": "sft", "rm": "ranking", "dpo": "pair", "kto": "rated", "ppo": "prompt", "grpo": "prompt"}
STAGES_OF: dict[Kind, str] = {
    "text": "sft",
    "sft": "sft",
    "ranking": "rm or dpo",
    "pair": "dpo",
    "rated": "kto",
    "prompt": "ppo or grpo",
}
FIELDS = (
    "prompt",
    "completion",
    "messages",
    "text",
    "chosen",
    "rejected",
    "responses",
    "label",
    "scores",
    "ranks",
    "margin",
    "tie",
)


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("action", choices=("check", "preview", "split", "clean"))
    parser.add_argument("file", type=Path)
    parser.add_argument("outputs", type=Path, nargs="*")
    parser.add_argument("--stage", choices=tuple(KINDS))
    parser.add_argument("--model")
    parser.add_argument("--config")
    parser.add_argument("--max-length", type=positive)
    parser.add_argument("--too-long", choices=("fail", "skip", "truncate", "split"))
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rows", type=positive, default=2)
    parser.add_argument("--part", type=float, default=0.1)
    parser.add_argument("--keep-html", action="store_true")
    parser.add_argument("--json-key")
    for field in FIELDS:
        parser.add_argument(f"--columns.{field}", dest=f"columns.{field}", metavar="NAME")
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)
    _require_fit(given)
    given.columns = {field: name for field in FIELDS if (name := getattr(given, f"columns.{field}"))}
    try:
        given.kind = _kind(given)
        return {"check": _check, "preview": _preview, "split": _split, "clean": _clean}[given.action](given)
    except (ConfigError, DataError) as error:
        raise type(error)(_own_flags(str(error))) from None


def _own_flags(text: str) -> str:
    """What a stage says of its flags, said of this command's."""
    return re.sub(r"^data\.columns\b|--data\.columns\b", "--columns", text)


def _require_fit(given: argparse.Namespace) -> None:
    expected = {"check": 0, "preview": 0, "split": 2, "clean": 1}[given.action]
    if len(given.outputs) != expected:
        raise UsageError(f"data {given.action}: expected {expected} files after FILE, found {len(given.outputs)}\n{USAGE}")
    if given.action == "preview" and not given.model:
        raise UsageError("data preview: give --model, whose tokenizer and template the rows are read with")
    if given.action == "check" and not given.model and (given.config or given.max_length or given.too_long):
        raise UsageError("data check: --config, --max-length and --too-long are about tokens; give --model, whose they are")
    if given.json_key and given.stage not in (None, "sft"):
        raise UsageError(f"--json-key {given.json_key} names a column of plain text, which --stage {given.stage} does not read")
    if not 0 < given.part < 1:
        raise UsageError(f"--part {given.part:g}: expected a number above 0 and below 1")
    if len(set(given.outputs)) < len(given.outputs):
        raise UsageError(f"data {given.action}: {given.outputs[0]} is given twice; each side wants a file of its own")
    if given.action == "clean" and (report := Path(f"{given.outputs[0]}.report.json")).exists():
        raise OutputError(f"{report}: is there already; name another OUTPUT, or remove it")
    for output in given.outputs:
        if output.suffix != ".jsonl":
            raise UsageError(f"{output}: is written as .jsonl; name it so")
        if output.exists():
            raise OutputError(f"{output}: is there already; name another file, or remove it")
        if not output.parent.is_dir():
            raise OutputError(f"{output}: there is no directory {output.parent}")


def _kind(given: argparse.Namespace) -> Kind:
    from rlhf.data.rows import MAX_LINE_BYTES, first_columns
    from rlhf.data.survey import guess_kind, require_columns

    if given.columns:
        require_columns(given.file, given.columns)
    if given.json_key:
        return "text"
    if given.stage:
        return KINDS[given.stage]
    if kind := guess_kind(given.file, given.columns):
        return kind
    there = ", ".join(first_columns(str(given.file), MAX_LINE_BYTES)) or "no columns"
    raise DataError(
        f"{given.file}: its rows are of no kind that is known: they have {there}; name the columns (--columns.prompt NAME, "
        "--columns.completion NAME, ...), or say --stage, and it is told what each row lacks"
    )


def _check(given: argparse.Namespace) -> int:
    from rlhf.data.formats import Problem
    from rlhf.data.rows import problems_alike
    from rlhf.data.survey import check

    found = check(given.file, given.kind, given.columns, given.json_key, given.against)
    for error in found["errors"]:
        error["fix"] = _own_flags(error["fix"])
    found["stops"] = False
    if given.model:
        found["tokens"], found["stops"] = _in_tokens(given, found["notes"])
    if given.as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        errors = [line for line, _ in problems_alike([Problem(**error) for error in found["errors"]])]
        print("\n".join(_described(found, errors)))
    return DataError.exit_code if found["errors"] or found["stops"] else 0


def _described(found: dict[str, Any], errors: list[str]) -> list[str]:
    columns = f"each with {', '.join(found['columns'])}" if found["columns"] else "none of which can be read"
    yields = [f"{found['file']}: {found['rows']} rows for {STAGES_OF[found['kind']]}, {columns}"]
    yields += [f"  read      {note}" for note in found["notes"]]
    yields += [f"  error     {error}".replace("\n", "\n            ") for error in errors]
    yields += [f"  odd       {finding['text']}" for finding in found["findings"]]
    for name, sizes in found["characters"].items():
        yields.append(f"  length    {name}: " + ", ".join(f"{part} {size:,}" for part, size in sizes.items()) + " characters")
    yields += [f"  against   {found['against']}"] if found["against"] else []
    yields += [f"  tokens    {note}" for note in found.get("tokens", [])]
    warned = any(note.startswith("warning: ") for note in found.get("tokens", []))
    if not errors and not found["findings"] and not found["stops"] and not warned:
        yields.append("  ok        no error, nothing odd")
    return yields


def _in_tokens(given: argparse.Namespace, said: list[str]) -> tuple[list[str], bool]:
    """What a run would have of the file, of what is not `said` yet; and whether it would stop there."""
    from rlhf.data import examples
    from rlhf.data.survey import PARTS, percentiles

    reading = _reading(given)
    template = _template(given.model, reading.template)
    read = {"text": examples.sft_examples, "sft": examples.sft_examples, "ranking": examples.ranked_examples}
    read |= {"pair": examples.pair_examples, "rated": examples.rated_examples, "prompt": examples.prompt_examples}

    def rows(**rules: Any) -> Any:
        lenient = {"extra_columns": "ignore", "on_error": "skip", "max_skip_fraction": 1.0}
        return read[given.kind](str(given.file), reading.model_copy(update={**lenient, **rules}), template)

    try:
        whole = rows(max_length=sys.maxsize, too_long="truncate")
        sizes = [len(one) for one in whole.items]
        parts = zip(PARTS, percentiles(sizes), strict=True)
        lines = [f"{len(sizes)} rows: {', '.join(f'{part} {size:,}' for part, size in parts)} tokens"]
        longer = sum(size > reading.max_length for size in sizes)
        if reading.too_long == "fail" and longer:
            advice = "--data.max_length N, or --data.too_long skip, or truncate"
            lines.append(f"{longer} of them are longer than {reading.max_length} tokens, where a run stops; give {advice}")
            return lines, True
        run = rows() if longer else whole
    except DataError as error:
        return str(error).splitlines(), True
    new = [note for note in run.notes if note not in said]
    return [*lines, f"{len(run.items)} rows are what a run has, of at most {reading.max_length} tokens", *new], False


def _reading(given: argparse.Namespace) -> Any:
    """How the stage of these rows reads them: by its defaults, over them --config, over it the flags.

    Raises ConfigError where the config has none of the stage's `data`, UsageError where it reads another column.
    """
    from rlhf.config.load import find_config, load
    from rlhf.config.policies import PromptData
    from rlhf.config.reward_models import RmData
    from rlhf.config.schema import SftData
    from rlhf.config.sections import Data

    sections = {"text": SftData, "sft": SftData, "ranking": RmData, "pair": Data, "rated": Data, "prompt": PromptData}
    flags = {"train": str(given.file), "max_length": given.max_length, "too_long": given.too_long, "json_key": given.json_key}
    flags |= {f"columns.{field}": column for field, column in given.columns.items()}
    overrides = [(name, str(value)) for name, value in flags.items() if value is not None]
    file, section = (find_config(given.config), "data") if given.config else (None, None)
    reading = load(sections[given.kind], file, overrides, section=section)
    if getattr(reading, "json_key", None) != given.json_key:
        raise UsageError(f"--config {given.config} is for plain text: give --json-key {getattr(reading, 'json_key', '')}")
    if reading.columns != given.columns:
        flags = " ".join(f"--columns.{field} {column}" for field, column in reading.columns.items())
        raise UsageError(f"--config {given.config} maps columns: give {flags}")
    return reading


def _template(model: str, kind: Literal["auto", "chat", "plain"] = "auto") -> Any:
    from rlhf.data.templates import Template
    from rlhf.models.load import load_generation_config, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(model)
    return Template(tokenizer, kind, stop_ids(load_generation_config(model), tokenizer))


def _preview(given: argparse.Namespace) -> int:
    from rich.console import Console

    from rlhf.data.preview import preview

    console = Console(highlight=False, soft_wrap=True)
    twice = False
    reading = _reading(given)
    template = _template(given.model, reading.template)
    source = given.file, given.kind, given.columns, given.json_key
    for row in preview(*source, template, given.rows, reading.max_length, marked=console.color_system is None):
        console.print(row.text)
        twice = twice or row.two_bos
    return DataError.exit_code if twice else 0


def _split(given: argparse.Namespace) -> int:
    from rlhf.data.mend import split_file

    counts = split_file(given.file, given.kind, given.columns, given.json_key, given.outputs, given.part)
    result = {str(output): count for output, count in zip(given.outputs, counts[:2], strict=True)}
    result |= {"neither, as chosen equals rejected": counts[2]} if counts[2] else {}
    print(json.dumps(result) if given.as_json else "\n".join(f"{file}: {count} rows" for file, count in result.items()))
    return 0


def _clean(given: argparse.Namespace) -> int:
    from rlhf.data.mend import clean_file

    report = clean_file(given.file, given.kind, given.columns, given.json_key, given.outputs[0], given.keep_html)
    if given.as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        changes = "".join(f"\n  {len(places)} rows: {name}" for name, places in report["changes"].items())
        print(f"{given.outputs[0]}: {report['written']} of {report['read']} rows{changes}")
    return 0
