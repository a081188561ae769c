"""What is said of a file that was read: too few rows to hold out, and rows that are in another file, too."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rlhf.config.policies import PromptData
from rlhf.config.reward_models import RmData
from rlhf.config.schema import SftData
from rlhf.data.examples import Examples, prompt_examples, ranked_examples, sft_examples
from rlhf.data.templates import Template
from rlhf.training.reading import remarks


def examples(count: int) -> Examples[int]:
    return Examples(list(range(count)), [], [bytes([row]) for row in range(count)])


@pytest.mark.parametrize(("count", "held_out", "warned"), [(29, True, True), (30, True, False), (29, False, False)])
def test_few_held_out_rows_are_warned_of(count, held_out, warned):
    said = remarks("eval.jsonl", examples(count), "pairs", {}, held_out)
    few = [f"warning: figures on {count} held-out rows say little; hold out 30 or more"]
    assert said == [f"eval.jsonl: {count} pairs", *(few if warned else [])]


def test_rows_of_an_earlier_file_are_warned_of():
    said = remarks("eval.jsonl", examples(40), "pairs", {"train.jsonl": {bytes([3]), bytes([99])}, "none.jsonl": set()}, True)
    assert len(said) == 2
    assert said[1].startswith("warning: 1 of the 40 rows of eval.jsonl ask what rows of train.jsonl ask")


# ---- rows too long: one word is one token, and a reply's end one more --------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> Template:
    words = {word: index for index, word in enumerate(["</s>", "a"])}
    split = Tokenizer(WordLevel(words, unk_token="a"))
    split.pre_tokenizer = WhitespaceSplit()
    return Template(PreTrainedTokenizerFast(tokenizer_object=split, eos_token="</s>", pad_token="</s>"), "plain", [0])


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("long", "warned"), [(2, True), (1, False)])
@pytest.mark.parametrize(("rule", "done", "flag"), [
    ("skip", "skipped", "; --data.max_length N keeps more, --data.too_long truncate cuts them"),
    ("truncate", "truncated", "; --data.max_length N cuts less, --data.too_long skip leaves them out"),
])  # fmt: skip
def test_more_than_a_fifth_too_long_is_warned_of(rule, done, flag, long, warned, template, tmp_path):
    rows = [{"prompt": f"a{row}", "completion": " a a a" if row < long else " a"} for row in range(9)]
    path = write(tmp_path / "rows.jsonl", *rows)
    notes = sft_examples(path, SftData(train=path, max_length=4, too_long=rule), template).notes
    told = f"{long} of 9 rows longer than 4 tokens {done}"
    assert notes == [f"warning: {told}{flag}" if warned else told]


def test_replies_that_fall_off_are_warned_of(template, tmp_path):
    rows = [{"prompt": "a a a a" if row < 2 else f"a{row}", "completion": " a"} for row in range(20)]
    path = write(tmp_path / "rows.jsonl", *rows)
    notes = sft_examples(path, SftData(train=path, max_length=4, too_long="truncate"), template).notes
    assert notes[-2:] == ["2 of 20 rows longer than 4 tokens truncated", "2 rows dropped: no token is left to train on"]
    path = write(tmp_path / "fewer.jsonl", *rows[:9])
    notes = sft_examples(path, SftData(train=path, max_length=4, too_long="truncate"), template).notes
    assert notes[-1] == "warning: 2 rows dropped: no token is left to train on"


def test_prompts_cut_at_their_start_are_warned_of_though_they_are_few(template, tmp_path):
    path = write(tmp_path / "prompts.jsonl", *({"prompt": "a a a" if row == 3 else f"a{row}"} for row in range(20)))
    notes = prompt_examples(path, PromptData(train=path, max_length=2, too_long="truncate"), template).notes
    assert notes[0].startswith("warning: 1 of 20 rows longer than 2 tokens truncated at the start: ")
    assert prompt_examples(path, PromptData(train=path, max_length=3, too_long="truncate"), template).notes == []
    pairs = [{"prompt": "a a a a" if row == 3 else f"a{row}", "chosen": " a a", "rejected": " a"} for row in range(20)]
    path = write(tmp_path / "pairs.jsonl", *pairs)
    notes = ranked_examples(path, RmData(train=path, max_length=4, too_long="truncate"), template).notes
    assert notes[0].startswith("warning: 1 of 20 rows longer than 4 tokens truncated; of 1 of them the prompt leaves no room")
    notes = ranked_examples(path, RmData(train=path, max_length=6, too_long="truncate"), template).notes
    assert notes == ["1 of 20 rows longer than 6 tokens truncated"]
