"""Pieces merged into tokenizers trained on the spot: the grown one against the old one, text by text."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rlhf.data.merging import merge_pieces

ENGLISH = ["the cat sat on the mat", "a cat and a hat, the hat sat", "An habitual catch. New hats match"] * 10
MIXED = ["猫坐在垫子上，中国的猫", "die Straße über den Fluß", *ENGLISH]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
SPECIAL = [AddedToken("<unk>", special=True), AddedToken("<s>", special=True)]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|end|>"])  # as Llama 3's: not in the model's own vocabulary
    return tokenizer


def llama_2(whole_text: bool) -> Tokenizer:
    """SentencePiece BPE as transformers convert it: bytes for unknown characters; cut at spaces, or not at all."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", *BYTES, *learnt["vocab"]])}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(undo)
    if whole_text:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(MIXED[1:], trainer)
    tokenizer.add_special_tokens(["<extra>"])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "metaspace": lambda: llama_2(whole_text=False),
    "no pre-tokenizer": lambda: llama_2(whole_text=True),
    "unigram": unigram,
}
PIECES = ["catamaran", " habitat", "中国", "中国人", " Straße", "abab", " ababab", "猫"]


@pytest.fixture(params=KINDS, name="kind")
def _kind(request: pytest.FixtureRequest) -> str:
    return request.param


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_each_piece_is_one_token_in_running_text(kind: str) -> None:
    old = KINDS[kind]()
    merged = merge_pieces(old, PIECES)
    assert merged.refused == {}
    assert merged.pieces == PIECES
    assert merged.first_id == old.get_vocab_size()
    assert merged.tokenizer.get_vocab_size() == old.get_vocab_size() + len(PIECES) + len(merged.steps)
    assert {token: merged.tokenizer.token_to_id(token) for token in old.get_vocab()} == old.get_vocab()
    for number, piece in enumerate(PIECES):
        text = f"x\n{piece}\ny" if kind in ("byte-level", "no pre-tokenizer") else f"- {piece.strip()}"
        if kind in ("metaspace", "unigram") and not piece.startswith(" "):
            continue  # a space always comes before: two tokens
        assert merged.first_id + number in ids(merged.tokenizer, text), piece
        assert merged.first_id + number not in ids(old, text)
        assert merged.tokenizer.decode(ids(merged.tokenizer, text)) == old.decode(ids(old, text))


def test_a_word_without_its_space_is_found_inside_a_word_only() -> None:
    old = KINDS["metaspace"]()
    merged = merge_pieces(old, ["中国"])
    (new,) = range(merged.first_id, merged.first_id + 1)
    assert ids(merged.tokenizer, "中国") == [old.token_to_id("▁"), new]
    assert ids(merged.tokenizer, "我中国")[-1] == new
    assert merged.steps == ["中", "国"]
    assert merged.splits[0] == [old.token_to_id(f"<0x{byte:02X}>") for byte in "中国".encode()]


def mixture(generator: random.Random) -> str:
    parts = ["cat", "hat", "ab", "aba", " ", "the", "国", "中", "人", "habit", "\n", "ß", "x", " Str", "amaran", "猫"]
    parts += ["<s>", "7", "é"]
    return "".join(generator.choices(parts, k=generator.randint(1, 12)))


@cache
def grown(kind: str) -> tuple[Tokenizer, Tokenizer, list[str]]:
    """(the old one, the grown one, its new tokens)"""
    old = KINDS[kind]()
    merged = merge_pieces(old, PIECES)
    return old, merged.tokenizer, [t for t, number in merged.tokenizer.get_vocab().items() if number >= merged.first_id]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.one_of(st.text(max_size=20), st.randoms(use_true_random=False).map(mixture)))
@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_split_as_before_and_all_are_read_back_as_before(kind: str, text: str) -> None:
    old, new, tokens = grown(kind)
    before, after = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (old, new))
    if old.token_to_id("<unk>") not in before.ids:
        assert new.decode(after.ids) == old.decode(before.ids)
    spelt = byte_letters(text) if kind == "byte-level" else "▁" + text.replace(" ", "▁")
    if not any(token in spelt for token in tokens):
        assert after.ids == before.ids


