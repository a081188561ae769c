"""Several sources, models that read other tokens, answers to compare with, replies without a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlhf.config.rewards import Reward
from rlhf.config.schema import PpoConfig
from rlhf.config.sections import Data
from rlhf.data.collate import ranking_batch
from rlhf.data.examples import PromptExample, pair_examples
from rlhf.data.rows import Row
from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.models.load import load_tokenizer
from rlhf.models.roles import Roles, open_ppo, open_reward_model
from rlhf.rollout.engines import Samples
from rlhf.rollout.readers import columns_asked, open_readers
from rlhf.rollout.rewards import MinusAnswer, ModelReward, Replies, Scores, open_reward
from rlhf.training.tiny import write_tiny_model

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PROMPTS = ["a b c", "d", "a b c", "h g f e"]
REPLIES = [(" b c d", True), (" h", True), (" a a a", False), (" g f", True)]
ANSWERS = [" c d", " e e", " c d", " a"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """model/ and critic/ of eight words; bytes/, a reward model that reads bytes in a chat; rows.jsonl."""
    directory = tmp_path_factory.mktemp("sources")
    write_tiny_model(directory, seed=0)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(["a b c d e f g h"] * 3, trainer)
    tokenizer = FastTokenizer(tokenizer_object=plain, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT)
    tokenizer.save_pretrained(directory / "bytes")
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(
        **sizes, **ids, num_labels=1, vocab_size=len(tokenizer), max_position_embeddings=48, initializer_range=0.5
    )
    LlamaForSequenceClassification(config).save_pretrained(directory / "bytes")
    (directory / "rows.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS))
    return directory


def asked() -> list[PromptExample]:
    rows = [Row(f"rows.jsonl:{i}", {"prompt": p}, {"answer": a}) for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))]
    return [PromptExample(PROMPTS.index(row.fields["prompt"]), [], row) for row in rows]


def replies(place: Path) -> Samples:
    tokenizer = load_tokenizer(str(place / "model"))
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ids = [tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if ended else []) for text, ended in REPLIES]
    return Samples(prompts, ids, [[0.0] * len(row) for row in ids], [ended for _, ended in REPLIES], 0)  # type: ignore[arg-type]


def config(place: Path, critic: str | None = "zero", **reward) -> PpoConfig:
    roles = {"actor": str(place / "model"), "critic": critic}
    plain = {"output": "none", "roles": roles, "data": {"train": str(place / "rows.jsonl")}, "reward": reward}
    return PpoConfig.model_validate(plain)


def scored(place: Path, **reward) -> tuple[Scores, Roles]:
    """What open_ppo and open_reward make of a config."""
    whole = config(place, **reward)
    roles, readers = open_ppo(whole), open_readers(whole.reward, whole.data)
    template = Template(roles.tokenizer, "auto", roles.stop_ids)
    return open_reward(whole.reward, readers, roles.rewards, template, 3)(replies(place), asked()), roles


def directly(place: Path, prompt: str, reply: str, ended: bool = True) -> float:
    """By transformers alone: the chat as text, the score of its last token."""
    tokenizer = AutoTokenizer.from_pretrained(place / "bytes")
    model = AutoModelForSequenceClassification.from_pretrained(place / "bytes").eval()
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply.strip()}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    text = text if ended else text.removesuffix("<|end|>")
    with torch.no_grad():
        return float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits)


def test_a_model_with_another_tokenizer_reads_text(place):
    found, roles = scored(place, source=str(place / "bytes"))
    (note,) = roles.notes
    assert note.startswith(f"the tokenizer of the reward model {place / 'bytes'} is not the actor's: it reads replies as text")
    assert note.endswith("by its chat template")
    expected = [directly(place, prompt, *reply) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=0, atol=1e-5)
    # and as pairs of these texts are scored by `rlhf eval`
    lines = [
        f'{{"prompt": "{p}", "chosen": "{r.strip()}", "rejected": "h h h"}}\n'
        for p, (r, _) in zip(PROMPTS, REPLIES, strict=True)
    ]
    (place / "pairs.jsonl").write_text("".join(lines))
    own = open_reward_model(str(place / "bytes"))
    reading = Template(own.tokenizer, "auto", own.stop_ids)
    pairs = pair_examples(str(place / "pairs.jsonl"), Data(train="none"), reading).items
    with torch.no_grad():
        chosen = own.policy(ranking_batch(pairs), roles=("critic",)).values.view(-1, 2)[:, 0]
    finished = [ended for _, ended in REPLIES]
    np.testing.assert_allclose(found.scores[finished].numpy(), chosen[finished].numpy(), rtol=0, atol=1e-5)


def test_a_model_with_the_actors_tokenizer_reads_its_tokens(place):
    found, roles = scored(place, source=str(place / "critic"))
    assert roles.rewards["reward"].template is None
    assert roles.notes == []
    model = AutoModelForSequenceClassification.from_pretrained(place / "critic").eval()
    samples = replies(place)
    with torch.no_grad():
        rows = [torch.tensor([p + r]) for p, r in zip(samples.prompts, samples.responses, strict=True)]
        expected = [float(model.score(model.base_model(row).last_hidden_state)[0, -1]) for row in rows]
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=0, atol=1e-5)


def test_the_critic_cannot_start_from_another_tokenizer(place):
    with pytest.raises(
        DataError, match=r"would start from the reward model .*bytes, whose tokenizer .*set roles.critic to `zero`"
    ):
        open_ppo(config(place, critic=None, source=str(place / "bytes")))
    with pytest.raises(DataError, match=r"the tokenizer of the critic .*bytes is not that of the actor"):
        open_ppo(config(place, critic=str(place / "bytes"), source="count:a"))


def test_a_text_longer_than_the_model_is_named(place):
    _, roles = scored(place, source=str(place / "bytes"))
    row = Row("rows.jsonl:9", {"prompt": "a " * 40}, {})
    source = ModelReward("bytes", roles.rewards["reward"], 2)
    with pytest.raises(
        DataError, match=r"^rows.jsonl:9: with a reply it takes \d+ positions of the reward model bytes, which has 48"
    ):
        source(Replies([PromptExample(0, [], row)], [[2]], [" b"], [True], [[2]]))


@pytest.mark.parametrize("rule", ["sum", "mean", "min", "mean_minus_std"])
def test_an_ensemble(place, rule):
    """Each member as it scores alone, put together by numpy; of one member, the member."""
    sources = {"ours": {"source": str(place / "critic"), "weight": 2.0}, "other": {"source": str(place / "bytes")}}
    found, roles = scored(place, sources=sources, combine=rule, std_coef=0.5)
    assert list(roles.rewards) == ["ours", "other"]
    alone = {name: scored(place, source=part["source"])[0].scores.numpy() for name, part in sources.items()}
    members = np.stack([2.0 * alone["ours"], alone["other"]])
    expected = {"sum": members.sum(0), "mean": members.mean(0), "min": members.min(0)}
    expected["mean_minus_std"] = members.mean(0) - 0.5 * members.std(0)
    np.testing.assert_allclose(found.scores.numpy(), expected[rule], rtol=0, atol=1e-6)
    for name, scores in alone.items():
        np.testing.assert_array_equal(found.components[name].numpy(), scores)
    one, _ = scored(place, sources={"other": sources["other"]}, combine=rule)
    np.testing.assert_array_equal(one.scores.numpy(), alone["other"])


def test_several_models_want_a_critic(place):
    sources = {name: {"source": str(place / name)} for name in ("critic", "bytes")}
    with pytest.raises(ValueError, match=r"roles.critic must be given with several reward models"):
        config(place, critic=None, sources=sources)


def test_minus_answer(place):
    """The answer's own score is taken off, for a count and for a model that reads text."""
    counts, _ = scored(place, source="count:a", minus_answer=True)
    assert counts.scores.tolist() == [0 - 0, 0 - 0, 3 - 0, 0 - 1]
    found, _ = scored(place, source=str(place / "bytes"), minus_answer=True)
    expected = [
        directly(place, prompt, *reply) - directly(place, prompt, answer)
        for prompt, reply, answer in zip(PROMPTS, REPLIES, ANSWERS, strict=True)
    ]
    np.testing.assert_allclose(found.scores.numpy(), expected, rtol=0, atol=2e-5)
    asks = columns_asked(Reward(source="count:a", minus_answer=True, answer="gold"), [])
    assert asks == {"gold": "count:a (minus_answer)"}


