"""PPO on rollouts of other origins: recorded and replayed, through transformers' `generate`, from a (stand-in) vLLM server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
from harness import before_each_step, flags, left, metrics, run, start_on, wait
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SMALL = {"schedule__length": 3, "data__eval": "null"}


def steps_of(output):
    return sorted(int(file.stem.removeprefix("step-")) for file in (output / "rollouts").iterdir())


def nobody_is_asked(module) -> None:
    """Neither an engine nor a reward."""

    def fail(*_, **__):
        raise AssertionError("sampled or scored")

    module.open_engine = lambda *_: SimpleNamespace(sync=lambda *_, **__: None, generate=fail)
    module.open_reward = lambda *_, **__: fail


@pytest.fixture(scope="module", params=[1, 2])
def recorded(request, world, tmp_path_factory):
    """(processes, directory, output of a run that recorded)"""
    directory = tmp_path_factory.mktemp("recorded")
    run_it(request.param, world, directory, "recorded", record="true")
    return request.param, directory, directory / "recorded"


def run_it(processes, world, directory, name, change=None, expected=0, **more) -> str:
    log = directory / f"{name}.log"
    pids = start_on(processes, "ppo", flags("ppo", world, directory / name, **{**SMALL, **more}), log, change)
    assert [wait(pid) for pid in pids] == [expected] * processes, log.read_text()
    return log.read_text()


def test_a_replay_is_the_run_to_the_bit(recorded, world):
    processes, directory, output = recorded
    assert steps_of(output) == [1, 2, 3]
    run_it(processes, world, directory, "replayed", nobody_is_asked, replay=output)
    assert left(directory / "replayed", 3) == left(output, 3)
    assert not (directory / "replayed" / "rollouts").exists()


def test_a_run_killed_while_it_wrote_a_file_goes_on(world, tmp_path):
    """It leaves half a file under a name that ends in the number of a process that is no more."""
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    half = tmp_path / "run" / "rollouts" / f".step-2.safetensors-{socket.gethostname()[:40]}-{dead}.partial"

    def kill(module) -> None:
        before_each_step(lambda train: train.step_done == 1 and (half.touch(), signal.raise_signal(signal.SIGKILL)))(module)

    run_it(1, world, tmp_path, "run", kill, -signal.SIGKILL, record="true")
    assert half.exists()
    run_it(1, world, tmp_path, "run", record="true")
    assert steps_of(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("recorded", [2], indirect=True)
def test_what_a_file_holds(recorded):
    """Read by safetensors alone: log-probs where the mask is, prompts as they were asked, all scores."""
    _, _, output = recorded
    for step, line in enumerate(metrics(output), start=1):
        found = load_file(output / "rollouts" / f"step-{step}.safetensors")
        mask = found["mask"].bool()
        assert found["tokens"].shape == mask.shape == found["sampled_logprobs"].shape
        assert (found["sampled_logprobs"][mask] < 0).all()
        assert (found["sampled_logprobs"] - found["logprobs"])[mask].abs().max() < 1e-4
        assert found["scores"].mean().item() == pytest.approx(line["reward/score"])
        assert len(found["prompts"]) == len(found["prompt_lengths"]) == 14
        assert int(found["prompt_lengths"].sum() + mask.sum()) == line["tokens"]


@pytest.mark.parametrize("recorded", [1], indirect=True)
def test_a_score_that_is_another_changes_the_update(recorded, world):
    """The files are what is learned from."""
    processes, directory, output = recorded
    changed = directory / "changed"
    shutil.copytree(output / "rollouts", changed / "rollouts")
    file = changed / "rollouts" / "step-2.safetensors"
    tensors = load_file(file)
    tensors["scores"][int(tensors["finished"].long().argmax())] += 1  # of a reply that does not end it would not count
    save_file(tensors, file)
    run_it(processes, world, directory, "of-changed", nobody_is_asked, replay=changed)
    ours, theirs = metrics(directory / "of-changed"), metrics(output)
    assert ours[0] == theirs[0]
    assert ours[1]["reward/score"] == pytest.approx(theirs[1]["reward/score"] + 1 / 14)
    assert ours[1]["policy/loss"] != theirs[1]["policy/loss"]


@pytest.mark.parametrize("recorded", [1], indirect=True)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 5}, "step-1.safetensors: reply 0 is to another prompt than"),
        ({"rollout__batch_size": 7}, "holds 14 replies, and this run asks for 7"),
        ({"schedule__length": 4}, "step-4.safetensors: not there, the run recorded 3 iterations; set schedule.length to 3"),
        ({"rollout__max_new_tokens": 5}, "has a reply of 6 tokens; set rollout.max_new_tokens to that, it is 5"),
    ],
    ids=["prompts", "count", "length", "tokens"],
)
def test_a_replay_of_something_else(recorded, world, more, message):
    processes, directory, output = recorded
    assert message in run_it(processes, world, directory, "-".join(more), expected=65, replay=output, **more)


@pytest.mark.parametrize("recorded", [2], indirect=True)
def test_ranks_end_together(recorded, world):
    processes, directory, output = recorded
    said = run_it(processes, world, directory, "ends", expected=65, replay=output, seed=5)
    assert "reply 0 is to another prompt than" in said


def test_what_cannot_be_replayed(world, tmp_path):
    (tmp_path / "rollouts").mkdir()
    assert "no rollouts/step-1.safetensors there" in run_it(1, world, tmp_path, "none", expected=65, replay=tmp_path)
    (tmp_path / "rollouts" / "step-1.safetensors").write_bytes(b"no tensors")
    assert "step-1.safetensors: no recorded rollout (" in run_it(1, world, tmp_path, "broken", expected=65, replay=tmp_path)


def test_recording_resumed_and_a_resumed_replay(world, tmp_path):
    """Stopped after a step, gone on recording; files of steps that are made again are removed, and replays resume too."""
    more = {**SMALL, "max_hours": 1e-9}
    log = tmp_path / "log"

    def go(name, code, **own) -> None:
        assert run("ppo", flags("ppo", world, tmp_path / name, **{**more, **own}), log) == code, log.read_text()

    go("whole", 0, max_hours="null", record="true")
    go("stopped", 143)
    assert not (tmp_path / "stopped" / "rollouts").exists()
    go("stopped", 143, record="true")  # may be turned on in a run that goes on
    assert steps_of(tmp_path / "stopped") == [2]
    shutil.copy(tmp_path / "stopped/rollouts/step-2.safetensors", tmp_path / "stopped/rollouts/step-7.safetensors")
    go("stopped", 0, record="true", max_hours="null")
    assert steps_of(tmp_path / "stopped") == [2, 3]
    for step in (2, 3):
        one, other = (load_file(tmp_path / name / f"rollouts/step-{step}.safetensors") for name in ("whole", "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    go("replay", 143, replay=tmp_path / "whole")
    recorded, aside = tmp_path / "whole/rollouts/step-3.safetensors", tmp_path / "aside"
    recorded.rename(aside)
    shutil.copy(tmp_path / "whole/rollouts/step-2.safetensors", recorded)
    go("replay", 65, replay=tmp_path / "whole")
    assert "contents of replay: " in log.read_text()
    aside.replace(recorded)
    go("replay", 0, replay=tmp_path / "whole", max_hours="null")
    assert left(tmp_path / "replay", 3) == left(tmp_path / "whole", 3)
    replayed = json.loads((tmp_path / "replay" / "run.json").read_text())["inputs"]["replay"]
    assert (replayed["path"], len(replayed["digest"])) == ("../whole", 64)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_hf_gives_the_runs_of_the_native_engine(world, tmp_path, processes):
    """The same tokens for the same seeds; log-probs of old and new policy are the forward's, whoever sampled."""
    more = {"rollout__generation_batch_size": 5, "record": "true", "data__eval": world / "prompts.jsonl"}
    run_it(processes, world, tmp_path, "native", **more)
    said = run_it(processes, world, tmp_path, "hf", rollout__engine="hf", **more)
    assert "rollout engine hf: " in said
    assert metrics(tmp_path / "hf") == metrics(tmp_path / "native")
    one, other = left(tmp_path / "hf", 3), left(tmp_path / "native", 3)
    assert {name: one[name] for name in one if name.startswith("model/")} == {
        name: other[name] for name in other if name.startswith("model/")
    }


