"""`rlhf generate`: replies to the prompts of a file; with FP8, without it, or both."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

from rlhf.config.commands import GenerateConfig
from rlhf.config.parse import Invocation
from rlhf.data.examples import prompt_examples
from rlhf.data.rows import Row
from rlhf.models.precision import precisions
from rlhf.report.console import Console
from rlhf.rollout.steps import Schema
from rlhf.training.inference import counting, load_actor
from rlhf.training.output_file import require_free, require_new, write


def generate(invocation: Invocation[GenerateConfig]) -> int:
    config, console, output = invocation.config, Console("generate", speak=True), require_new(invocation.config.output)
    schema = None if config.json_schema is None else Schema(config.json_schema)
    policy = load_actor(config.model, template=config.data.template, trust_remote_code=config.trust_remote_code)
    found = prompt_examples(config.data.file, config.data, policy.template)
    for note in [*found.notes, *(schema.notes if schema else ())]:
        console.note(note)
    prompts, asked = found.items, precisions(config)
    suffixes = {one.name: f"_{one.name}" if len(asked) > 1 else "" for one in reversed(asked)}
    number = ["sample"] if config.samples_per_prompt > 1 else []
    names = [*number, *(f"{name}{suffix}" for suffix in suffixes.values() for name in REPLY)]
    rows = [_beside(prompt.row, names) for prompt in prompts]
    ids, places = [prompt.ids for prompt in prompts], [prompt.index for prompt in prompts]
    each, drawn = config.samples_per_prompt, len(ids) * config.samples_per_prompt
    replies = {}
    with closing(console):
        for precision in asked:
            told = counting(console, drawn, policy.roles, config.max_new_tokens)
            replies[precision.name] = policy.replies(
                ids, places, config, each, config.batch_size, schema, precision, console.note, told
            )
    lines = []
    for of_one in zip(*(replies[name] for name in suffixes), strict=True):
        line = rows[of_one[0].prompt] | dict.fromkeys(number, of_one[0].sample)
        for suffix, reply in zip(suffixes.values(), of_one, strict=True):
            line |= {f"{field}{suffix}": value for field, value in zip(REPLY, (reply.text, reply.finished), strict=True)}
        lines.append(line)
    write(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result: dict[str, Any] = {"output": str(output), "replies": len(lines)}
    result["finished"] = {name: sum(reply.finished for reply in replies[name]) for name in suffixes}
    drawn = len(lines) * len(asked)
    if schema and (cut := drawn - sum(result["finished"].values())):
        console.note(f"{cut} of {drawn} replies were cut before their JSON was complete: raise max_new_tokens")
    if len(asked) > 1:
        result["same"] = sum(len({reply.text for reply in of_one}) == 1 for of_one in zip(*replies.values(), strict=True))
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
    require_free(row, row.others, ("prompt", *names))
    return {"prompt": row.fields["prompt"], **row.others}
