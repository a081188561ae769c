"""The command `rlhf`: what each word means, and how a mistake ends.

Nothing here imports torch: parsing, checking and launching are quick, and the stage itself is a child process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf import digest, paths
from rlhf.config.arguments import Parser, positive
from rlhf.errors import DataError, OutOfMemory, OutputError, RlhfError, StorageError, UsageError, disk_failed, without_secrets

STAGES = ("sft", "rm", "dpo", "kto", "ppo", "grpo")

HELP = """\
rlhf: SFT, reward model, PPO: from pre-trained weights to a policy tuned on human preferences

  run PIPELINE     several stages, one after the other     rlhf run quickstart
  sft              supervised fine-tuning                  rlhf sft --config sft --model DIR --data chats.jsonl
  rm               a reward model from preferences         rlhf rm --config rm --model runs/sft --data pairs.jsonl
  dpo              DPO, IPO, SimPO, ORPO on preferences    rlhf dpo --config dpo --model runs/sft --data pairs.jsonl
  kto              KTO on replies rated good or bad        rlhf kto --config kto --model runs/sft --data rated.jsonl
  ppo              PPO against a reward                    rlhf ppo --config ppo --actor SFT --reward RM --data FILE
  ppo --unit-test  check PPO alone, in a minute            rlhf ppo --unit-test
  grpo             the same without a critic               rlhf grpo --config grpo --actor SFT --reward RM --data FILE
  generate MODEL   replies to the prompts of a file        rlhf generate runs/ppo --data prompts.jsonl --output FILE
  eval MODEL       loss, or accuracy, on held-out rows     rlhf eval runs/sft --data chats.jsonl --precision both
  show RUN         what a run was made from                rlhf show runs/ppo
  convert SRC DST  a checkpoint into another format        rlhf convert megatron/ model/ --to hf --verify
  serve-reward RM  a reward model as a service             rlhf serve-reward runs/rm --port 8000
  vocab expand     new pieces for tokenizer and model      rlhf vocab expand MODEL DST --tokens FILE
  fp8 ACTION       what FP8 does to your model             rlhf fp8 inspect MODEL --data chats.jsonl
  path STAGE       where a stage's recipe is               rlhf path ppo
  copy STAGE       a copy of the recipe, to edit           rlhf copy ppo my_ppo.py