def test_importance_weights_in_a_run(world, tmp_path):
    """An engine of the same numbers has weights of 1, and the update is that without them; its statistics are reported."""
    for name, cap in (("without", "null"), ("with", 2.0)):
        run_it(1, world, tmp_path, name, precision="fp64", ppo__importance_cap=cap)
    ours, plain = metrics(tmp_path / "with"), metrics(tmp_path / "without")
    for line, other in zip(ours, plain, strict=True):
        assert line.pop("policy/importance_weight") == pytest.approx(1, abs=1e-6)
        assert line.pop("policy/importance_capped") == 0
        assert line == {name: pytest.approx(value, rel=1e-5, abs=1e-7) for name, value in other.items()}

    def sampled_otherwise(module) -> None:
        """As if each token had been drawn with half the probability: each weighs 2, and the cap of 1.5 makes that 1.5."""
        from dataclasses import replace

        right = module.credit
        module.credit = lambda experience, *rest: right(
            replace(experience, sampled_logprobs=experience.logprobs - 0.6931472), *rest
        )
        module.invariants.ROLLOUT_TOLERANCE = {"fp64": 1.0}

    one = {"precision": "fp64", "schedule__length": 1, "ppo__epochs": 1, "ppo__minibatch_size": 14, "ppo__whiten": "false"}
    run_it(1, world, tmp_path, "capped", sampled_otherwise, ppo__importance_cap=1.5, **one)
    run_it(1, world, tmp_path, "not-capped", sampled_otherwise, **one)
    line, other = metrics(tmp_path / "capped")[0], metrics(tmp_path / "not-capped")[0]
    assert line["policy/importance_weight"] == pytest.approx(1.5)
    assert line["policy/importance_capped"] == 1
    assert line["policy/loss"] == pytest.approx(1.5 * other["policy/loss"])
    assert line["value/loss"] == pytest.approx(other["value/loss"])
    assert abs(other["policy/loss"]) > 1e-2


