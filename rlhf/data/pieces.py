"""Pieces for a larger vocabulary: a list, one a line, or those of another tokenizer or SentencePiece model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rlhf.data.merging import UNREADABLE, running
from rlhf.errors import DataError


@dataclass(frozen=True)
class Pieces:
    texts: list[str]
    """as they stand in running text: a word usually starts with a space"""
    listed: bool
    """a person wrote each of them down, and means each"""
    unusable: int = 0
    """tokens that are no text by themselves: halves of a character, special tokens"""


def read_pieces(source: Path) -> Pieces:
    """The pieces of a text file, a tokenizer's directory, any tokenizer.json, or a SentencePiece .model.

    Raises:
        DataError: there is no such file, it holds none, or a line is empty or there twice.
    """
    if source.suffix == ".model":
        return _sentencepiece(source)
    if source.is_dir() or source.suffix == ".json":
        return _of_tokenizer(source)
    try:
        lines = source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read as UTF-8 text, one piece a line: {error}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{source}:{number}: empty; expected one piece a line")
        if line in seen:
            raise DataError(f"{source}:{number}: {line!r} is in line {seen[line]} already")
        seen[line] = number
    if not seen:
        raise DataError(f"{source}: holds no piece; expected one a line")
    return Pieces(list(seen), listed=True)


def _of_tokenizer(source: Path) -> Pieces:
    try:
        opened = (
            AutoTokenizer.from_pretrained(source, trust_remote_code=False).backend_tokenizer
            if source.is_dir()
            else Tokenizer.from_file(str(source))
        )
    except Exception as error:  # tokenizers raises no narrower one
        raise DataError(f"{source}: no tokenizer could be opened: {str(error).splitlines()[0]}") from error
    reader = running(json.loads(opened.to_str()))
    special = {number for number, token in opened.get_added_tokens_decoder().items() if token.special}
    numbers = sorted(opened.get_vocab().values())
    texts = reader.decode_batch([[number] for number in numbers if number not in special], skip_special_tokens=False)
    return _usable(texts, len(numbers))


def _sentencepiece(source: Path) -> Pieces:
    try:
        processor = import_module("sentencepiece").SentencePieceProcessor(model_file=str(source))
    except ImportError as error:
        raise DataError(
            f"{source}: reading a SentencePiece model needs a package: pip install 'rlhf[sentencepiece]'"
        ) from error
    except (OSError, RuntimeError) as error:
        raise DataError(f"{source}: is no SentencePiece model: {str(error).splitlines()[0]}") from error
    numbers = range(processor.get_piece_size())
    no_text = (processor.is_control, processor.is_unknown, processor.is_unused, processor.is_byte)
    usable = [number for number in numbers if not any(kind(number) for kind in no_text)]
    return _usable([processor.id_to_piece(number).replace("▁", " ") for number in usable], len(numbers))


def _usable(texts: list[str], tokens: int) -> Pieces:
    usable = dict.fromkeys(text for text in texts if text.strip() and UNREADABLE not in text)
    return Pieces(list(usable), listed=False, unusable=tokens - len(usable))
