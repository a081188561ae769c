"""`rlhf.load_actor` and `rlhf.load_reward`: what transformers says, by definition; what the commands write."""

from __future__ import annotations

import inspect
import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import rlhf
from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write
from rlhf.cli import main
from rlhf.config.decoding import BatchDecoding
from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.models.load import Loading, load_actor
from rlhf.rollout.steps import Schema

END = 1
PROMPTS = ["a b c", "d", "h g f e d", "a b c"]


@pytest.fixture(scope="module")
def policy(llamas):
    return rlhf.load_actor(llamas / "model")


@lru_cache
def opened(directory: Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)


def greedy(directory: Path, prompt: str, **more) -> list[int]:
    model, tokenizer = opened(directory)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, **more)[
        0, ids.shape[1] :
    ].tolist()


def test_greedy_replies_are_transformers_own(policy, llamas):
    plain = policy.generate(PROMPTS, temperature=0, max_new_tokens=9)
    penalised = policy.generate(PROMPTS, temperature=0, max_new_tokens=9, repetition_penalty=1.4, batch_size=2)
    assert [reply.tokens for reply in plain] == [greedy(llamas / "model", prompt) for prompt in PROMPTS]
    assert [reply.tokens for reply in penalised] == [
        greedy(llamas / "model", prompt, repetition_penalty=1.4) for prompt in PROMPTS
    ]
    assert [reply.tokens for reply in penalised] != [reply.tokens for reply in plain]
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    for reply in plain:
        assert reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
        assert reply.finished == (reply.tokens[-1] == END)


def likelier(directory: Path, prompt: str, tokens: list[int], temperature: float) -> list[tuple[int, float]]:
    """For each token of a reply, how many are likelier, and how likely these are together."""
    model, tokenizer = opened(directory)
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    probabilities = (logits / temperature).softmax(-1)
    above = probabilities > probabilities.gather(1, torch.tensor(tokens)[:, None])
    return list(zip(above.sum(1).tolist(), (probabilities * above).sum(1).tolist(), strict=True))


def test_filters_leave_out_what_they_should(policy, llamas):
    common = {"max_new_tokens": 12, "samples_per_prompt": 8, "temperature": 1.5}
    places = {
        name: [
            place
            for reply in policy.generate(PROMPTS, **common, **options)
            for place in likelier(llamas / "model", PROMPTS[reply.prompt], reply.tokens, 1.5)
        ]
        for name, options in {"none": {}, "k": {"top_k": 3}, "p": {"top_p": 0.4}}.items()
    }
    assert max(rank for rank, _ in places["k"]) == 2
    assert 0 < max(mass for _, mass in places["p"]) < 0.4
    assert max(rank for rank, _ in places["none"]) > 2
    assert max(mass for _, mass in places["none"]) > 0.4
    zero = policy.generate(PROMPTS, top_k=0, max_new_tokens=12)
    assert zero == policy.generate(PROMPTS, max_new_tokens=12) == policy.generate(PROMPTS, top_p=0.0, max_new_tokens=12)


def test_samples_follow_from_seed_and_place_alone(policy):
    three = policy.generate(PROMPTS, samples_per_prompt=3, max_new_tokens=9, seed=5)
    assert [(reply.prompt, reply.sample) for reply in three] == [(prompt, sample) for prompt in range(4) for sample in range(3)]
    assert policy.generate(PROMPTS, samples_per_prompt=3, max_new_tokens=9, seed=5, batch_size=2) == three
    assert policy.generate(PROMPTS, max_new_tokens=9, seed=5) == three[::3]
    assert policy.generate(PROMPTS, samples_per_prompt=3, max_new_tokens=9, seed=6) != three
    assert len({tuple(reply.tokens) for reply in three if reply.prompt in (0, 3)}) > 3  # one prompt, twice


