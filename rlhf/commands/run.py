"""`rlhf run`: several stages, one after the other."""

from __future__ import annotations

from rlhf.commands import STAGES
from rlhf.config.arguments import Parser
from rlhf.errors import UsageError

USAGE = """\
rlhf run PIPELINE [--output DIR] [--seed N] [--launch NAME|FILE] [--nproc N] [--STAGE.FIELD VALUE ...]
                  [--allow-inexact-resume] [--dry-run] [--json]"""


def run(argv: list[str]) -> int:
    from rlhf.runs.pipeline import Request, run_pipeline

    parser = Parser(USAGE)
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
            raise UsageError(f"{word}: unknown here; a stage's field is set as in --ppo.schedule.length 3\n{USAGE}")
        value = text if equals else next(remaining, None)
        if value is None or (not equals and value.startswith("--")):
            raise UsageError(f"{word}: give a value after it")
        flags.setdefault(stage, {})[dotted] = value
    return flags
