"""Growing a model's vocabulary: new pieces into the tokenizer, new rows into embedding and head.

A new piece becomes an added token, matched in the text before the tokenizer's own model sees it: that holds for BPE, Unigram
and WordPiece alike, while a piece put into a BPE's vocabulary without the merges that lead to it would never be produced. A new
row is the mean of the rows of the pieces the old tokenizer splits the text into: the model starts from what it read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import DataError, OutputError
from rlhf.models.load import Loading, load_actor, load_generation_config, load_tokenizer, local
from rlhf.models.save import save_model
from rlhf.models.source import resolve

UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class Growth:
    """What growing a vocabulary comes to."""

    new: list[str]
    known: int
    """pieces the tokenizer has already as one token"""
    unusable: int
    """pieces of another tokenizer that are no text by themselves: halves of a character, special tokens"""
    first_id: int
    rows_before: int
    rows_after: int


def read_pieces(source: Path) -> tuple[list[str], int]:
    """(pieces, how many were unusable) of a text file with one a line, of a tokenizer's directory or its tokenizer.json.

    Raises:
        DataError: there is no such file, it holds none, or a line is empty or there twice.
    """
    if source.is_dir() or source.suffix == ".json":
        return _pieces_of_tokenizer(source)
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
    return list(seen), 0


def _pieces_of_tokenizer(source: Path) -> tuple[list[str], int]:
    directory = source if source.is_dir() else source.parent
    try:
        other = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: no tokenizer could be opened: {str(error).splitlines()[0]}") from error
    special = set(other.all_special_tokens)
    tokens = [token for token, _ in sorted(other.get_vocab().items(), key=lambda entry: entry[1])]
    texts = [other.convert_tokens_to_string([token]) for token in tokens if token not in special]
    usable = dict.fromkeys(text for text in texts if text.strip() and UNREADABLE not in text)
    return list(usable), len(tokens) - len(usable)


def plan_growth(spec: str, pieces: Sequence[str], unusable: int = 0, multiple_of: int = 1) -> Growth:
    """What `grow` will do; only the tokenizer and config.json are read."""
    tokenizer = load_tokenizer(spec)
    source = local(resolve(spec))
    if (Path(source.path) / "adapter_config.json").is_file():
        raise DataError(f"{spec}: a LoRA adapter has no vocabulary of its own; merge it first: rlhf convert {spec} DST --to hf")
    rows = AutoConfig.from_pretrained(source.path, revision=source.revision).get_text_config().vocab_size
    # one token after a space is known, too: an added token would tear that one apart
    new = [piece for piece in pieces if min(len(_split(tokenizer, text)) for text in (piece, f" {piece}")) > 1]
    needed = max(rows, len(tokenizer) + len(new))
    after = -(-needed // multiple_of) * multiple_of
    return Growth(new, len(pieces) - len(new), unusable, len(tokenizer), rows, after)


def grow(spec: str, directory: Path, growth: Growth) -> None:
    """Writes the grown model as a Hugging Face directory.

    Raises:
        OutputError: the directory is there already.
        DataError: there is nothing to add, or the model is no language model.
    """
    if directory.exists():
        raise OutputError(f"{directory}: is there already; name another, or remove it")
    if not growth.new:
        raise DataError(f"{spec}: its tokenizer has all {growth.known} pieces already; there is nothing to add")
    tokenizer, old = load_tokenizer(spec), load_tokenizer(spec)
    source = local(resolve(spec))
    config = AutoConfig.from_pretrained(source.path, revision=source.revision)
    model = load_actor(spec, Loading(dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32))
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in growth.new])  # pyright: ignore[reportArgumentType]
    _check_spelling(tokenizer, growth.new)
    _add_rows(model, [_split(old, piece) for piece in growth.new], growth)
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, directory, tokenizer, load_generation_config(spec))


def _check_spelling(tokenizer: PreTrainedTokenizerBase, new: Sequence[str]) -> None:
    for piece in new:
        back = tokenizer.decode(_split(tokenizer, piece))
        if back != piece:
            raise DataError(
                f"{piece!r}: as an added token this tokenizer reads it back as {back!r} (byte-level decoders do that to "
                "letters outside ASCII, tokenizers 0.23); leave it out"
            )


def _split(tokenizer: PreTrainedTokenizerBase, piece: str) -> list[int]:
    return list(tokenizer(piece, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _add_rows(model: PreTrainedModel, splits: Sequence[Sequence[int]], growth: Growth) -> None:
    if growth.rows_after > growth.rows_before:
        model.resize_token_embeddings(growth.rows_after, mean_resizing=False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    parameters = [parameter for module in modules if isinstance(module, nn.Module) for parameter in module.parameters()]
    tables: list[Tensor] = list(dict.fromkeys(parameters))  # a tied head is the embedding
    for table in tables:
        for number, split in enumerate(splits):
            table[growth.first_id + number] = table[list(split)].float().mean(0).to(table.dtype)
        # rows of padding are no likelier than the mean of all: zeros would stand out where logits are low
        padding = max(growth.rows_before, growth.first_id + len(splits))
        table[padding:] = table[: growth.first_id].float().mean(0).to(table.dtype)