def from_a_server(world, told=None, forgets=False):
    """A `change`: each rank has a stand-in server of its own, and sends it weights itself. Into `told` go, for the weights sent
    each time, how many replies were asked for since the time before. With `forgets` only the first are sent."""

    def change(module) -> None:
        from vllm_stand_in import serving

        from rlhf.models.load import Loading, load_actor
        from rlhf.rollout.vllm_engine import VllmEngine, connected
        from rlhf.training import invariants

        invariants.ROLLOUT_TOLERANCE["bf16"] = 1e-4  # the stand-in computes in float32

        def open_engine(config, train, stop_ids, pad_id):
            module.served = serving(load_actor(str(world / "model"), Loading(seed=1), from_scratch=True))
            stand_in = module.served.__enter__()  # for as long as the process lives
            own = SimpleNamespace(
                device=torch.device("cuda"), is_main=True, gathered=train.gathered, wait_for_main=train.wait_for_main
            )
            engine = VllmEngine(connected(stand_in.url, own), own, stop_ids, config.generation_batch_size)
            right = engine.sync

            def sync(weights, version) -> None:
                if told is not None and train.is_main:
                    asked = sum(path == "/v1/completions" for path, _ in stand_in.calls)
                    with told.open("a") as file:
                        file.write(f"{asked} ")
                    stand_in.calls.clear()
                if version == 0 or not forgets:
                    right(weights, version)

            engine.sync = sync
            return engine

        module.open_engine = open_engine

    return change


def apart(output, step: int, model=None) -> float:
    """Largest |difference| between the log-probs a recorded iteration was sampled with and those of its old policy, or of
    another model's forward."""
    found = load_file(output / "rollouts" / f"step-{step}.safetensors")
    mask, right = found["mask"].bool(), found["logprobs"]
    if model is not None:
        right = torch.zeros_like(right)
        for row, (prompt, length, tokens) in enumerate(
            zip(found["prompts"], found["prompt_lengths"], found["tokens"], strict=True)
        ):
            ids = torch.cat([prompt[:length], tokens[mask[row]]])
            logits = model(ids[None]).logits[0, length - 1 : -1] / 0.7
            right[row][mask[row]] = logits.log_softmax(-1).gather(1, tokens[mask[row]][:, None])[:, 0].detach()
    return float((found["sampled_logprobs"] - right)[mask].abs().max())


