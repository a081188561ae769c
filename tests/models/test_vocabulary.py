"""Growing a vocabulary: rows computed by hand from the old tokenizer's pieces, the result opened by plain transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import BPE
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
    new = ["catamaran", "habitat", *growth["steps"]]

    tokenizer = AutoTokenizer.from_pretrained("new")
    first, second = AutoModelForCausalLM.from_pretrained("old"), AutoModelForCausalLM.from_pretrained("new")
    assert len(tokenizer) == len(old) + len(new)
    assert second.config.vocab_size == second.get_input_embeddings().weight.shape[0] == max(rows, len(old) + len(new))
    assert (second.get_output_embeddings().weight is second.get_input_embeddings().weight) == tied
    assert tokenizer.chat_template == old.chat_template
    tables = [(first.get_input_embeddings().weight, second.get_input_embeddings().weight)]
    if not tied:
        tables.append((first.get_output_embeddings().weight, second.get_output_embeddings().weight))
    for number, piece in enumerate(new):  # these tokens are spelt as their text
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
        assert torch.equal(first.model(ids).last_hidden_state, second.model(ids).last_hidden_state)
        logits = first(ids).logits[..., : len(old)], second(ids).logits[..., : len(old)]
    # the same rows and hidden states; a matrix of another shape may be summed in another order
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


def test_a_word_that_is_one_token_after_a_space_stays_it() -> None:
    old = AutoTokenizer.from_pretrained(model(Path("old")))
    after_a_space = [token[1:] for token in old.get_vocab() if token.startswith("Ġ") and len(token) > 2]
    word = next(word for word in sorted(after_a_space) if len(old(word)["input_ids"]) > 1)
    Path("pieces.txt").write_text(word)
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("new")
    assert tokenizer(word)["input_ids"] == [len(old)]
    assert tokenizer(f" {word}")["input_ids"] == old(f" {word}")["input_ids"] == [old.convert_tokens_to_ids(f"Ġ{word}")]


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
    assert growth["refused"] == {}
    tokenizer = AutoTokenizer.from_pretrained("new")
    assert len(tokenizer("a zebra")["input_ids"]) == 2


def test_a_tokenizer_json_of_another_name_is_the_one_opened(capsys) -> None:
    model(Path("old"))
    other = Tokenizer(BPE({"zebra": 0, " ": 1, "New York": 2, "</s>": 3}, []))
    other.add_special_tokens(["</s>"])
    other.save("old/mine.json")
    assert main(["vocab", "expand", "old", "new", "--tokens", "old/mine.json", "--json"]) == 0
    growth = json.loads(capsys.readouterr().out)
    assert growth["new"] == ["zebra"]
    assert growth["unusable"] == 2  # the space alone, and the special token
    assert growth["refused"] == {"New York": "the pre-tokenizer cuts it: New |  York"}


@pytest.mark.parametrize("content", ["{}", "no json", None])
def test_no_tokenizer(content, capsys) -> None:
    model(Path("old"))
    if content is not None:
        Path("mine.json").write_text(content)
    assert main(["vocab", "expand", "old", "new", "--tokens", "mine.json"]) == 65
    assert "mine.json: no tokenizer could be opened" in capsys.readouterr().err


def test_a_sentencepiece_model(tmp_path: Path, capsys) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    Path("corpus.txt").write_text("\n".join(["中国的猫 zebra zebra", "die Straße zebra"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input="corpus.txt", model_prefix="other", vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    model(Path("old"))
    assert main(["vocab", "expand", "old", "new", "--tokens", "other.model", "--json"]) == 0
    growth = json.loads(capsys.readouterr().out)
    assert {" zebra", "中国", " Straße"} <= set(growth["new"])
    assert growth["unusable"] >= 3 + 256  # <unk>, <s>, </s> and the bytes
    Path("broken.model").write_text("no model")
    assert main(["vocab", "expand", "old", "new2", "--tokens", "broken.model"]) == 65
    assert "broken.model: is no SentencePiece model" in capsys.readouterr().err


def test_without_sentencepiece_its_model_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    model(Path("old"))
    assert main(["vocab", "expand", "old", "new", "--tokens", "other.model"]) == 65
    assert "pip install 'rlhf[sentencepiece]'" in capsys.readouterr().err


def test_letters_outside_ascii() -> None:
    old = AutoTokenizer.from_pretrained(model(Path("old")))
    Path("pieces.txt").write_text("naïveté\n Straße\n中国\n日本語")
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("new")
    text = "die Straße: naïveté 中国日本語"
    ids = tokenizer(text)["input_ids"]
    assert [number - len(old) for number in ids if number in range(len(old), len(old) + 4)] == [1, 0, 2, 3]
    assert tokenizer.decode(ids) == text


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


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_classes_that_build_their_own_from_vocabulary_and_merges(name: str) -> None:
    model(Path("old"))
    config = json.loads(Path("old/tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    Path("old/tokenizer_config.json").write_text(json.dumps(config))
    assert type(AutoTokenizer.from_pretrained("old")).__name__ == name
    Path("pieces.txt").write_text("中国")
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 0
    old, new = AutoTokenizer.from_pretrained("old"), AutoTokenizer.from_pretrained("new")
    assert type(new).__name__ == name
    assert new("中国")["input_ids"] == [len(old)]
    assert new.eos_token_id == old.eos_token_id


def test_lines_that_cannot_be_one_token_are_named(capsys) -> None:
    model(Path("old"))
    Path("pieces.txt").write_text("zebra\nNew York\n" + "\n".join(f"a {number}" for number in range(6)))
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 65
    error = capsys.readouterr().err
    assert "'New York': the pre-tokenizer cuts it: New |  York; 'a 0': " in error
    assert "and 2 more" in error
    assert "zebra" not in error
    assert not Path("new").exists()


def test_a_destination_that_is_there(capsys) -> None:
    model(Path("old"))
    Path("new").mkdir()
    assert main(["vocab", "expand", "old", "new", "--tokens", "pieces.txt"]) == 73
    assert "is there already" in capsys.readouterr().err
