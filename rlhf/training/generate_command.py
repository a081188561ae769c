"""`rlhf generate`: replies to the prompts of a file; with FP8, without it, or both."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

from rlhf.config.commands import GenerateConfig
from rlhf.config.parse import Invocation
from rlhf.data.examples import prompt_examples
from rlhf.data.order import row_seeds
from rlhf.data.rows import Row
from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.models.precision import computing_in, precisions
from rlhf.models.roles import open_policy
from rlhf.report.console import Console
from rlhf.rollout.engines import NativeEngine
from rlhf.rollout.rewards import decode
from rlhf.rollout.sampling import Sampling
from rlhf.training.output_file import require_new, write


def generate(invocation: Invocation[GenerateConfig]) -> int:
    config, console, output = invocation.config, Console("generate", speak=True), require_new(invocation.config.output)
    roles = open_policy(config.model, config.trust_remote_code)
    template = Template(roles.tokenizer, config.data.template, roles.stop_ids)
    found = prompt_examples(config.data.file, config.data, template)
    for note in found.notes:
        console.note(note)
    prompts = found.items
    asked = precisions(config)
    suffixes = {one.name: f"_{one.name}" if len(asked) > 1 else "" for one in reversed(asked)}
    lines = [_beside(prompt.row, [f"{name}{suffix}" for suffix in suffixes.values() for name in REPLY]) for prompt in prompts]
    roles.check_context(max(map(len, prompts)) + config.max_new_tokens, "data.max_length or max_new_tokens")

    ids, seeds = [prompt.ids for prompt in prompts], row_seeds(config.seed, [prompt.index for prompt in prompts])
    engine = NativeEngine(nullcontext, roles.stop_ids, roles.pad_id, config.batch_size, console.note)
    engine.sync(roles.policy, version=0)
    sampling = Sampling(config.max_new_tokens, config.temperature)
    replies: dict[str, list[tuple[str, bool]]] = {}
    for precision in asked:
        with computing_in(precision, roles, ids, config.batch_size) as in_fp8:
            if in_fp8:
                console.note(in_fp8)
            samples = engine.generate(ids, sampling, seeds)
        replies[precision.name] = list(zip(decode(samples.responses, roles.tokenizer), samples.finished, strict=True))
    for name, suffix in suffixes.items():
        for line, reply in zip(lines, replies[name], strict=True):
            line.update({f"{field}{suffix}": value for field, value in zip(REPLY, reply, strict=True)})
    write(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result: dict[str, Any] = {"output": str(output), "replies": len(lines)}
    result["finished"] = {name: sum(finished for _, finished in replies[name]) for name in suffixes}
    if len(asked) > 1:
        result["same"] = sum(len(set(texts)) == 1 for texts in zip(*replies.values(), strict=True))
    print(json.dumps(result, indent=2) if invocation.as_json else described(result))
    return 0


REPLY = ("response", "finished")
"""What is written of a reply; `finished`: it ended by itself, and not at max_new_tokens."""


def described(result: dict[str, Any]) -> str:
    ended = ", ".join(f"{count} ended by themselves in {name}" for name, count in result["finished"].items())
    same = f"; {result['same']} are the same in both" if "same" in result else ""
    return f"generate  {result['replies']} replies: {result['output']} ({ended}{same})"


def _beside(row: Row, names: list[str]) -> dict[str, Any]:
    """The row as it goes into the file, before the replies."""
    for name in ("prompt", *names):
        if name in row.others:
            raise DataError(f"{row.where}: has a column {name!r}, which is the name of one that is written; rename it")
    return {"prompt": row.fields["prompt"], **row.others}
