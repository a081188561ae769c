"""`rlhf vocab`: new pieces for a tokenizer and its model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rlhf.config.arguments import Parser, positive

USAGE = """\
rlhf vocab expand MODEL DST --tokens FILE [--multiple-of N] [--dry-run] [--json]

  FILE has one piece a line, or is a tokenizer (its directory, any tokenizer.json, a SentencePiece .model) whose pieces are
  taken. A piece is text as it stands: a word inside a sentence starts with a space. Pieces go into the tokenizer's own model
  (BPE with the merges that lead to them, and the tokens on the way), so every other text is split as before. A line that
  cannot be one token is an error; what another tokenizer has and this one cannot take is left out and named by --json.
  A new row of embedding and head is the mean of the rows of the old pieces of the same text; old rows stay to the bit.
  --multiple-of N rounds the embedding's rows up."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
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
