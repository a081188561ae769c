"""Each stage from its command line to its result, in the modes that share the page."""

from __future__ import annotations

import json
import statistics
from importlib.util import find_spec

import pytest
import torch
from harness import flags, metrics, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def test_sft_then_rm_then_ppo(world, tmp_path):
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft"), log) == 0, log.read_text()
    assert run("rm", flags("rm", world, tmp_path / "rm", model=tmp_path / "sft"), log) == 0, log.read_text()
    roles = {"actor": tmp_path / "sft", "reward": tmp_path / "rm", "critic": tmp_path / "rm"}
    ppo = flags("ppo", world, tmp_path / "ppo", report__samples=6, **roles)
    assert run("ppo", ppo, log) == 0, log.read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo" / "model")
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    ids = tokenizer("a b c", return_tensors="pt")
    assert actor.generate(**ids, max_new_tokens=3).shape[1] <= 6
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "critic")
    assert critic(**ids).logits.shape == (1, 1)
    record = json.loads((tmp_path / "ppo" / "run.json").read_text())
    assert set(record["outputs"]) == {"model", "critic"}
    assert record["inputs"]["actor"]["parent"]
    assert json.loads((tmp_path / "ppo" / "status.json").read_text())["state"] == "done"
    assert {"before", "after"} <= set(record["result"])
    first = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    scores = [sample["scores"]["score"] for sample in first if sample["step"] == 0]
    assert len(scores) == 6  # all that are held out
    mean, error = statistics.mean(scores), statistics.stdev(scores) / len(scores) ** 0.5
    before = record["result"]["before"]
    by_hand = pytest.approx((mean, error), abs=1e-4)  # samples have four places
    assert (before["score"], before["score_standard_error"]) == by_hand


def test_learning(world, tmp_path):
    log = tmp_path / "log"
    longer = {"schedule__length": 40, "checkpoint__every": 0, "schedule__decay": "constant", "optimizer__lr": 1e-2}
    assert run("sft", flags("sft", world, tmp_path / "sft", **longer), log) == 0, log.read_text()
    losses = [line["loss"] for line in metrics(tmp_path / "sft") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert run("rm", flags("rm", world, tmp_path / "rm", **longer), log) == 0, log.read_text()
    assert metrics(tmp_path / "rm")[-1]["eval/accuracy"] > 0.9  # the pairs are separable by their first word


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "ppo"])
def test_lora(stage, world, tmp_path):
    """The adapter is saved as such, merged it is a plain model, and both answer alike."""
    log, first, second = tmp_path / "log", tmp_path / "adapter", tmp_path / "merged"
    more = {"lora__rank": 4, "schedule__length": 2, "optimizer__lr": 1e-2}
    assert run(stage, flags(stage, world, first, **more), log) == 0, log.read_text()
    assert run(stage, flags(stage, world, second, lora__merge="true", **more), log) == 0, log.read_text()
    assert (first / "model" / "adapter_model.safetensors").exists()
    assert json.loads((first / "model" / "base.json").read_text())["digest"]
    from rlhf.models.load import Loading, load_actor, load_scalar

    opened = [(load_scalar if stage == "rm" else load_actor)(str(path), Loading()) for path in (first, second)]
    ids = torch.tensor([[2, 3, 4]])
    outputs = [model(ids).logits for model in opened]
    assert torch.allclose(*outputs, atol=1e-5)
    start = (load_scalar if stage == "rm" else load_actor)(str(world / ("critic" if stage == "rm" else "model")), Loading())
    assert not torch.allclose(start(ids).logits, outputs[0], atol=1e-4)


def test_packed_rows_do_not_see_each_other(world, tmp_path):
    """All rows in one step: the packed loss is the unpacked one."""
    log = tmp_path / "log"
    whole = {"batch_size": 37, "micro_batch_size": 64, "schedule__unit": "epochs", "schedule__length": 1, "precision": "fp64"}
    assert run("sft", flags("sft", world, tmp_path / "plain", **whole), log) == 0, log.read_text()
    packed = whole | {"data__packing": "true", "data__max_length": 32}
    assert run("sft", flags("sft", world, tmp_path / "packed", **packed), log) == 0, log.read_text()
    one, two = (metrics(tmp_path / name)[1]["loss"] for name in ("plain", "packed"))
    assert one == pytest.approx(two, rel=1e-10)


