"""Runs that are a little unlike the usual: each was once a crash, a hang or a number that was not true."""

from __future__ import annotations

import json

import pytest
import torch
from broken import logprobs_shifted_by
from harness import flags, metrics, run, start_on, wait
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GenerationConfig

from rlhf.errors import DataError
from rlhf.models.load import Loading, load_actor


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_lora_repeats_whatever_the_generator_held(stage, world, tmp_path):
    log, outputs = tmp_path / "log", []
    for seed in (1, 2):
        arguments = flags(stage, world, tmp_path / str(seed), lora__rank=2, schedule__length=2)
        assert run(stage, arguments, log, lambda module, seed=seed: torch.manual_seed(seed)) == 0, log.read_text()
        outputs.append((metrics(tmp_path / str(seed)), load_file(tmp_path / str(seed) / "model" / "adapter_model.safetensors")))
    assert outputs[0][0] == outputs[1][0]
    assert all(torch.equal(tensor, outputs[1][1][name]) for name, tensor in outputs[0][1].items())


@pytest.mark.parametrize("merge", ["true", "false"])
def test_two_heads_on_an_adapted_trunk(merge, world, tmp_path):
    log, output = tmp_path / "log", tmp_path / "ppo"
    more = {"critic": "zero", "roles__mode": "shared", "lora__rank": 2, "lora__merge": merge, "schedule__length": 2}
    assert run("ppo", flags("ppo", world, output, **more), log) == 0, log.read_text()
    critic = AutoModelForSequenceClassification.from_pretrained(output / "critic")
    actor = load_actor(str(output / "model"), Loading())
    ids = torch.tensor([[2, 3, 4]])
    trunks = [model.transformer(ids).last_hidden_state for model in (critic.eval(), actor.eval())]
    assert torch.allclose(*trunks, atol=1e-5)
    base = load_actor(str(world / "model"), Loading()).eval()
    assert not torch.allclose(base.transformer(ids).last_hidden_state, trunks[0], atol=1e-5)


def test_a_reward_adapter_is_no_policy(world, tmp_path):
    log = tmp_path / "log"
    assert run("rm", flags("rm", world, tmp_path / "rm", lora__rank=2, schedule__length=1), log) == 0, log.read_text()
    with pytest.raises(DataError, match="not a policy"):
        load_actor(str(tmp_path / "rm" / "model"), Loading())


def test_fewer_replies_than_ranks(world, tmp_path):
    """Three prompts in batches of two: the last batch, and the one held-out prompt, leave the second rank without a row."""
    log = tmp_path / "log"
    rows = (world / "prompts.jsonl").read_text().splitlines()[:3]
    (tmp_path / "few.jsonl").write_text("\n".join(rows) + "\n")
    more = {
        "data": tmp_path / "few.jsonl", "data__eval": tmp_path / "few.jsonl", "data__eval_limit": 1, "schedule__unit": "epochs",
        "schedule__length": 1, "rollout__batch_size": 2, "ppo__minibatch_size": 2, "ppo__whiten": "false",
    }  # fmt: skip
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        pids = start_on(processes, "ppo", flags("ppo", world, output, **more), log)
        assert [wait(pid) for pid in pids] == [0] * processes, log.read_text()
        found.append(metrics(output))
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_reward_of_zero_is_no_failure(world, tmp_path):
    log = tmp_path / "log"
    (tmp_path / "mine.py").write_text("def nothing(responses):\n    return [0] * len(responses)\n")
    more = {"reward": f"{tmp_path}/mine.py:nothing", "critic": "zero", "reward__missing_eos": "none", "schedule__length": 1}
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", **more), log) == 0, log.read_text()


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_evaluation_is_without_dropout(stage, world, tmp_path):
    log, found = tmp_path / "log", []
    for dropout in (0.0, 0.5):
        output = tmp_path / str(dropout)
        arguments = flags(stage, world, output, lora__rank=2, lora__dropout=dropout, optimizer__lr=1e-30, schedule__length=1)
        assert run(stage, arguments, log) == 0, log.read_text()
        found.append([line["eval/loss"] for line in metrics(output) if "eval/loss" in line])
    assert found[0] == found[1]


def test_a_finished_run_on_two_processes_ends_both(world, tmp_path):
    log, arguments = tmp_path / "log", flags("sft", world, tmp_path / "sft", schedule__length=1)
    for expected in ([0, 0], [0, 0]):
        assert [wait(pid) for pid in start_on(2, "sft", arguments, log)] == expected, log.read_text()
    changed = flags("sft", world, tmp_path / "sft", schedule__length=2)
    assert [wait(pid) for pid in start_on(2, "sft", changed, log)] == [65, 65], log.read_text()