A model is a Hugging Face id (owner/name@revision), a model directory, a Megatron checkpoint, a .gguf file or a run.
`rlhf sft --help` lists every field of the config; each is a flag: --optimizer.lr 1e-5.
--dry-run shows what a command would do and touches nothing; --json prints what a program can read; --version.
"""

RUN_USAGE = """\
rlhf run PIPELINE [--output DIR] [--seed N] [--launch NAME|FILE] [--nproc N] [--STAGE.FIELD VALUE ...]
                  [--allow-inexact-resume] [--dry-run] [--json]"""


CONVERT_USAGE = """\
rlhf convert SRC DST --to hf|megatron|te|bf16|fp8 [--dry-run] [--verify [--reference DIR]] [--json]

  SRC is a Megatron checkpoint (legacy, core, torch_dist; its root or one iteration), a Hugging Face directory, a run,
  a LoRA adapter or FSDP's shards (--to hf merges them).
  What it is, how it is spread over ranks and every size are found out. What cannot be known:
    --config DIR            a Hugging Face directory of the same model: config.json and tokenizer come from it
    --family NAME           the table of names to use; an unknown name lists them
    --rotary-base N         where neither args nor config.json say
    --contiguous-gate       ranks hold the rows of [gate; up] one after the other (Pai's gpt3_llama converter, v0.5.1)
  --to megatron and --to te (Transformer Engine's TransformerLayer):
    --tp N --pp N --vpp N --ep N                           ranks to spread over (default: 1)
    --names transformer-engine|local|legacy                (default: transformer-engine; --to te has its own)
    --layout torch|torch_dist                              (default: torch; torch_dist fits any ranks)
  --to bf16 and --to fp8 change the precision of a Hugging Face directory: E4M3 with a factor for each 128 x 128 block.
  --shard-gb N              size of a safetensors file (default: 5)
  --dry-run prints every tensor, its target and the operation, and touches nothing; --verify compares logits (exit 1)."""


SERVE_USAGE = """\
rlhf serve-reward MODEL [--host ADDRESS] [--port N] [--batch-size N] [--template auto|chat|plain] [--trust-remote-code]

  Answers POST {"prompts": [...], "responses": [...]} with {"scores": [...]} (docs/rewards.md). MODEL is any reward model.
  A run on this machine asks it with --reward http://127.0.0.1:8000 --reward.allow_private true. Requests must bear the token
  RLHF_REWARD_TOKEN, where that is set; without one, only this machine can ask. --port 0: any that is free."""


VOCAB_USAGE = """\
rlhf vocab expand MODEL DST --tokens FILE [--multiple-of N] [--dry-run] [--json]

  FILE has one piece a line, or is a tokenizer (its directory, any tokenizer.json, a SentencePiece .model) whose pieces are
  taken. A piece is text as it stands: a word inside a sentence starts with a space. Pieces go into the tokenizer's own model
  (BPE with the merges that lead to them, and the tokens on the way), so every other text is split as before. A line that
  cannot be one token is an error; what another tokenizer has and this one cannot take is left out and named by --json.
  A new row of embedding and head is the mean of the rows of the old pieces of the same text; old rows stay to the bit.
  --multiple-of N rounds the embedding's rows up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (rlhf/errors.py); a mistake of the user is one message, no traceback."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except RlhfError as error:
        print(f"rlhf: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `rlhf --help | head`: who read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if full := OutOfMemory.behind(error, "close other programs, or use a machine with more"):
            print(f"rlhf: error: {full}", file=sys.stderr)
            return full.exit_code
        if disk_failed(error):
            print(f"rlhf: error: {without_secrets(str(error))}; make room, or name another place", file=sys.stderr)
            return StorageError.exit_code
        # our own bug: the only traceback a user sees, with the code that says so
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        print("rlhf: this is a bug of rlhf, not of yours; please report it with the lines above", file=sys.stderr)
        return 70


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "generate": _generate,
        "eval": _eval,
        "show": _show,
        "convert": _convert,
        "serve-reward": _serve_reward,
        "vocab": _vocab,
        "fp8": _fp8,
        "path": _path,
        "copy": _copy,
    }
    match argv:
        case [] | ["-h" | "--help" | "help", *_]:
            print(HELP, end="")
            return 0
        case ["--version", *_]:
            from rlhf import __version__

            print(f"rlhf {__version__}")
            return 0
        case [stage, *rest] if stage in STAGES:
            return _stage(stage, rest)
        case [name, *rest] if name in commands:
            return commands[name](rest)
        case [name, *_]:
            raise UsageError(f"no command {name!r}; there are {', '.join((*STAGES, *commands))} (rlhf --help)")
    raise AssertionError("unreachable: every list of words is matched above")


def _stage(stage: str, argv: list[str]) -> int:
    from rlhf.config.parse import parse
    from rlhf.runs.execute import execute
    from rlhf.runs.manifest import MANIFEST, read_json, read_status
    from rlhf.runs.pipeline import print_plan

    invocation = parse(stage, argv)
    if invocation.dry_run:
        print_plan([invocation], invocation.as_json)
        return 0
    code = execute(invocation, quiet=invocation.as_json)
    if invocation.as_json and not invocation.unit_test:
        run = Path(invocation.config.output)
        manifest = read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
        outcome = {"run": str(run), "status": read_status(run), "result": manifest.get("result")}
        print(json.dumps(outcome, indent=2))
    return code


def _run(argv: list[str]) -> int:
    from rlhf.runs.pipeline import Request, run_pipeline

    parser = Parser(RUN_USAGE)
    parser.add_argument("pipeline")
    parser.add_argument("--output")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--launch", default="auto")
    parser.add_argument("--nproc", type=int)
    parser.add_argument("--allow-inexact-resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    own, others = parser.parse_known_args(argv)
    return run_pipeline(Request(**vars(own), overrides=_stage_flags(others)))


def _stage_flags(words: list[str]) -> dict[str, dict[str, str]]:
    """`--ppo.schedule.length 3` (or with `=`) as {"ppo": {"schedule.length": "3"}}."""
    flags: dict[str, dict[str, str]] = {}
    remaining = iter(words)
    for word in remaining:
        name, equals, text = word.partition("=")
        stage, _, dotted = name.removeprefix("--").partition(".")
        if not name.startswith("--") or stage not in STAGES or not dotted:
            raise UsageError(f"{word}: unknown here; a stage's field is set as in --ppo.schedule.length 3\n{RUN_USAGE}")
        value = text if equals else next(remaining, None)
        if value is None or (not equals and value.startswith("--")):
            raise UsageError(f"{word}: give a value after it")
        flags.setdefault(stage, {})[dotted] = value
    return flags


def _generate(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("generate", argv)  # before the seconds that importing torch takes

    from rlhf.training.generate_command import generate

    return generate(invocation)


def _eval(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("eval", argv)

    from rlhf.training.evaluate_command import evaluate

    return evaluate(invocation)


def _show(argv: list[str]) -> int:
    from rlhf.runs.show import describe_run, print_run

    parser = Parser("rlhf show RUN [--json]")
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args(argv)
    described = describe_run(arguments.run)
    if arguments.as_json:
        print(json.dumps(asdict(described), indent=2))
    else:
        print_run(described, sys.stdout)
    return 0


def _convert(argv: list[str]) -> int:
    parser = Parser(CONVERT_USAGE)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=("hf", "megatron", "te", "bf16", "fp8"), required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--family")
    parser.add_argument("--rotary-base", type=float)
    parser.add_argument("--contiguous-gate", action="store_true")
    for ranks in ("tp", "pp", "vpp", "ep"):
        parser.add_argument(f"--{ranks}", type=positive, default=1)
    parser.add_argument("--names", choices=("transformer-engine", "local", "legacy"), default="transformer-engine")
    parser.add_argument("--layout", choices=("torch", "torch_dist"), default="torch")
    parser.add_argument("--shard-gb", type=float, default=5)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)
    if given.reference and not given.verify:
        raise UsageError("--reference: only --verify compares with it; give both")
    if not 1e-9 <= given.shard_gb < 1e9:
        raise UsageError("--shard-gb: expected a number above 0")

    from rlhf.checkpoints.directory import weight_files
    from rlhf.models.source import resolve

    source = given.source
    if (source / "run.json").is_file():
        source = Path(resolve(str(source)).path)
    if (source / "adapter_config.json").is_file():
        return _merge(source, given)
    if not given.dry_run:
        digest.begin(weight_files(source))
    # Pages of 2 MB for tensors that come and go: pages of 4 kB cost 0.7 s for 1.5 GB. Torch asks when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from rlhf.checkpoints.command import convert  # a second or two, in which the files are hashed
    from rlhf.checkpoints.convert import Request
    from rlhf.checkpoints.sizes import Grid

    request = Request(
        source=source,
        destination=given.destination,
        to=given.to,
        family=given.family,
        config=given.config,
        rotary_base=given.rotary_base,
        grid=Grid(given.tp, given.pp, given.vpp, given.ep),
        names=given.names,
        layout=given.layout,
        contiguous_gate=given.contiguous_gate,
        shard_bytes=int(given.shard_gb * 1e9),
    )
    return convert(request, given.dry_run, given.verify, given.reference, given.as_json)


def _merge(adapter: Path, given: argparse.Namespace) -> int:
    if given.to != "hf":
        raise UsageError(f"{adapter}: a LoRA adapter; --to hf merges it into its base, and the result converts to {given.to}")
    for name in ("verify", "config", "family", "rotary_base", "contiguous_gate"):
        if getattr(given, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag}: {adapter} is a LoRA adapter, which is merged into its base and nothing else; leave it out"
            )
    if given.destination.exists():
        raise OutputError(f"{given.destination}: is there already; name another directory, or remove it")
    if not given.dry_run:
        from rlhf.models.save import save_merged

        save_merged(str(adapter), given.destination)
    if given.as_json:
        print(json.dumps({"from": "LoRA adapter", "to": "Hugging Face, merged", "destination": str(given.destination)}))
    else:
        outcome = "would be merged" if given.dry_run else "merged"
        print(f"convert  the adapter {adapter}, {outcome} into its base: {given.destination}")
    return 0


def _serve_reward(argv: list[str]) -> int:
    parser = Parser(SERVE_USAGE)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--template", choices=("auto", "chat", "plain"), default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args(argv)
    if not 0 <= given.port < 1 << 16:
        raise UsageError(f"--port {given.port}: expected 0 to 65535")

    from rlhf.training.serve_command import serve

    return serve(**vars(given))


def _vocab(argv: list[str]) -> int:
    parser = Parser(VOCAB_USAGE)
    parser.add_argument("action", choices=("expand",))
    parser.add_argument("model")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--multiple-of", type=positive, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)

    from rlhf.data.pieces import read_pieces
    from rlhf.models.vocabulary import grow, plan_growth

    growth, merged = plan_growth(given.model, read_pieces(given.tokens), given.multiple_of)
    if not given.dry_run:
        grow(given.model, given.destination, growth, merged)
    if given.as_json:
        print(json.dumps(asdict(growth), indent=2))
    else:
        print(
            f"vocab  {len(growth.new)} new pieces from id {growth.first_id} on, then {len(growth.steps)} tokens leading to "
            f"them; {growth.known} known already, {len(growth.refused)} cannot be one token here (--json names them), "
            f"{growth.unusable} no text by themselves; embedding rows {growth.rows_before} -> {growth.rows_after}"
        )
    return 0


def _fp8(argv: list[str]) -> int:
    from rlhf.training.fp8 import words

    return words.run(argv)


def _path(argv: list[str]) -> int:
    parser = Parser("rlhf path STAGE")
    parser.add_argument("stage", choices=STAGES)
    print(_recipe(parser.parse_args(argv).stage))
    return 0


def _copy(argv: list[str]) -> int:
    parser = Parser("rlhf copy STAGE [DEST]")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("destination", type=Path, nargs="?")
    arguments = parser.parse_args(argv)
    recipe = _recipe(arguments.stage)
    target = arguments.destination or Path(recipe.name)
    target = target / recipe.name if target.is_dir() else target
    if target.exists():
        raise OutputError(f"{target}: is there already; name another: rlhf copy {arguments.stage} my_{recipe.name}")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: there is no directory {target.parent}")
    shutil.copyfile(recipe, target)
    print(f"{target}\nrun it with: python {target} --config {arguments.stage} ...")
    return 0


def _recipe(stage: str) -> Path:
    recipe = paths.STAGES / f"{stage}.py"
    if not recipe.is_file():
        raise DataError(f"{recipe}: missing; this installation of rlhf is broken, install it again")
    return recipe
