"""`rlhf serve-reward`: a reward model as a service."""

from __future__ import annotations

from rlhf.config.arguments import Parser, positive
from rlhf.errors import UsageError

USAGE = """\
rlhf serve-reward MODEL [--host ADDRESS] [--port N] [--batch-size N] [--template auto|chat|plain] [--trust-remote-code]

  Answers POST {"prompts": [...], "responses": [...]} with {"scores": [...]} (docs/rewards.md). MODEL is any reward model.
  A run on this machine asks it with --reward http://127.0.0.1:8000 --reward.allow_private true. Requests must bear the token
  RLHF_REWARD_TOKEN, where that is set; without one, only this machine can ask. --port 0: any that is free."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
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
