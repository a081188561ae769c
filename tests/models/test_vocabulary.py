"""Growing a vocabulary: rows computed by hand from the old tokenizer's pieces, the result opened by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.cli import main

TEXT = ["the cat sat on the mat", "a cat and a hat", "the hat sat"] * 20
PIECES = ["catamaran", "habitat", "the"]


def model(directory: Path, tied: bool = False, rows: int | None = None, dtype: torch.dtype = torch.float32) -> Path:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXT, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{{ messages }}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pieces.txt").write_text("\n".join(PIECES))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 64])
def test_rows_tokens_and_logits(tied: bool, padding: int, capsys) -> None:
    old = AutoTokenizer.from_pretrained(model(Path("old"), tied))
    rows = len(old) + padding
    model(Path("old"), tied, rows)
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt", "--json"]) == 0
    growth = json.loads(capsys.readouterr().out)
    assert growth["new"] == ["catamaran", "habitat"]
    assert growth["known"] == 1

    tokenizer = AutoTokenizer.from_pretrained("new")
    first, second = AutoModelForCausalLM.from_pretrained("old"), AutoModelForCausalLM.from_pretrained("new")
    assert len(tokenizer) == len(old) + 2
    assert second.config.vocab_size == second.get_input_embeddings().weight.shape[0] == max(rows, len(old) + 2)
    assert (second.get_output_embeddings().weight is second.get_input_embeddings().weight) == tied
    assert tokenizer.chat_template == old.chat_template
    tables = [(first.get_input_embeddings().weight, second.get_input_embeddings().weight)]
    if not tied:
        tables.append((first.get_output_embeddings().weight, second.get_output_embeddings().weight))
    for number, piece in enumerate(["catamaran", "habitat"]):
        ids = tokenizer(piece)["input_ids"]
        assert ids == [len(old) + number]
        assert tokenizer.decode(ids) == piece
        pieces = old(piece)["input_ids"]
        assert len(pieces) > 1
        for before, after in tables:
            by_hand = sum(before[piece_id] for piece_id in pieces) / len(pieces)
            assert torch.allclose(after[ids[0]], by_hand, atol=1e-7)
    for before, after in tables:
        assert torch.equal(before[: len(old)], after[: len(old)])

    text = "the cat sat on a hat"
    ids = torch.tensor([old(text)["input_ids"]])
    assert ids.tolist() == [tokenizer(text)["input_ids"]]
    with torch.no_grad():
        logits = first(ids).logits[..., : len(old)], second(ids).logits[..., : len(old)]
    assert torch.allclose(*logits, atol=1e-6, rtol=0)


def test_dtype_stays_and_rows_round_up() -> None:
    model(Path("old"), dtype=torch.bfloat16)
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt", "--multiple-of", "64"]) == 0
    grown = AutoModelForCausalLM.from_pretrained("new", dtype="auto")
    assert grown.dtype == torch.bfloat16
    weight = grown.get_input_embeddings().weight
    assert weight.shape[0] % 64 == 0
    mean = AutoModelForCausalLM.from_pretrained("old", dtype="auto").get_input_embeddings().weight.float().mean(0).bfloat16()
    padding = weight[len(AutoTokenizer.from_pretrained("new")) :]
    assert len(padding) > 0
    assert (padding == mean).all()


def test_a_word_that_is_one_token_after_a_space_is_known(capsys) -> None:
    old = AutoTokenizer.from_pretrained(model(Path("old")))
    after_a_space = [token[1:] for token in old.get_vocab() if token.startswith("Ġ") and len(token) > 2]
    word = next(word for word in sorted(after_a_space) if len(old(word)["input_ids"]) > 1)
    assert len(old(f" {word}")["input_ids"]) == 1
    Path("pieces.txt").write_text(word)
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 65
    assert "there is nothing to add" in capsys.readouterr().err


def test_an_adapter_is_merged_first(capsys) -> None:
    model(Path("old"))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    for file in Path("old").glob("tokenizer*"):
        Path("adapter", file.name).write_text(file.read_text())
    assert main(["vocab", "expand", "adapter", "new", "--tokens", "pieces.txt"]) == 65
    assert "merge it first" in capsys.readouterr().err


def test_pieces_of_another_tokenizer(capsys) -> None:
    model(Path("old"))
    other = ByteLevelBPETokenizer()
    other.train_from_iterator(["zebra zebra quagga"] * 50, vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=other._tokenizer, eos_token="<|end|>").save_pretrained("other")
    assert main(["vocab", "expand", "old", "new", "--tokens", "other", "--json"]) == 0
    growth = json.loads(capsys.readouterr().out)
    assert " zebra" in growth["new"]
    assert growth["unusable"] > 100  # single bytes above 127
    tokenizer = AutoTokenizer.from_pretrained("new")
    assert len(tokenizer("a zebra")["input_ids"]) == 2


def test_a_dry_run_touches_nothing(capsys) -> None:
    model(Path("old"))
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt", "--dry-run"]) == 0
    assert "2 new pieces" in capsys.readouterr().out
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 65, "pieces.txt: cannot be read"),
        ("", 65, "holds no piece"),
        ("one\n\ntwo", 65, "pieces.txt:2: empty"),
        ("one\ntwo\none", 65, "pieces.txt:3: 'one' is in line 1 already"),
        ("the", 65, "there is nothing to add"),
    ],
)
def test_bad_pieces(content, code, message, capsys) -> None:
    model(Path("old"))
    Path("pieces.txt").unlink() if content is None else Path("pieces.txt").write_text(content)
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == code
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_piece_the_tokenizer_cannot_spell(capsys) -> None:
    model(Path("old"))
    Path("pieces.txt").write_text("naïveté")
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 65
    assert "reads it back as" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_destination_that_is_there(capsys) -> None:
    model(Path("old"))
    Path("new").mkdir()
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 73
    assert "is there already" in capsys.readouterr().err
