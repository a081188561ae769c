"""What may change the logits of replies before a token is drawn: a penalty for repetition, a JSON Schema; or refuse them.

All are for the use of a policy. A policy in training is sampled as it is: its log-probabilities are of all tokens, and what is
not finite is for its run to judge (non_finite).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.rollout.decoding import Reply

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written, unless the schema says otherwise (`x-guidance`): as Python's json.dumps does, on one line. Where a model
may choose, a weak one writes blanks without end."""


class RepetitionPenalty:
    """transformers' penalty (Keskar et al. 2019, arXiv:1909.05858), on the tokens of each row's own prompt and reply."""

    def __init__(self, penalty: float) -> None:
        self.processor = RepetitionPenaltyLogitsProcessor(float(penalty))

    def __call__(self, replies: Sequence[Reply], logits: Tensor) -> Tensor:
        rows = [list({*reply.prompt, *reply.tokens}) for reply in replies]
        longest = max(map(len, rows))
        # A token counts once, so a short row is filled up with one of its own.
        ids = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=logits.device)
        return self.processor(ids, logits)  # pyright: ignore[reportArgumentType]


class RequireFinite:
    """Changes nothing. Comes last: of logits that are no numbers something would be drawn all the same."""

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, temperature: float) -> None:
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature

    def __call__(self, replies: Sequence[Reply], logits: Tensor) -> Tensor:
        """Raises CheckFailed where the likeliest token of a row has no finite logit, over the temperature; one of NaN is it."""
        highest = logits.amax(-1).float() / (self.temperature or 1.0)
        wrong = (~highest.isfinite()).nonzero().flatten().tolist()
        if wrong:
            prompt, value = self.tokenizer.decode(replies[wrong[0]].prompt), float(highest[wrong[0]])
            raise CheckFailed(
                f"{self.model}: a logit after the prompt {str(prompt)[:60]!r} is {value}, expected finite numbers: its "
                "weights are broken, or temperature or repetition_penalty is too near to 0"
            )
        return logits


class Schema:
    """A JSON Schema that can steer; it knows no tokenizer yet."""

    def __init__(self, text: str) -> None:
        """`text`: a JSON Schema, or the name of a file of one.

        Raises:
            ConfigError: llguidance is not installed, there is no such file, or it is no schema that llguidance can follow.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError("json_schema: needs the package llguidance: pip install 'rlhf[json-schema]'")
        from llguidance import LLMatcher

        where, content = _read(text)
        try:
            schema = json.loads(content)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise ConfigError(f"{where}: expected a JSON Schema, which is an object; found {content.strip()[:40]}")
        self.grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT)  # pyright: ignore[reportArgumentType]
        wrong, said = LLMatcher.validate_grammar_with_warnings(self.grammar)
        if wrong:
            raise ConfigError(f"{where}: not a JSON Schema that llguidance can follow: {said[0].strip()}")
        self.notes = [f"{where}: {line}" for line in said]

    @staticmethod
    def require_json(texts: Sequence[str]) -> None:
        """Raises DataError where one of the replies is none: what was steered is tokens, what is kept is their text."""
        for text in texts:
            try:
                json.loads(text)
            except json.JSONDecodeError:
                raise DataError(
                    f"json_schema: the tokenizer decodes a reply to {text[:80]!r}, which is not JSON, though its tokens are; "
                    "set clean_up_tokenization_spaces to false in tokenizer_config.json"
                ) from None


class JsonSchema:
    """Leaves of each row the tokens that go on with JSON of a schema, and the end of the reply where that is complete."""

    def __init__(self, schema: Schema, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], vocabulary: int) -> None:
        """`vocabulary`: V of the logits.

        Raises:
            DataError: the bytes of the tokenizer's tokens cannot be told.
        """
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        try:
            ids = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(stop_ids))  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise DataError(
                f"json_schema: llguidance cannot read this tokenizer ({error}); it reads those of bytes (GPT-2's kind, and "
                "SentencePiece's with byte fallback)"
            ) from error
        self.start = LLMatcher(ids, schema.grammar)
        if self.start.is_error():
            raise ConfigError(f"json_schema: {self.start.get_error()}")
        self.matchers: dict[Reply, Any] = {}

    def __call__(self, replies: Sequence[Reply], logits: Tensor) -> Tensor:
        known = self.matchers  # of replies that have ended, nothing is kept
        self.matchers = {reply: known[reply] if reply in known else self.start.deep_copy() for reply in replies}
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        for row, (reply, matcher) in enumerate(self.matchers.items()):
            if reply.tokens:
                matcher.consume_token(reply.tokens[-1])
            bias = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            if matcher.is_error():
                raise DataError(f"json_schema: {matcher.get_error()}")
            allowed[row, : len(bias)] = bias[: logits.shape[1]] != 0
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def _read(text: str) -> tuple[str, str]:
    """(what to call it, the schema's text)."""
    if text.lstrip().startswith("{"):
        return "json_schema", text
    try:
        return f"json_schema {text}", Path(text).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"json_schema {text}: cannot be read: {said}; expected a file, or a schema `{{...}}`") from None
