"""Growing a model's vocabulary: new pieces into the tokenizer's own model, new rows into embedding and head.

A new row is the mean of the rows of the old pieces of the same text: the model starts from what it read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.merging import Merged, merge_pieces
from rlhf.data.pieces import Pieces
from rlhf.errors import DataError, OutputError
from rlhf.models.load import Loading, load_actor, load_generation_config, load_tokenizer, local
from rlhf.models.save import save_model
from rlhf.models.source import resolve

NAMED = 5
"""how many refused pieces an error names"""


@dataclass(frozen=True)
class Growth:
    """What growing a vocabulary comes to."""

    new: list[str]
    steps: list[str]
    """tokens on the way to a piece, as the vocabulary spells them; merges need them"""
    known: int
    """pieces the tokenizer has already as one token"""
    unusable: int
    """tokens of another tokenizer that are no text by themselves"""
    refused: dict[str, str]
    """pieces of another tokenizer that cannot be one token here, each with the reason"""
    first_id: int
    rows_before: int
    rows_after: int


def plan_growth(spec: str, pieces: Pieces, multiple_of: int = 1) -> tuple[Growth, Merged]:
    """What `grow` will do; only the tokenizer and config.json are read.

    Raises:
        DataError: there is nothing to add, a listed piece cannot be one token, or the model is an adapter.
    """
    backend = getattr(load_tokenizer(spec), "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(f"{spec}: its tokenizer is not a fast one; convert it to a tokenizer.json first")
    source = local(resolve(spec))
    if (Path(source.path) / "adapter_config.json").is_file():
        raise DataError(f"{spec}: a LoRA adapter has no vocabulary of its own; merge it first: rlhf convert {spec} DST --to hf")
    rows = (
        AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False).get_text_config().vocab_size
    )
    merged = merge_pieces(backend, pieces.texts)
    if pieces.listed and merged.refused:
        named = [f"{piece!r}: {reason}" for piece, reason in list(merged.refused.items())[:NAMED]]
        more = [f"and {len(merged.refused) - NAMED} more"] if len(merged.refused) > NAMED else []
        raise DataError("; ".join([*named, *more]) + ". Leave out what cannot be one token of this tokenizer")
    known = len(pieces.texts) - len(merged.pieces) - len(merged.refused)
    if not merged.pieces:
        raise DataError(
            f"{spec}: has {known} of the {len(pieces.texts)} pieces already, and {len(merged.refused)} cannot be one token; "
            "there is nothing to add"
        )
    needed = max(rows, merged.first_id + len(merged.splits))
    after = -(-needed // multiple_of) * multiple_of
    growth = Growth(merged.pieces, merged.steps, known, pieces.unusable, merged.refused, merged.first_id, rows, after)
    return growth, merged


def grow(spec: str, directory: Path, growth: Growth, merged: Merged) -> None:
    """Writes the grown model as a Hugging Face directory.

    Raises:
        OutputError: the directory is there already.
        DataError: the model is no language model, or its tokenizer's class does not keep what was merged in.
    """
    if directory.exists():
        raise OutputError(f"{directory}: is there already; name another, or remove it")
    source = local(resolve(spec))
    config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    model = load_actor(spec, Loading(dtype=config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32))
    tokenizer = _reopened(load_tokenizer(spec), merged.tokenizer)
    _add_rows(model, merged.splits, growth)
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, directory, tokenizer, load_generation_config(spec))


def _reopened(tokenizer: PreTrainedTokenizerBase, grown: Tokenizer) -> PreTrainedTokenizerBase:
    # through files, as every reader will: some classes of transformers build their own from the vocabulary and the merges
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        grown.save(f"{directory}/tokenizer.json")
        opened = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if opened.get_vocab() != grown.get_vocab():
        raise DataError(
            f"{type(tokenizer).__name__}: this class of transformers does not open what was merged into its tokenizer.json"
        )
    return opened


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