def test_the_command_writes_the_same(policy, llamas, tmp_path):
    rows = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    options = {"max_new_tokens": 9, "samples_per_prompt": 2, "top_k": 4, "repetition_penalty": 1.2, "seed": 3}
    expected = policy.generate(PROMPTS, **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for kind in ("jsonl", "txt"):
        output = tmp_path / f"replies-{kind}.jsonl"
        data = ["--data", str(tmp_path / f"prompts.{kind}"), "--output", str(output), "--batch-size", "3"]
        assert main(["generate", str(llamas / "model"), *data, *words]) == 0
        written = [json.loads(line) for line in output.read_text().splitlines()]
        asked = rows if kind == "jsonl" else [{"prompt": prompt} for prompt in PROMPTS]
        assert written == [
            asked[reply.prompt] | {"sample": reply.sample, "response": reply.text, "finished": reply.finished}
            for reply in expected
        ]


def test_a_chat_template_is_used(chatty, llamas):
    """A text is what a user says, messages are all that was said."""
    policy = rlhf.load_actor(chatty)
    messages = [{"role": "system", "content": "e"}, {"role": "user", "content": "a b"}]
    found = policy.generate(["a b", messages], temperature=0, max_new_tokens=9)
    assert [reply.tokens for reply in found] == [greedy(llamas / "model", "a b h"), greedy(llamas / "model", "e a b h")]
    plain = rlhf.load_actor(chatty, template="plain").generate(["a b"], temperature=0, max_new_tokens=9)
    assert plain[0].tokens == greedy(llamas / "model", "a b")


def test_a_stop_token_that_is_a_word_is_no_part_of_the_text(llamas, tmp_path):
    """The reply ends where `generate` ends it; without the stop token the text is that of the tokens before."""
    shutil.copytree(llamas / "model", tmp_path / "model")
    penalty = {"repetition_penalty": 3.0}  # without it a random model repeats itself
    firsts = {prompt: greedy(llamas / "model", prompt, **penalty)[:2] for prompt in PROMPTS}
    prompt, stop = next((prompt, second) for prompt, (first, second) in firsts.items() if END < second != first)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, stop], "pad_token_id": 0}))
    [reply] = rlhf.load_actor(tmp_path / "model").generate([prompt], temperature=0, max_new_tokens=9, **penalty)
    assert reply.tokens == greedy(tmp_path / "model", prompt, **penalty)
    assert (reply.finished, reply.tokens[-1]) == (True, stop)
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    assert reply.text == tokenizer.decode(reply.tokens[:-1], skip_special_tokens=True)
    assert reply.text != tokenizer.decode(reply.tokens, skip_special_tokens=True)


def test_megatron_and_adapters(llamas, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    write(plan(Request(llamas / "model", tmp_path / "megatron", "megatron", grid=Grid(2, 1))))
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(llamas / "model")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, init_lora_weights=False)
    adapted = get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llamas / "model").save_pretrained(tmp_path / "adapter")
    assert isinstance(adapted, PeftModel)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(llamas / "model").save_pretrained(tmp_path / "merged")
    expected = {
        "megatron": [greedy(llamas / "model", prompt) for prompt in PROMPTS],
        "adapter": [greedy(tmp_path / "merged", prompt) for prompt in PROMPTS],
    }
    assert expected["megatron"] != expected["adapter"]
    for name, tokens in expected.items():
        found = rlhf.load_actor(tmp_path / name).generate(PROMPTS, temperature=0, max_new_tokens=9)
        assert [reply.tokens for reply in found] == tokens


def test_bf16_is_autocast(llamas):
    found = rlhf.load_actor(llamas / "model", precision="bf16").generate(["a b c"], temperature=0, max_new_tokens=3)
    model = load_actor(str(llamas / "model"), Loading()).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ids = [2, 3, 4]
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found[0].tokens == ids[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5, "top_p": 0.9}, "top_k 5 and top_p 0.9 exclude each other: leave one of them out"),
        ({"top_k": 0, "top_p": 0}, "top_k and top_p are both 0: give one of them, or leave both out"),
        ({"top_k": 5, "temperature": 0}, "top_k has no meaning with temperature 0"),
        ({"samples_per_prompt": 2, "temperature": 0}, "samples_per_prompt must be 1 with temperature 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: given 0: Input should be greater than 0"),
        ({"max_new_tokens": 0, "top_p": 2}, "max_new_tokens: given 0: .*\ntop_p: given 2: "),
    ],
)
def test_options_that_cannot_be(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        policy.generate(["a"], **options)


def test_options_of_loading_that_cannot_be(llamas, tmp_path, monkeypatch):
    for options, message in (
        ({"precision": "fp8"}, "precision: given 'fp8': Input should be 'fp32' or 'bf16'"),
        ({"template": "caht"}, "template: given 'caht': Input should be 'auto', 'chat' or 'plain'"),
    ):
        with pytest.raises(ConfigError, match=message):
            rlhf.load_actor(llamas / "model", **options)
    with pytest.raises(ConfigError, match="template: given 'caht'"):
        rlhf.load_reward(llamas / "critic", template="caht")  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("HOME", str(llamas))
    assert rlhf.load_actor("~/model").generate(["a"], max_new_tokens=2)
    assert rlhf.load_reward("~/critic").score(["a"], ["b"])


def test_replies_that_cannot_be_scored(llamas, tmp_path):
    reward = rlhf.load_reward(llamas / "critic")
    for given, message in (
        ({"batch_size": -1}, "batch_size: given -1: "),
        ({"batch_size": 0}, "batch_size: given 0: "),
        ({"replies": "cd"}, "replies: given one text, expected a list of replies"),
        ({"prompts": "ab"}, "prompts: given one text, expected a list of prompts"),
        ({"replies": ["c", None]}, r"replies\.1: given None: "),
        ({"finished": [True, "perhaps"]}, r"finished\.1: given 'perhaps': "),
    ):
        with pytest.raises(ConfigError, match=message):
            reward.score(**({"prompts": ["a", "b"], "replies": ["c", "d"]} | given))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"prompts\[1\]: prompt and reply have no token together"):
        reward.score(["a", ""], ["b", ""], finished=[True, False])
    assert len(reward.score(("a", ""), ("b", ""), finished=(True, True))) == 2
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(llamas / "critic"), opened(llamas / "model")[1]
    model.score.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckFailed, match=r"prompts\[0\]: .*nan scores its reply nan, expected a finite number"):
        rlhf.load_reward(tmp_path / "nan").score(["a"], ["b"])