def byte_letters(text: str) -> str:
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_that_test_are_of_both_kinds(kind: str) -> None:
    old, new, _ = grown(kind)
    texts = [mixture(random.Random(seed)) for seed in range(300)]
    assert 30 < sum(ids(old, text) != ids(new, text) for text in texts) < 270


def test_merges_that_would_make_an_old_token_are_not_added() -> None:
    """`abcd`: the old merges give a, bc, d; a + bc would make the old `abc`, so the chain starts with bc + d."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "d", "bc", "ab", "abc", "e"])}
    old = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("ab", "c")]))
    merged = merge_pieces(old, ["abcd"])
    assert merged.steps == ["bcd"]
    assert json.loads(merged.tokenizer.to_str())["model"]["merges"][3:] == [["bc", "d"], ["a", "bcd"]]
    assert ids(merged.tokenizer, "abce") == ids(old, "abce") == [0, 4, 7]
    assert merge_pieces(old, ["abc"]).refused == {"abc": "is in the vocabulary, but the tokenizer never produces it"}


def test_steps_are_few_and_whole_characters_come_first() -> None:
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdef")}, []))
    assert merge_pieces(letters, ["abcdef", "bcde"]).steps == ["bc", "de", "abcde"]  # the short piece first, then around it

    spelt = {character: byte_letters(character) for character in "中国人"}
    steps = [step for letters in spelt.values() for step in (letters[:2], letters)]
    assert merge_pieces(byte_level(), ["中国人", "中国"]).steps == steps


def test_a_unigram_piece_scores_a_little_more_than_its_split() -> None:
    old = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5), ("c", -9.0)], 0, False))
    vocabulary = json.loads(merge_pieces(old, ["aab", "abaab", "cz"]).tokenizer.to_str())["model"]["vocab"]
    assert vocabulary[:5] == json.loads(old.to_str())["model"]["vocab"]
    assert dict(vocabulary[5:]) == pytest.approx({"aab": -3.5 + 2e-4, "abaab": -6.0 + 4e-4, "cz": -9.0})


@pytest.mark.parametrize(
    ("kind", "piece", "reason"),
    [
        ("byte-level", "New York", "the pre-tokenizer cuts it: New |  York"),
        ("metaspace", "New York", "the pre-tokenizer cuts it"),
        ("byte-level", "cat<|end|>", "the pre-tokenizer cuts it"),
        ("no pre-tokenizer", "x<s>", "stays"),
    ],
)
def test_what_cannot_be_one_token_is_named(kind: str, piece: str, reason: str) -> None:
    merged = merge_pieces(KINDS[kind](), [piece, " zebra"])
    assert merged.pieces == [" zebra"]
    assert reason in merged.refused[piece]


def test_without_a_pre_tokenizer_two_words_can_be_one_token() -> None:
    merged = merge_pieces(KINDS["no pre-tokenizer"](), [" New York"])
    assert ids(merged.tokenizer, "New York") == [merged.first_id]


def test_word_level_and_word_piece_take_words_as_they_are() -> None:
    level = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    merged = merge_pieces(level, ["zebra", "cat"])
    assert (merged.pieces, merged.splits) == (["zebra"], [[0]])
    assert ids(merged.tokenizer, "cat zebra emu") == [1, 2, 0]

    piece = Tokenizer(models.WordPiece({"[UNK]": 0, "ze": 1, "##bra": 2, "##s": 3}, unk_token="[UNK]"))
    piece.pre_tokenizer, piece.normalizer = pre_tokenizers.BertPreTokenizer(), normalizers.Lowercase()
    piece.decoder = decoders.WordPiece()
    merged = merge_pieces(piece, ["Zebra"])
    assert (merged.pieces, merged.splits) == (["Zebra"], [[1, 2]])
    assert ids(merged.tokenizer, "zebra zebras zes") == [4, 4, 3, 1, 3]