def test_long_documents_are_learned_whole(world, tmp_path):
    """The loss of a step on split and packed documents is that of transformers' model on rows cut here by hand."""
    log, limit = tmp_path / "log", 8
    texts = ["a b c d e f g h a c e g b d f h a d g h", "h g", "a b c d e f g", "c c a b d b e e h", "f"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model").double().eval()
    total = 0.0
    for text in texts:
        document = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(document) - 1, limit - 1):
            row = torch.tensor([document[start : start + limit]])
            logprobs = model(row).logits[0, :-1].log_softmax(-1)
            total -= logprobs.gather(-1, row[0, 1:, None]).sum().item()
    count = sum(len(text.split()) for text in texts)  # a document's EOS has a loss, its first token has none

    def losses(name: str, tokens: int, **more: object) -> list[float]:
        rows = {"data": tmp_path / "texts.jsonl", "data__eval": "null", "json_key": "text", "data__max_length": limit}
        rows |= {"data__packing": "true", "schedule__unit": "tokens", "schedule__length": tokens, "precision": "fp64"}
        assert run("sft", flags("sft", world, tmp_path / name, **rows | more), log) == 0, log.read_text()
        return [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]

    # Rows of 8, 8, 7 | 3 | 8 | 8, 3 | 2 tokens fill five sequences and one of 3 + 3 + 2: a step of six is a pass over all.
    whole = losses("one", count, batch_size=6)
    assert whole == [pytest.approx(total / count, rel=1e-10)]
    assert "2 documents longer than 8 tokens split into 5 rows" in log.read_text()
    assert len(losses("two", count + 1, batch_size=6)) == 2
    assert losses("cut", 1, batch_size=99, data__too_long="truncate")[0] != pytest.approx(whole[0], rel=1e-3)


def test_modes_of_ppo(world, tmp_path):
    log = tmp_path / "log"
    short = {"schedule__length": 2, "data__eval": "null"}
    shared = {"critic": "zero", "roles__mode": "shared", "gradient_checkpointing": "true"}
    assert run("ppo", flags("ppo", world, tmp_path / "shared", **short, **shared), log) == 0, log.read_text()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "shared" / "critic").score.weight.abs().sum() > 0
    adaptive = {"kl__controller": "adaptive", "ppo__target_kl": 1e-9}
    assert run("ppo", flags("ppo", world, tmp_path / "adaptive", **short, **adaptive), log) == 0, log.read_text()
    first, second = metrics(tmp_path / "adaptive")[:2]
    assert second["kl/coef"] == pytest.approx(first["kl/coef"] * (1 - 0.2 * 14 / 10000))  # KL was 0: the error is clipped
    free = {"kl__coef": 0, "rollout__samples_per_prompt": 2, "rollout__top_k": 5, "rollout__top_p": 0.9}
    assert run("ppo", flags("ppo", world, tmp_path / "free", **short, **free), log) == 0, log.read_text()
    assert "kl/sequence" not in metrics(tmp_path / "free")[0]


def test_critic_warm_up_leaves_the_actor_as_it_was(world, tmp_path):
    log = tmp_path / "log"
    warm = flags("ppo", world, tmp_path / "warm", schedule__length=2, ppo__critic_warmup=2, data__eval="null")
    assert run("ppo", warm, log) == 0, log.read_text()
    before, after = (load_file(d / "model.safetensors") for d in (world / "model", tmp_path / "warm" / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    critics = [load_file(d / "model.safetensors") for d in (world / "critic", tmp_path / "warm" / "critic")]
    assert not torch.equal(critics[0]["score.weight"], critics[1]["score.weight"])


def test_tokens_schedule_ends_after_its_tokens(world, tmp_path):
    log = tmp_path / "log"
    arguments = flags("sft", world, tmp_path / "sft", schedule__unit="tokens", schedule__length=100, eval_every=1)
    assert run("sft", arguments, log) == 0, log.read_text()
    steps = [line for line in metrics(tmp_path / "sft") if "loss" in line]
    assert 100 / 9 / 6 <= len(steps) <= 100 / 9  # each step holds nine rows of two to six trained tokens


def test_a_user_function_as_reward(world, tmp_path):
    log = tmp_path / "log"
    (tmp_path / "mine.py").write_text("def short(responses):\n    return [-len(r) for r in responses]\n")
    (tmp_path / "bad.py").write_text("def nan(responses):\n    return [float('nan')] * len(responses)\n")
    good = flags("ppo", world, tmp_path / "ok", reward=f"{tmp_path}/mine.py:short", schedule__length=1)
    assert run("ppo", good, log) == 0, log.read_text()
    bad = flags("ppo", world, tmp_path / "bad", reward=f"{tmp_path}/bad.py:nan", schedule__length=1)
    assert run("ppo", bad, log) == 1
    assert "score is nan" in log.read_text()
    assert json.loads((tmp_path / "bad" / "status.json").read_text())["state"] == "failed"


def test_tensorboard_shows_what_metrics_say(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", report__trackers="tensorboard"), log) == 0, log.read_text()
    events = EventAccumulator(str(tmp_path / "sft" / "sft"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    written = {line["step"]: line["loss"] for line in metrics(tmp_path / "sft") if "loss" in line}
    assert shown == pytest.approx(written)
    assert len(shown) == 4


def test_a_tracker_that_is_not_installed_is_no_silence(world, tmp_path):
    """Accelerate itself would go on without it."""
    if find_spec("trackio"):
        pytest.skip("trackio is installed here")
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", report__trackers="trackio"), log) == 78
    assert "trackio is not installed: pip install trackio" in log.read_text()
    assert not (tmp_path / "sft" / "run.json").exists()