@pytest.mark.parametrize("schema", [{"enum": [{1}]}, {"const": float("nan")}])
def test_a_schema_that_is_no_json(policy, schema):
    with pytest.raises(ConfigError, match="json_schema: cannot be written as JSON: "):
        policy.generate(["a"], json_schema=schema)


def test_what_llguidance_says_of_a_schema_is_a_warning(policy):
    """As the command notes it; that this tokenizer cannot be steered comes after."""
    pytest.importorskip("llguidance")
    schema = {"type": "string", "format": "no-such-format", "x-guidance": {"lenient": True}}
    assert Schema(json.dumps(schema)).notes
    with pytest.warns(UserWarning, match="json_schema: .*no-such-format"), pytest.raises(DataError, match="cannot read this"):
        policy.generate(["a"], max_new_tokens=9, json_schema=schema)


def test_prompts_that_cannot_be(policy):
    with pytest.raises(ConfigError, match="given one text, expected a list"):
        policy.generate("a b")
    with pytest.raises(DataError, match=r"prompts\[1\]: has no tokens"):
        policy.generate(["a", ""])
    with pytest.raises(DataError, match=r"prompts\[0\]: this row holds messages, and there is no chat template"):
        policy.generate([[{"role": "user", "content": "a"}]])
    with pytest.raises(DataError, match="the longest row takes 65 positions, the model has 64: lower max_new_tokens"):
        policy.generate(["a"], max_new_tokens=64)
    assert policy.generate([]) == []


def test_defaults_are_the_commands():
    stated = {name: value.default for name, value in inspect.signature(rlhf.load_actor).parameters.items()}
    assert stated["precision"] == "fp32"
    from rlhf.training.inference import Policy

    options = {name: one.default for name, one in inspect.signature(Policy.generate).parameters.items() if one.kind == 3}
    assert options == {name: field.default for name, field in BatchDecoding.model_fields.items()}


def own_score(directory: Path, text: str, ended: bool = True) -> float:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text)["input_ids"] + [END] * ended
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1])


def test_scores_are_transformers_own(llamas):
    reward = rlhf.load_reward(llamas / "critic")
    replies = ["c d e", "a", "f", "b b"]
    found = reward.score(PROMPTS, replies, batch_size=3)
    texts = [f"{prompt} {reply}" for prompt, reply in zip(PROMPTS, replies, strict=True)]
    assert found == pytest.approx([own_score(llamas / "critic", text) for text in texts], abs=1e-5)
    cut = reward.score(PROMPTS, replies, finished=[True, False, True, False])
    assert cut[::2] == pytest.approx(found[::2], abs=1e-5)
    assert cut[1] == pytest.approx(own_score(llamas / "critic", texts[1], ended=False), abs=1e-5)
    assert abs(cut[1] - found[1]) > 1e-4
    assert reward.score([], []) == []
    with pytest.raises(DataError, match="4 prompts, 1 replies and 1 of finished; expected as many of each"):
        reward.score(PROMPTS, ["a"])


def test_what_a_model_is_is_told(llamas):
    with pytest.raises(DataError, match="this is a reward model, not a policy"):
        rlhf.load_actor(llamas / "critic")
    with pytest.raises(DataError, match="the scalar head is missing"):
        rlhf.load_reward(llamas / "model")
    with pytest.raises(AttributeError, match="has no attribute 'load_critic'"):
        _ = rlhf.load_critic