def test_an_answer_is_scored_once(place):
    calls: list[int] = []

    def source(found: Replies) -> list[float]:
        calls.append(len(found))
        return [float(len(text)) for text in found.texts]

    tokenizer = load_tokenizer(str(place / "model"))
    samples = replies(place)
    texts = [text for text, _ in REPLIES]
    whole = Replies(asked(), samples.responses, texts, samples.finished, samples.prompts)
    scores = MinusAnswer(source, "answer", Template(tokenizer, "auto", [1]))(whole)
    assert scores == [float(len(text) - len(answer)) for text, answer in zip(texts, ANSWERS, strict=True)]
    assert calls == [3, 4]  # the first and the third row ask the same


FUNCTIONS = """
def told(prompts, responses, tokens, finished, where, answer):
    assert prompts == ["a b c", "d", "a b c", "h g f e"], prompts
    assert responses == ["b c d", "h", "a a a", "g f"], responses
    assert finished == [True, True, False, True] and where[1] == "rows.jsonl:1"
    assert len(tokens[0]) == 4 and len(tokens[2]) == 3
    return [len(a) for a in answer]

def some(responses):
    return [None if "a" in response else len(response) for response in responses]

def fails(responses):
    raise OSError("busy")
"""


@pytest.fixture
def functions(place) -> str:
    (place / "mine.py").write_text(FUNCTIONS)
    (place / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return f"{place}/mine.py"


def test_a_function_is_given_what_it_asks_for(place, functions):
    assert scored(place, source=f"{functions}:told")[0].scores.tolist() == [float(len(answer)) for answer in ANSWERS]


def test_no_score_is_no_zero(place, functions):
    sources = {"some": {"source": f"{functions}:some"}, "count": {"source": "count:b", "weight": 10.0}}
    found, _ = scored(place, sources=sources)
    assert found.kept.tolist() == [True, True, False, True]
    assert found.scores.isnan().tolist() == [False, False, True, False]
    assert found.scores[found.kept].tolist() == [5 + 10, 1, 3]
    assert found.components["count"].tolist() == [1, 0, 0, 0]
    assert found.components["some"].isnan().tolist() == [False, False, True, False]


def test_what_fails_masks_where_that_is_asked_for(place, functions, capfd):
    with pytest.raises(DataError, match="raised OSError"):
        scored(place, source=f"{functions}:fails", retries=0)
    found, _ = scored(place, source=f"{functions}:fails", retries=1, on_failure="mask")
    assert not found.kept.any()
    assert "(try 2 of 2)" in capfd.readouterr().err
