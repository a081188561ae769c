"""`rlhf schema`: the JSON Schema of a config, by which an editor completes and checks the YAML file."""

from __future__ import annotations

import json
from typing import Any

from rlhf.config.arguments import Parser
from rlhf.config.parse import SCHEMAS

USAGE = """\
rlhf schema STAGE > STAGE.schema.json

  The JSON Schema of a stage's config, for editors. The first line of a YAML file names it to those that understand:
    # yaml-language-server: $schema=ppo.schema.json
  Nothing is required by it: what a file leaves out, flags may give."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("stage", choices=tuple(SCHEMAS))
    print(json.dumps(schema_of(parser.parse_args(argv).stage), indent=2))
    return 0


def schema_of(stage: str) -> dict[str, Any]:
    """Pydantic's schema (draft 2020-12) of the file: without what is required, which a flag may give as well."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_optional(SCHEMAS[stage].model_json_schema())}


def _optional(node: Any) -> Any:
    if isinstance(node, list):
        return [_optional(value) for value in node]
    if isinstance(node, dict):
        return {name: _optional(value) for name, value in node.items() if not (name == "required" and isinstance(value, list))}
    return node
