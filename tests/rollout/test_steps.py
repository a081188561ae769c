"""Steps between logits and draw: the penalty by hand and by transformers; JSON by a schema, whatever the weights say."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from jsonschema import ValidationError, validate
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor, load_tokenizer
from rlhf.rollout.decoding import Reply
from rlhf.rollout.engines import NativeEngine, Samples
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.steps import JsonSchema, RepetitionPenalty, RequireFinite, Schema
from rlhf.training.tiny import write_tiny_model

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 2, 3], [4], [2, 3, 4], [9, 9]]


def test_the_penalty_by_hand():
    """Positive logits of tokens seen are divided, negative multiplied, once however often seen; a short row counts its own."""
    replies = [Reply([0], 0, [1, 1, 0]), Reply([2], 0)]
    logits = torch.tensor([[3.0, -1.0, 0.5, -4.0], [3.0, -1.0, 0.5, -4.0]])
    changed = RepetitionPenalty(2.0)(replies, logits.clone())
    assert changed.tolist() == [[1.5, -2.0, 0.5, -4.0], [3.0, -1.0, 0.25, -4.0]]


def test_the_penalty_is_of_the_whole_prompt():
    changed = RepetitionPenalty(2.0)([Reply([0, 1, 2], 0, [3])], torch.tensor([[2.0, 4.0, -6.0, 8.0, 10.0]]))
    assert changed.tolist() == [[1.0, 2.0, -12.0, 4.0, 10.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_what_is_no_number_is_refused(tmp_path, temperature):
    """A row of which some tokens are forbidden is none of these; the message has its prompt."""
    write_tiny_model(tmp_path, seed=0)
    step = RequireFinite("mine", load_tokenizer(str(tmp_path / "model")), temperature)
    replies, fine = [Reply([2], 0), Reply([3, 4], 0)], torch.tensor([[0.0, 1.0], [-torch.inf, 2.0]])
    assert step(replies, fine) is fine
    for wrong in ([torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]):
        with pytest.raises(CheckFailed, match=r"mine: a logit after the prompt 'b c' is (nan|inf|-inf)"):
            step(replies, torch.tensor([[0.0, 1.0], wrong]))
    with pytest.raises(CheckFailed, match="temperature or repetition_penalty is too near to 0"):
        RequireFinite("mine", step.tokenizer, 1e-40)(replies, fine)


def test_a_policy_in_training_is_sampled_all_the_same(tmp_path):
    """Its KL is then NaN, too, and what becomes of that its run decides (tests/faults/test_non_finite.py)."""
    write_tiny_model(tmp_path, seed=0)
    model = load_actor(str(tmp_path / "model"), Loading())
    next(model.parameters()).data.fill_(torch.nan)
    found = greedy(model, 6)
    assert all(math.isnan(logprob) for reply in found.logprobs for logprob in reply)
    with pytest.raises(CheckFailed):
        greedy(model, 6, RequireFinite("mine", load_tokenizer(str(tmp_path / "model")), 0))


@pytest.mark.parametrize("slots", [2, 6])
def test_greedy_with_a_penalty_is_generate_with_it(tmp_path, slots):
    write_tiny_model(tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    found, plain = (
        greedy(load_actor(str(tmp_path / "model"), Loading()), slots, *steps).responses
        for steps in ([RepetitionPenalty(1.5)], [])
    )
    for prompt, response in zip(PROMPTS, found, strict=True):
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 1, "pad_token_id": 0}
        expected = model.generate(torch.tensor([prompt]), repetition_penalty=1.5, **settings)
        assert response == expected[0, len(prompt) :].tolist()
    assert found != plain


def greedy(model, slots: int, *steps) -> Samples:
    engine = NativeEngine(nullcontext, [1], 0, slots, steps=steps)
    engine.sync(ActorCritic(actor=model), version=0)
    return engine.generate(PROMPTS, Sampling(12, temperature=0), range(6))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 1, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["kind", "naïve", "quick"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|pad|>": 0, "<|end|>": 1, "<|stop|>": 2, **{letter: place + 3 for place, letter in enumerate(letters)}}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "extra_special_tokens": ["<|stop|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def random_model() -> LlamaForCausalLM:
    """Over more ids than the tokenizer has."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=264, max_position_embeddings=512, **size)).eval()


def drawn(model, tokenizer, schema: dict | None, slots: int = 64, longest: int = 400, count: int = 16) -> Samples:
    steps = [] if schema is None else [JsonSchema(Schema(json.dumps(schema)), tokenizer, [1, 2], 264)]
    engine = NativeEngine(nullcontext, [1, 2], 0, slots, steps=steps)
    engine.sync(ActorCritic(actor=model), version=0)
    prompts = [tokenizer("a" * (1 + number % 5))["input_ids"] for number in range(count)]
    return engine.generate(prompts, Sampling(longest), range(count))


def texts(samples: Samples, tokenizer) -> list[str]:
    return [tokenizer.decode(response, skip_special_tokens=True) for response in samples.responses]


def test_every_reply_that_ends_is_of_the_schema(random_model, bytes_tokenizer):
    pytest.importorskip("llguidance")
    samples = drawn(random_model, bytes_tokenizer, SCHEMA, slots=7)
    assert all(samples.finished)
    for text in texts(samples, bytes_tokenizer):
        validate(json.loads(text), SCHEMA)
    assert len(set(texts(samples, bytes_tokenizer))) > 12
    assert drawn(random_model, bytes_tokenizer, SCHEMA, slots=16).responses == samples.responses
    free = texts(drawn(random_model, bytes_tokenizer, None, longest=40), bytes_tokenizer)
    with pytest.raises((json.JSONDecodeError, ValidationError)):
        validate(json.loads(free[0]), SCHEMA)


def test_a_reply_that_is_cut_is_told(random_model, bytes_tokenizer):
    pytest.importorskip("llguidance")
    samples = drawn(random_model, bytes_tokenizer, SCHEMA, longest=55)
    assert 0 < sum(samples.finished) < 16
    for text, finished in zip(texts(samples, bytes_tokenizer), samples.finished, strict=True):
        if finished:
            validate(json.loads(text), SCHEMA)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "json_schema: not JSON"),
        ("no/such.json", r"json_schema no/such\.json: cannot be read: No such file"),
        ('{"type": "nope"}', "not a JSON Schema that llguidance can follow: Invalid type: nope"),
        ('{"$ref": "http://example.com/schema"}', "not a JSON Schema that llguidance can follow"),
    ],
)
def test_a_bad_schema_is_one_message(text, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match=message):
        Schema(text)


def test_a_schema_in_a_file(tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    assert Schema(str(tmp_path / "schema.json")).grammar == Schema(json.dumps(SCHEMA)).grammar
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.json: expected a JSON Schema, which is an object; found \[1\]"):
        Schema(str(tmp_path / "list.json"))


def test_a_tokenizer_of_words_cannot_be_steered(tmp_path):
    pytest.importorskip("llguidance")
    write_tiny_model(tmp_path, seed=0)
    with pytest.raises(DataError, match="json_schema: llguidance cannot read this tokenizer"):
        JsonSchema(Schema("{}"), load_tokenizer(str(tmp_path / "model")), [1], 10)


def test_text_that_is_no_json_is_refused():
    Schema.require_json(['{"a": 1}', "3"])
    with pytest.raises(DataError, match="clean_up_tokenization_spaces"):
        Schema.require_json(['{"a": 1'])


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf\[json-schema\]'"):
        Schema("{}")
