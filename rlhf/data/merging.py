"""Merging pieces into a tokenizer's own model, by editing its tokenizer.json.

BPE gets new merges after all old ones, and none of them makes an old token: a text is split as before first, then new tokens
are joined from whole old ones. So a text that holds no new token is read as before, and every text is read back as before. The
tokens on the way to a piece, and characters a SentencePiece model knew as bytes only, are new tokens too: the steps.
Unigram gets a score for each piece, WordPiece and WordLevel the piece alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tokenizers import Tokenizer

from rlhf.errors import DataError

UNREADABLE = "\ufffd"
"""what a decoder makes of half a character"""

GAIN = 1e-4
"""how much better than its best split a Unigram piece scores, for each join of two characters: a piece of pieces wins too"""


@dataclass(frozen=True)
class Merged:
    """A grown tokenizer, and what each new token was to the old one."""

    tokenizer: Tokenizer
    pieces: list[str]
    """texts that are one token now; their ids follow the old ones in this order, then those of the steps"""
    steps: list[str]
    splits: list[list[int]]
    """the old ids of every new token"""
    first_id: int
    refused: dict[str, str]
    """why a text cannot be one token"""


def merge_pieces(old: Tokenizer, texts: Sequence[str]) -> Merged:
    """The tokenizer with each text one token; a text is what stands in running text, so a word usually starts with a space.

    Raises:
        DataError: the BPE marks where words begin or end in a way of its own.
    """
    return _merge(old, texts, {})


def running(layout: Mapping[str, Any]) -> Tokenizer:
    """The same tokenizer as it reads and writes the middle of a text: nothing is put before it, nothing stripped."""
    changed = {name: _running(layout[name]) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return Tokenizer.from_str(json.dumps({**layout, **changed, "truncation": None, "padding": None}))


def _running(node: Any) -> Any:
    if isinstance(node, list):
        return [part for part in map(_running, node) if part is not None]
    if not isinstance(node, dict):
        return node
    if node.get("type") in ("Prepend", "Strip"):
        return None
    never = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {name: never[name] if name in never else _running(value) for name, value in node.items()}


def _merge(old: Tokenizer, texts: Sequence[str], refused: dict[str, str]) -> Merged:
    layout = json.loads(old.to_str())
    reader, known, first_id = running(layout), old.get_vocab(), max(old.get_vocab().values()) + 1
    tokens: dict[str, str] = {}
    for text in texts:
        normal = reader.normalizer.normalize_str(text) if reader.normalizer else text
        whole = [(normal, (0, len(normal)))]
        cuts = reader.pre_tokenizer.pre_tokenize_str(normal) if reader.pre_tokenizer else whole
        token = "".join(part for part, _ in cuts)
        ids = reader.encode(text, add_special_tokens=False).ids
        if len(ids) == 1 and old.id_to_token(ids[0]) in (token, text):
            continue
        if len(cuts) > 1:
            refused[text] = f"the pre-tokenizer cuts it: {' | '.join(normal[start:end] for _, (start, end) in cuts)}"
        elif token in known:
            refused[text] = "is in the vocabulary, but the tokenizer never produces it"
        elif dropped := [character for character in token if not old.model.tokenize(character)]:
            refused[text] = f"the tokenizer drops {''.join(dropped)!r}: there is no row to start from"
        else:
            tokens.setdefault(token, text)

    steps = _extend(old, layout, tokens, reader)
    grown = Tokenizer.from_str(json.dumps(layout))
    entries = [*tokens, *steps]
    splits = [[part.id for part in old.model.tokenize(entry)] for entry in entries]
    failed = _failures(running(layout), reader, list(tokens.values()), splits, first_id)
    if failed:
        return _merge(old, [text for text in texts if text not in failed], refused | failed)
    return Merged(grown, list(tokens.values()), steps, splits, first_id, refused)


def _failures(
    grown: Tokenizer, old: Tokenizer, texts: Sequence[str], splits: Sequence[list[int]], first_id: int
) -> dict[str, str]:
    failed = {}
    for number, text in enumerate(texts):
        ids = grown.encode(text, add_special_tokens=False).ids
        back = grown.decode([first_id + number], skip_special_tokens=False)
        if ids != [first_id + number]:
            failed[text] = f"stays {' | '.join(grown.decode([part], skip_special_tokens=False) for part in ids)}"
        elif back not in (text, old.decode(splits[number], skip_special_tokens=False)):  # the old one may lower-case
            failed[text] = f"is read back as {back!r}"
    return failed


def _extend(old: Tokenizer, layout: dict[str, Any], tokens: Mapping[str, str], reader: Tokenizer) -> list[str]:
    """Puts the tokens into the layout's model; returns the steps, the tokens needed besides."""
    model, known, steps = layout["model"], old.get_vocab(), []
    first_id = max(known.values()) + 1
    # an added token that the model itself does not have would lose its id to the first new piece
    added = {token.content: number for number, token in old.get_added_tokens_decoder().items()}
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        lowest = min(scores.values())  # a lower one would make unknown characters dearer than they were
        model["vocab"] += [[old.id_to_token(number), lowest] for number in range(len(model["vocab"]), first_id)]
        model["vocab"] += [[token, _score(token, old.model.tokenize(token), scores, lowest)] for token in tokens]
        return []
    if model["type"] == "BPE":
        if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
            raise DataError(
                "a BPE with continuing_subword_prefix or end_of_word_suffix cannot be grown: its tokens are not their text"
            )
        decoder = reader.decoder
        chains, steps = _chains(
            tokens,
            known,
            lambda text: [part.value for part in old.model.tokenize(text)],
            lambda token: decoder is None or UNREADABLE not in decoder.decode([token]),
        )
        model["merges"] += [list(pair) for pair in chains]
    model["vocab"] |= added | {token: first_id + number for number, token in enumerate([*tokens, *steps])}
    return steps


def _score(token: str, parts: Iterable[Any], scores: Mapping[str, float], lowest: float) -> float:
    # a part that is not in the token is a byte or unknown
    best = sum(scores.get(part.value, lowest) if part.value in token else lowest for part in parts)
    return max(lowest, best + GAIN * (len(token) - 1))


def _chains(
    tokens: Collection[str], old: Collection[str], split: Callable[[str], list[str]], readable: Callable[[str], bool]
) -> tuple[list[tuple[str, str]], list[str]]:
    """(merges, steps) that join the old tokens of each new one. One that no chain leads to is left for the check after."""
    ranks: dict[tuple[str, str], int] = {}
    made: dict[str, None] = {}

    def cost(pair: tuple[str, str]) -> tuple[int, int]:
        joined = "".join(pair)
        return 0 if joined in made or joined in tokens else 1 if readable(joined) else 2, len(joined)

    for token in sorted(tokens, key=len):
        parts: list[str] = []
        for is_old, run in groupby(token, lambda character: character in old):
            characters = list(run)
            parts += split("".join(characters)) if is_old else characters
            made |= dict.fromkeys([] if is_old else characters)
        parts = _joined(parts, ranks)
        while pairs := [pair for pair in pairwise(parts) if "".join(pair) not in old]:
            pair = min(pairs, key=cost)
            ranks[pair] = len(ranks)
            made["".join(pair)] = None
            parts = _joined(parts, ranks)
    return list(ranks), [token for token in made if token not in tokens]


def _joined(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """What the merges make of the parts: the lowest rank first, the leftmost of equals."""
    while ready := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        place = min(ready)[1]
        parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]
    return parts
