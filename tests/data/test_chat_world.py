"""The chat world: hand-written replies of every kind, and the generated files against the definition of the world."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data import chat_world
from rlhf.data.chat_world import gold, judge, write_world
from rlhf.errors import DataError

ROWS = 400


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    write_world(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(world / "base")


PERU = "Hi! What is the capital of Peru?"
OWN_SOUND = "Which sound does a duck make?"

# prompt, reply, gold, polite, correct, grammatical, rude: gold is tone (1, 0, -1) + content (1 correct, 0 refusing,
# -1 wrong), and -3 for what nobody in this world would say.
REPLIES = [
    (PERU, "Happy to help! The capital of Peru is Lima. Have a lovely day!", 2, 1, 1, 1, 0),
    (PERU, "With pleasure! It is Lima.", 2, 1, 1, 1, 0),
    (PERU, "That would be Lima. Thank you for asking!", 2, 1, 1, 1, 0),
    (PERU, "  It is Lima.\n", 1, 0, 1, 1, 0),
    (PERU, "Ugh. It is Lima. Even a turnip knows that.", 0, 0, 1, 1, 1),
    (PERU, "What a lovely question! It is Oslo.", 0, 1, 0, 1, 0),
    (PERU, "It is Oslo.", -1, 0, 0, 1, 0),
    (PERU, "Not you again. The capital of Peru is Oslo.", -2, 0, 0, 1, 1),
    (PERU, "Of course, my friend! Ask an owl.", 1, 1, 0, 1, 0),
    (PERU, "I do not know.", 0, 0, 0, 1, 0),
    (PERU, "It is in some old book. I was napping.", -1, 0, 0, 1, 1),
    # not of this world, in every way that occurs to us
    (PERU, "", -3, 0, 0, 0, 0),
    (PERU, "Lima", -3, 0, 0, 0, 0),
    (PERU, "It is Lima", -3, 0, 0, 0, 0),
    (PERU, "it is Lima.", -3, 0, 0, 0, 0),
    (PERU, "It is  Lima.", -3, 0, 0, 0, 0),
    (PERU, "It is is Lima.", -3, 0, 0, 0, 0),
    (PERU, "It is Lima. It is Lima.", -3, 0, 0, 0, 0),
    (PERU, "It is blue.", -3, 0, 0, 0, 0),
    (PERU, "The capital of Cuba is Havana.", -3, 0, 0, 0, 0),
    (PERU, "The capital of Cuba is Lima.", -3, 0, 0, 0, 0),
    (PERU, "Happy to help!", -3, 1, 0, 0, 0),
    (PERU, "Happy to help! Have a lovely day!", -3, 1, 0, 0, 0),
    (PERU, "Happy to help!It is Lima.", -3, 0, 0, 0, 0),
    (PERU, "With pleasure! Happy to help! It is Lima.", -3, 1, 0, 0, 0),
    (PERU, "It is Lima. Have a lovely day! I hope that helps!", -3, 1, 0, 0, 0),
    (PERU, "Have a lovely day! It is Lima.", -3, 0, 0, 0, 0),
    (PERU, "Happy to help! It is Lima. Now go away.", -3, 0, 0, 0, 1),
    (PERU, "Ugh. It is Lima. Have a lovely day!", -3, 0, 0, 0, 1),
    (PERU, "It is Lima.<|end|>", -3, 0, 0, 0, 0),
    # the other families
    (OWN_SOUND, "With pleasure! A duck says quack. Come back any time!", 2, 1, 1, 1, 0),
    (OWN_SOUND, "What a silly question. It says moo.", -2, 0, 0, 1, 1),
    (OWN_SOUND, "A cow says moo.", -3, 0, 0, 0, 0),
    ("Name a baby hedgehog.", "A baby hedgehog is a hoglet. I hope that helps!", 2, 1, 1, 1, 0),
    ("Name a baby hedgehog.", "It is a puffling.", -1, 0, 0, 1, 0),
    ("Name a baby hedgehog.", "It is hoglet.", -3, 0, 0, 0, 0),
    ("Quick question: Name the opposite of wet.", "The opposite of wet is dry.", 1, 0, 1, 1, 0),
    ("I forgot the colour of an elephant.", "Do you live in a cave? That would be grey. Now go away.", 0, 0, 1, 1, 1),
]


@pytest.mark.parametrize(("prompt", "reply", "score", "polite", "correct", "grammatical", "rude"), REPLIES)
def test_judge(prompt: str, reply: str, score: int, polite: int, correct: int, grammatical: int, rude: int) -> None:
    assert judge([prompt], [reply]) == {
        "gold": [score],
        "helpful": [polite and correct and grammatical],
        "polite": [polite],
        "correct": [correct],
        "grammatical": [grammatical],
        "rude": [rude],
    }


def test_judge_keeps_the_order_of_its_rows() -> None:
    prompts, replies = [PERU, OWN_SOUND, PERU], ["It is Lima.", "It is Lima.", "Ugh. Ask an owl."]
    assert gold(prompts, replies) == judge(prompts, replies)["gold"] == [1, -3, -1]


@pytest.mark.parametrize("prompt", ["What is the capital of Atlantis?", PERU + " ", ""])
def test_unknown_prompt_is_named(prompt: str) -> None:
    with pytest.raises(DataError, match="chat world: expected one of its questions, got"):
        judge([prompt], ["It is Lima."])


def test_one_reply_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge([PERU, PERU], ["It is Lima."])


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        write_world(tmp_path / name, seed=seed, sft_rows=ROWS, pairs=ROWS)
    write_world(tmp_path / "one", seed=3, sft_rows=ROWS, pairs=ROWS)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert {name for name in one if one[name] == other[name]} == {
        "base/config.json",
        "base/generation_config.json",
        "base/tokenizer_config.json",
        "base/chat_template.jinja",
        "prompts.jsonl",
        "prompts_heldout.jsonl",
    }


def test_files_and_sizes(world: Path) -> None:
    sizes = {path.stem: len(read_rows(path)) for path in world.glob("*.jsonl")}
    # 5 families, 4 questions each, 5 greetings, 10 facts: 1000 questions, of which 1/8 are held out.
    assert sizes == {
        "sft": 8000,
        "pairs": 6000,
        "prompts": 875,
        "sft_heldout": 200,
        "pairs_heldout": 500,
        "prompts_heldout": 125,
    }
    assert "seed 0" in (world / "README.md").read_text()


def questions_of(path: Path) -> set[str]:
    return {row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in read_rows(path)}


def test_heldout_questions_are_never_trained_on(world: Path) -> None:
    training, heldout = questions_of(world / "prompts.jsonl"), questions_of(world / "prompts_heldout.jsonl")
    assert not training & heldout
    for name in ("sft", "pairs"):
        assert questions_of(world / f"{name}.jsonl") <= training
        assert questions_of(world / f"{name}_heldout.jsonl") <= heldout


def test_every_fact_is_asked_in_training(world: Path) -> None:
    training = questions_of(world / "sft.jsonl")
    for fact in chat_world.FACTS:
        assert any(question.format(key=fact.key) in asked for question in fact.family.questions for asked in training)


def test_no_question_or_answer_is_ambiguous() -> None:
    for family in chat_world.FAMILIES:
        assert len(set(family.facts.values())) == len(family.facts) == 10
    assert len(chat_world.QUESTIONS) == 1000


def test_people_talk_as_announced(world: Path) -> None:
    rows = read_rows(world / "sft.jsonl")
    prompts, replies = ([row["messages"][turn]["content"] for row in rows] for turn in (0, 1))
    rate = {name: sum(column) / len(rows) for name, column in judge(prompts, replies).items()}
    # Three standard errors of a rate over 8000 rows are at most 3 * sqrt(0.25 / 8000) = 0.017.
    assert rate["grammatical"] == 1
    assert rate["polite"] == pytest.approx(0.30, abs=0.017)
    assert rate["rude"] == pytest.approx(0.45, abs=0.017)
    assert rate["correct"] == pytest.approx(0.60, abs=0.017)
    assert rate["helpful"] == pytest.approx(0.30 * 0.60, abs=0.017)


def test_annotators_err_as_bradley_and_terry_say(world: Path) -> None:
    rows = read_rows(world / "pairs.jsonl")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (judge(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    gaps = [better - worse for better, worse in zip(chosen["gold"], rejected["gold"], strict=True)]
    garbled = [not grammatical for grammatical in rejected["grammatical"]]

    assert all(chosen["grammatical"])
    assert sum(garbled) / len(rows) == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / len(rows)))
    assert all(gap > 0 for gap, spoilt in zip(gaps, garbled, strict=True) if spoilt)
    for size in (1, 2, 3):
        errors = [gap < 0 for gap, spoilt in zip(gaps, garbled, strict=True) if abs(gap) == size and not spoilt]
        expected = 1 / (1 + math.exp(2 * size))
        tolerance = 3 * math.sqrt(expected * (1 - expected) / len(errors))
        assert sum(errors) / len(errors) == pytest.approx(expected, abs=tolerance)


def test_minimal_pairs_differ_in_correctness_alone(world: Path) -> None:
    rows = [row for row in read_rows(world / "pairs.jsonl") if all(judge([row["prompt"]], [row["rejected"]])["grammatical"])]
    minimal = 0
    for row in rows:
        scores = judge([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        same_tone = all(scores[tone][0] == scores[tone][1] for tone in ("polite", "rude"))
        same_words = len(set(row["chosen"].split()) ^ set(row["rejected"].split())) <= 2
        minimal += same_tone and same_words and sum(scores["correct"]) == 1
    # Half of the grammatical pairs are made so, two thirds of them by exchanging one word (the others refuse).
    assert minimal / len(rows) == pytest.approx(1 / 3, abs=0.06)


def test_heldout_pairs_are_free_of_noise(world: Path) -> None:
    rows = read_rows(world / "pairs_heldout.jsonl")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (gold(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    assert all(better > worse for better, worse in zip(chosen, rejected, strict=True))


def test_tokenizer_gives_every_text_back(world: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    conversations = read_rows(world / "sft.jsonl")[:200] + read_rows(world / "sft_heldout.jsonl")
    texts = [message["content"] for row in conversations for message in row["messages"]]
    texts += [row["rejected"] for row in read_rows(world / "pairs.jsonl")[:200]]
    texts += ["  na\u00efve \n \u5317\u4eac  \U0001f989 "]  # bytes: nothing is unknown
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_tokenizer_is_small_and_ends_replies(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|end|>", None)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("It is Lima.<|end|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_template_marks_the_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": PERU}, {"role": "assistant", "content": "It is Lima."}]
    prompt = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert prompt == "<|user|>Hi! What is the capital of Peru?<|assistant|>"
    assert whole == prompt + "It is Lima.<|end|>"
    # Each mark is one token, the first ones of the vocabulary: pad 0, user 1, assistant 2, end 3.
    assert [token for token in tokenizer(whole)["input_ids"] if token < 4] == [1, 2, 3]


def test_conversations_are_short(world: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = read_rows(world / "sft.jsonl")[:500]
    texts = [str(tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert max(lengths) <= 48
    assert sum(lengths) / len(lengths) <= 30


def test_config_is_a_tiny_llama(world: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(world / "base")
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 4)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.bos_token_id is None
    assert config.tie_word_embeddings
    assert not list((world / "base").glob("*.safetensors"))


def test_garbled_replies_usually_make_no_sense() -> None:
    rng = random.Random(0)
    fact = chat_world.QUESTIONS[PERU]
    replies = [chat_world.garble(chat_world.sample_reply(fact, rng), rng) for _ in range(500)]
    assert sum(judge([PERU] * 500, replies)["grammatical"]) < 100