def test_the_rank_that_fails_says_why(world, tmp_path):
    log = tmp_path / "log"
    (tmp_path / "mine.py").write_text(
        "import os\ndef mine(responses):\n    return ['' if os.environ['RANK'] == '1' else 0] * len(responses)\n"
    )
    arguments = flags("ppo", world, tmp_path / "ppo", reward=f"{tmp_path}/mine.py:mine", schedule__length=1)
    codes = [wait(pid) for pid in start_on(2, "ppo", arguments, log)]
    assert codes[1] == 65
    status = json.loads((tmp_path / "ppo" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)
    assert "score of reply 0" in status["reason"]


def test_a_failed_check_is_named_in_the_status(world, tmp_path):
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", data__eval="null"), tmp_path / "log", logprobs_shifted_by(1.0)) == 1
    assert "rollout log-probs" in json.loads((tmp_path / "ppo" / "status.json").read_text())["reason"]


def test_the_saved_model_knows_where_to_stop(world, tmp_path):
    (tmp_path / "bare").mkdir()
    for file in (world / "model").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    arguments = flags("sft", world, tmp_path / "sft", model=tmp_path / "bare", schedule__length=1)
    assert run("sft", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    generation = GenerationConfig.from_pretrained(tmp_path / "sft" / "model")
    assert generation.eos_token_id == 1
    assert generation.pad_token_id == 0


def test_a_critic_with_another_tokenizer_is_refused(world, tmp_path):
    (tmp_path / "critic").mkdir()
    for file in (world / "critic").iterdir():
        text = file.read_bytes()
        if file.name == "tokenizer.json":
            vocabulary = json.loads(text)
            words = vocabulary["model"]["vocab"]
            words["a"], words["b"] = words["b"], words["a"]
            text = json.dumps(vocabulary).encode()
        (tmp_path / "critic" / file.name).write_bytes(text)
    arguments = flags("ppo", world, tmp_path / "ppo", critic=tmp_path / "critic")
    assert run("ppo", arguments, tmp_path / "log") == 65
    assert "tokenizer of the critic" in (tmp_path / "log").read_text()


def test_what_changed_at_an_inexact_resume_is_kept(world, tmp_path):
    log, output = tmp_path / "log", tmp_path / "sft"

    def stop_at_two(module) -> None:
        right = module.Training.report

        def report(self, step, *more):
            if step == 1:
                raise DataError("stopped by the test")
            return right(self, step, *more)

        module.Training.report = report

    assert run("sft", flags("sft", world, output), log, stop_at_two) == 65
    changed = flags("sft", world, output, optimizer__lr=2e-3)
    assert run("sft", changed, log) == 65
    assert run("sft", [*changed, "--allow-inexact-resume"], log) == 0, log.read_text()
    assert json.loads((output / "run.json").read_text())["inexact_resumes"] == [["optimizer.lr: 0.001 -> 0.002"]]


def test_the_reference_is_the_actor_to_the_bit_at_any_shape(tmp_path):
    """A Llama without biases: torch's CPU kernel for a sliced input depends on whether the weight wants a gradient."""
    from rlhf.data.chat_world import write_world

    write_world(tmp_path / "world", 0)
    log, world = tmp_path / "log", tmp_path / "world"
    common = {"threads": 1, "schedule__length": 1, "schedule__unit": "steps", "checkpoint__every": 0}

    def words(**more: object) -> list[str]:
        return [f"--{name.replace('__', '.')}={value}" for name, value in {**common, **more}.items()]

    sft = words(model=world / "base", model__from_scratch="true", data=world / "sft.jsonl", output=tmp_path / "sft")
    assert run("sft", sft, log) == 0, log.read_text()
    for mode, lora in (("separate", 0), ("shared", 0), ("separate", 4)):
        output = tmp_path / f"{mode}-{lora}"
        few = {"rollout__batch_size": 8, "ppo__minibatch_size": 8, "rollout__max_new_tokens": 4, "roles__mode": mode}
        roles = {"actor": tmp_path / "sft", "critic": "zero", "reward": "count:a", "data": world / "prompts.jsonl"}
        ppo = words(output=output, reward__missing_eos="none", lora__rank=lora, **few, **roles)
        assert run("ppo", ppo, log) == 0, log.read_text()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_row_longer_than_the_model_is_refused(stage, world, tmp_path):
    long = {"prompt": "a " * 70, "completion": "b"} if stage == "sft" else {"prompt": "a " * 62}
    (tmp_path / "long.jsonl").write_text(json.dumps(long) + "\n")
    arguments = flags(stage, world, tmp_path / "out", data=tmp_path / "long.jsonl")
    assert run(stage, arguments, tmp_path / "log") == 65
    assert "the model has 64: lower data.max_length" in (tmp_path / "log").read_text()


def test_a_script_refuses_what_only_the_command_can_do(world, tmp_path):
    import subprocess
    import sys

    from rlhf.paths import STAGES

    command = [sys.executable, str(STAGES / "sft.py"), *flags("sft", world, tmp_path / "sft"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "are for `rlhf sft`" in done.stderr
    assert not (tmp_path / "sft").exists()
