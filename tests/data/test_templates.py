"""From rows to tokens: prompts masked, EOS trained, one BOS, nothing lost between chat template and tokens."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlhf.config.policies import PromptData
from rlhf.config.schema import SftData
from rlhf.config.sections import Data
from rlhf.data.collate import ranking_batch, sft_batch
from rlhf.data.examples import SftExample, pair_examples, prompt_examples, rated_examples, sft_examples
from rlhf.data.templates import Template, tokenizer_digests
from rlhf.errors import DataError

WORDS = ["<s>", "</s>", "<pad>", "user", "assistant", "system", "hi", "yes", "no", "why", "so", "end"]
# Like SmolLM2's, it writes something after the EOS of a turn.
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> end ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """It adds <s> by itself, and so does the template: a careless join has two."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def template(tokenizer, mode: str = "auto") -> Template:
    return Template(tokenizer, mode, stop_ids=[1])


def test_f6_one_bos(tokenizer):
    chat = template(tokenizer)
    assert chat.prompt("hi", "here") == ids("<s> user hi </s> end assistant")
    assert template(tokenizer, "plain").prompt("hi", "here") == ids("<s> hi")
    prompt, response = template(tokenizer, "plain").response("hi", "yes no", "here")
    assert (prompt, response) == (ids("<s> hi"), ids("yes no </s>"))


def test_a_response_ends_at_its_eos(tokenizer):
    prompt, response = template(tokenizer).response("hi", "yes", "here")
    assert prompt == ids("<s> user hi </s> end assistant")
    assert response == ids("yes </s>")  # without the `end` that the template writes after it


def test_f5_only_replies_and_their_eos_are_trained(tokenizer):
    messages = [
        {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("user", "why"), ("assistant", "so"))
    ]
    segments = template(tokenizer).conversation(messages, "here")
    tokens = [i for s in segments for i in s.ids]
    trained = [s.trained for s in segments for _ in s.ids]
    assert tokens == ids("<s> user hi </s> end assistant yes </s> end user why </s> end assistant so </s>")
    assert [WORDS[t] for t, on in zip(tokens, trained, strict=True) if on] == ["yes", "</s>", "so", "</s>"]
    batch = sft_batch([SftExample(tokens, trained), SftExample(tokens[:8], trained[:8])])
    assert [WORDS[t] for t in batch.targets] == ["yes", "</s>", "so", "</s>", "yes", "</s>"]
    assert [WORDS[t] for t in batch.ids[batch.read]] == ["assistant", "yes", "assistant", "so", "assistant", "yes"]


def test_a_template_that_rewrites_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    with pytest.raises(DataError, match="file:3: the chat template rewrites"):
        template(tokenizer).response("hi", "yes", "file:3")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"file:4: .*roles must alternate"):
        template(tokenizer).prompt("hi", "file:4")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        template(tokenizer, "chat")
    with pytest.raises(DataError, match="needs a chat template"):
        template(tokenizer).conversation([], "file:5")


def test_digests_tell_tokenizers_apart(tokenizer):
    before = tokenizer_digests(tokenizer)
    tokenizer.chat_template = TEMPLATE + " "
    after = tokenizer_digests(tokenizer)
    assert before["tokenizer"] == after["tokenizer"]
    assert before["template"] != after["template"]
    tokenizer.pad_token = "</s>"
    assert tokenizer_digests(tokenizer)["tokenizer"] != before["tokenizer"]


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_too_long(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "hi", "completion": "yes"}, {"prompt": "hi", "completion": "yes no why so"})
    plain = template(tokenizer, "plain")
    with pytest.raises(DataError, match=r"d\.jsonl:2: 7 tokens, more than data\.max_length 5"):
        sft_examples(path, SftData(train=path, max_length=5), plain)
    skipped = sft_examples(path, SftData(train=path, max_length=5, too_long="skip"), plain)
    assert len(skipped.items) == 1
    assert any(note.startswith("warning: 1 of 2 rows longer than 5 tokens skipped") for note in skipped.notes)
    cut = sft_examples(path, SftData(train=path, max_length=5, too_long="truncate"), plain)
    assert [len(example) for example in cut.items] == [4, 5]
    everything = sft_examples(path, SftData(train=path, loss_on="all"), plain)
    assert all(all(example.trained) for example in everything.items)
    prompts = prompt_examples(path, PromptData(train=path, max_length=1, too_long="truncate"), plain)
    assert [example.ids for example in prompts.items] == [ids("hi")] * 2
    assert [example.index for example in prompts.items] == [0, 1]


def test_f4_pairs_equal_after_truncation_are_dropped(tokenizer, tmp_path):
    rows = [
        {"prompt": "hi", "chosen": "yes no so", "rejected": "yes no why"},
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    found = pair_examples(path, Data(train=path, max_length=4, too_long="truncate"), template(tokenizer, "plain"))
    assert len(found.items) == 1
    assert any("1 pairs dropped" in note for note in found.notes)
    batch = ranking_batch(found.items)
    assert batch.ids.tolist() == ids("<s> hi yes </s> no </s>")  # the prompt once
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3]
    assert batch.read.tolist() == [3, 5]


def test_a_pair_is_two_rated_rows(tokenizer, tmp_path):
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "no no"}, {"prompt": "so", "completion": "why", "label": False}]
    path = write(tmp_path / "r.jsonl", *rows)
    found = rated_examples(path, Data(train=path, max_length=4, too_long="truncate"), template(tokenizer, "plain"))
    assert [(e.prompt, e.reply, e.desirable) for e in found.items] == [
        (ids("<s> hi"), ids("yes </s>"), True),
        (ids("<s> hi"), ids("no no"), False),
        (ids("<s> so"), ids("why </s>"), False),
    ]
    assert [example.where for example in found.items] == [f"{path}:1", f"{path}:1", f"{path}:2"]
    assert any("1 pairs became two rows each" in note for note in found.notes)


def test_plain_text(tokenizer, tmp_path):
    path = write(tmp_path / "t.jsonl", {"body": "hi yes no"})
    found = sft_examples(path, SftData(train=path, json_key="body"), template(tokenizer, "plain"))
    assert found.items == [SftExample(ids("<s> hi yes no </s>"), [True] * 5)]