@pytest.mark.parametrize("forgets", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["synced", "never-synced-again"])
def test_a_vllm_server_has_the_weights_of_every_iteration(world, tmp_path, forgets):
    """Its log-probs are, iteration by iteration, those that the policy gives; not where updates are kept from it."""

    said = run_it(1, world, tmp_path, "run", from_a_server(world, forgets=forgets), rollout__engine="vllm", record="true")
    assert "rollout engine vllm: " in said
    assert apart(tmp_path / "run", 1) < 1e-4
    assert all((apart(tmp_path / "run", step) > 1e-3) == forgets for step in (2, 3))


OVERLAP = {"rollout__engine": "vllm", "rollout__overlap": "true", "ppo__importance_cap": 2, "record": "true"}


def test_overlap_samples_with_the_weights_before(world, tmp_path):
    """4 greedy replies and two batches before the first update, one batch more in it; 14 replies a batch, 3 iterations."""
    told = tmp_path / "told"
    run_it(1, world, tmp_path, "run", from_a_server(world, told), **OVERLAP)
    assert told.read_text().split() == ["0", "32", "14", "0"]
    run_it(1, world, tmp_path, "plain", from_a_server(world, told), **{**OVERLAP, "rollout__overlap": "false"})
    assert told.read_text().split()[4:] == ["0", "18", "14", "14"]
    first = AutoModelForCausalLM.from_pretrained(world / "model")
    assert apart(tmp_path / "run", 1) < 1e-4
    assert apart(tmp_path / "run", 2) > 1e-3
    assert apart(tmp_path / "run", 2, first) < 1e-4
    assert apart(tmp_path / "run", 3, first) > 1e-3
    lines = metrics(tmp_path / "run")
    assert lines[0]["policy/importance_weight"] == pytest.approx(1, abs=1e-4)
    assert all(abs(line["policy/importance_weight"] - 1) > 1e-3 for line in lines[1:])


def test_overlap_resumes_to_the_bit(world, tmp_path):
    """Replies that wait for their iteration are in the checkpoint: the weights that sampled them are gone."""
    more = {**OVERLAP, "data__eval": world / "prompts.jsonl"}
    run_it(1, world, tmp_path, "whole", from_a_server(world), **more)
    for _ in range(2):
        run_it(1, world, tmp_path, "stopped", from_a_server(world), expected=143, max_hours=1e-9, **more)
    run_it(1, world, tmp_path, "stopped", from_a_server(world), **more)
    assert left(tmp_path / "stopped", 3) == left(tmp_path / "whole", 3)


@pytest.mark.slow
def test_overlap_in_two_processes(world, tmp_path):
    """Each asks for its share; what the first weights sampled is the same in the same places."""
    for processes, name in ((1, "one"), (2, "two")):
        run_it(processes, world, tmp_path, name, from_a_server(world), **OVERLAP, rollout__batch_size=7)
    for step in (1, 2):
        one, two = (load_file(tmp_path / name / "rollouts" / f"step-{step}.safetensors") for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in ("prompts", "tokens", "mask", "finished", "scores"))
        assert torch.allclose(one["sampled_logprobs"], two["sampled_logprobs"], atol=1e-5)


def test_options_that_do_not_go_together(world, tmp_path):
    from rlhf.config.parse import parse
    from rlhf.errors import ConfigError

    for more, message in (
        ({"rollout__engine": "vllm", "rollout__top_k": 5}, "top_k must be 0 and top_p 1 with engine `vllm`"),
        ({"rollout__engine": "vllm", "fp8__recipe": "block"}, "rollout.engine must be `native` or `hf`"),
        ({"rollout__server": "host:8000"}, "not the address of a server"),
        ({"replay": tmp_path / "run"}, "rollout.replay must be another run than output"),
        ({"ppo__importance_cap": 0.5}, "ppo.importance_cap"),
        ({"rollout__engine": "vllm", "rollout__overlap": "true"}, "rollout.overlap needs"),
        ({"rollout__overlap": "true", "ppo__importance_cap": 2}, "rollout.overlap needs"),
        ({"record": "true", "fp8__recipe": "block", "fp8__probe__fallback": "true"}, "rollout.record must be false"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse("ppo", flags("ppo", world, tmp_path / "run", **more))
