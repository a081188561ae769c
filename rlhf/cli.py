"""The command `rlhf`: its words, and how a mistake ends.

Nothing here imports torch: parsing, checking and launching are quick, and the stage itself is a child process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from rlhf import commands
from rlhf.commands import STAGES
from rlhf.errors import OutOfMemory, RlhfError, StorageError, UsageError, disk_failed, without_secrets

HELP = """\
rlhf: SFT, reward model, PPO: from pre-trained weights to a policy tuned on human preferences

  run PIPELINE       several stages, one after the other    rlhf run quickstart
  sft                supervised fine-tuning                 rlhf sft --config sft --model DIR --data chats.jsonl
  rm                 a reward model from preferences        rlhf rm --config rm --model runs/sft --data pairs.jsonl
  dpo, kto           from preferences alone                 rlhf dpo --config dpo --model runs/sft --data pairs.jsonl
  ppo                PPO against a reward                   rlhf ppo --config ppo --actor SFT --reward RM --data FILE
  grpo               the same without a critic              rlhf grpo --config grpo --actor SFT --reward RM --data FILE
  plan STAGE         memory, time and cost of it, before    rlhf plan sft --config sft --model DIR --data FILE --gpus 8
  ppo --unit-test    is PPO itself right? in a minute       doctor   what this machine can run, and why not
  data ACTION FILE   check, clean, split, preview           explain  a metric, check, alarm or exit code, in words
  report RUN         a run as one HTML page                 show     what a run was made from
  runs list|show|rm  the runs there are                     compare  two runs or two models: where they part
  generate MODEL     replies to the prompts of a file       eval     how good a model is on held-out rows
  chat MODEL         talk to a policy                       score    what a reward gives a file of replies
  convert SRC DST    a checkpoint into another format       vocab    new pieces for tokenizer and model
  serve-reward RM    a reward model as a service            fp8      what FP8 does to your model
  path, copy STAGE   where a recipe is; a copy to edit      schema   the JSON Schema of a config, for editors

A model is a Hugging Face id (owner/name@revision), a model directory, a Megatron checkpoint, a .gguf file or a run.
`rlhf sft --help` lists every field of the config; each is a flag: --optimizer.lr 1e-5.
--dry-run shows what a command would do and touches nothing; --json prints what a program can read; --version.
"""

COMMANDS = tuple(sorted(module.name.replace("_", "-") for module in iter_modules(commands.__path__)))
"""Each a module of rlhf/commands/."""


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
        case [name, *rest] if name in COMMANDS:
            return import_module(f"rlhf.commands.{name.replace('-', '_')}").run(rest)
        case [name, *_]:
            raise UsageError(f"no command {name!r}; there are {', '.join((*STAGES, *COMMANDS))} (rlhf --help)")
    raise AssertionError("unreachable: every list of words is matched above")


def _stage(stage: str, argv: list[str]) -> int:
    from rlhf.config.parse import parse
    from rlhf.runs.execute import execute
    from rlhf.runs.inputs import require_inputs
    from rlhf.runs.manifest import MANIFEST, read_json, read_status
    from rlhf.runs.pipeline import print_plan

    invocation = parse(stage, argv)
    if invocation.dry_run:
        require_inputs(invocation)
        print_plan([invocation], invocation.as_json)
        return 0
    code = execute(invocation, quiet=invocation.as_json)
    if invocation.as_json and not invocation.unit_test:
        run = Path(invocation.config.output)
        manifest = read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
        outcome = {"run": str(run), "status": read_status(run), "result": manifest.get("result")}
        print(json.dumps(outcome, indent=2))
    return code
