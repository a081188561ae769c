"""What an unfinished run goes on from, who says so, and what it refuses to go on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from harness import before_each_step, flags, run

from rlhf.config.parse import parse
from rlhf.digest import file_digests
from rlhf.errors import ConfigError, UsageError
from rlhf.training import checkpoint, session


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """An SFT run of 6 steps, killed after the fourth, with the checkpoints of steps 3 and 4."""
    output = tmp_path_factory.mktemp("stopped") / "sft"
    assert run("sft", six_steps(world, output), output.parent / "log", kill_at_step(4)) == -signal.SIGKILL
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-3", "step-4"]
    return output


@pytest.fixture
def unfinished(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "sft"))


def six_steps(world: Path, output: Path, **more: object) -> list[str]:
    return flags("sft", world, output, schedule__length=6, **more)


def kill_at_step(step: int):
    """Breaks the recipe so that it is killed as it begins the step."""
    return before_each_step(lambda train: train.step_done == step and signal.raise_signal(signal.SIGKILL))


def test_candidates_rule_and_winner_are_one_line(unfinished, world, tmp_path):
    assert run("sft", six_steps(world, unfinished), tmp_path / "log") == 0
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if "goes on from" in line]
    assert "checkpoints/step-4: of step-4, step-3, the highest step that verifies" in line


def test_resume_names_the_run(unfinished, world, tmp_path):
    """The config comes from the run, and what it leaves is what the whole command would have left."""
    assert run("sft", [f"--resume={unfinished}", f"--output={unfinished}"], tmp_path / "log") == 0
    whole = tmp_path / "whole"
    assert run("sft", six_steps(world, whole), tmp_path / "log") == 0
    for file in ("model/model.safetensors", "checkpoints/step-6/optimizer.safetensors"):
        assert (unfinished / file).read_bytes() == (whole / file).read_bytes()


def test_the_config_of_a_run_is_read_with_places_and_flags_over_it(stopped):
    invocation = parse("sft", [f"--resume={stopped}", "--max-hours=2"])
    assert (invocation.config.max_hours, invocation.config.schedule.length) == (2.0, 6)
    assert invocation.config_file == stopped / "run.json"
    assert invocation.resume.step is None
    assert parse("sft", [f"--resume={stopped}/checkpoints/step-3"]).resume.step == 3


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--resume=nowhere"], UsageError, "nowhere holds no run.json"),
        (["--resume=STOPPED", "--config=sft"], UsageError, "takes the config of the run; leave --config out"),
        (["--resume=STOPPED", "--output=elsewhere"], ConfigError, "STOPPED and output elsewhere are two places"),
        (["--resume=STOPPED/checkpoints/step-x"], UsageError, "holds no run.json"),
        (["--resume=STOPPED/checkpoints/step-5"], UsageError, "no such checkpoint; there is step-3, step-4"),
        (["--resume"], UsageError, "the value is missing; expected RUN"),
    ],
)
def test_two_wills_are_refused(words, error, message, stopped):
    with pytest.raises(error) as caught:
        parse("sft", [word.replace("STOPPED", str(stopped)) for word in words])
    assert message.replace("STOPPED", str(stopped)) in str(caught.value)


@pytest.mark.parametrize(("step", "found"), [(3, "step-4")])
def test_a_named_checkpoint_that_is_not_the_newest_is_refused(step, found, unfinished, tmp_path):
    log = tmp_path / "log"
    arguments = [f"--resume={unfinished}/checkpoints/step-{step}", f"--output={unfinished}"]
    assert run("sft", arguments, log) == 65
    assert f"step-{step} was named to go on from" in log.read_text()
    assert f"checkpoints/{found} is the newest that verifies" in log.read_text()
    assert sorted(path.name for path in (unfinished / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_the_named_checkpoint_goes_on(unfinished, tmp_path):
    arguments = [f"--resume={unfinished}/checkpoints/step-4", f"--output={unfinished}"]
    assert run("sft", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_another_seed_is_refused(unfinished, world, tmp_path):
    assert run("sft", [*six_steps(world, unfinished), "--seed=1"], tmp_path / "log") == 65
    assert "seed: 0 -> 1" in (tmp_path / "log").read_text()


def test_another_tokenizer_under_the_same_name_is_refused(unfinished, world, tmp_path):
    """As a Hub model whose tokenizer was mended: the digest of a directory would not see it."""
    log = tmp_path / "log"

    def other_template(module) -> None:
        right = session.tokenizer_digests
        session.tokenizer_digests = lambda tokenizer: right(tokenizer) | {"template": "0" * 64}

    assert run("sft", six_steps(world, unfinished), log, other_template) == 65
    assert "template: " in log.read_text()
    assert "-> 000000000000" in log.read_text()
    assert run("sft", [*six_steps(world, unfinished), "--allow-inexact-resume"], log, other_template) == 0
    (changes,) = json.loads((unfinished / "run.json").read_text())["inexact_resumes"]
    assert changes[0].endswith("-> 000000000000")


@pytest.mark.parametrize(
    ("name", "recorded"),
    [("device", "cuda NVIDIA H100"), ("engine", "DeepSpeed ZeRO-2"), ("world_size", 2), ("versions.accelerate", "1.0.0")],
)
def test_another_machine_is_refused(name, recorded, unfinished, world, tmp_path):
    """In all that the last bits hang on, the run was begun elsewhere."""
    manifest = json.loads((unfinished / "run.json").read_text())
    place, _, key = name.rpartition(".")
    (manifest[place] if place else manifest)[key] = recorded
    (unfinished / "run.json").write_text(json.dumps(manifest))
    assert run("sft", six_steps(world, unfinished), tmp_path / "log") == 65
    assert f"\n  {name}: {recorded} -> " in (tmp_path / "log").read_text()
    assert run("sft", [*six_steps(world, unfinished), "--allow-inexact-resume"], tmp_path / "log") == 0
    assert json.loads((unfinished / "run.json").read_text())["inexact_resumes"][0][0].startswith(f"{name}: {recorded} -> ")


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_metrics_repeat_no_step(stage, world, tmp_path):
    """Steps written after the last checkpoint are cut away and written again."""
    log, output = tmp_path / "log", tmp_path / stage
    arguments = flags(stage, world, output, schedule__length=6, checkpoint__every=4)
    assert run(stage, arguments, log, kill_at_step(5)) == -signal.SIGKILL
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tokens" in line] == [1, 2, 3, 4, 5]
    assert run(stage, arguments, log) == 0, log.read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "tokens" in line] == [1, 2, 3, 4, 5, 6]


def test_a_changed_parent_is_refused(world, tmp_path):
    log, sft, rm = tmp_path / "log", tmp_path / "sft", tmp_path / "rm"
    assert run("sft", flags("sft", world, sft, schedule__length=1), log) == 0
    arguments = flags("rm", world, rm, model=sft)
    assert run("rm", arguments, log, kill_at_step(2)) == -signal.SIGKILL
    weights = sft / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert run("rm", arguments, log) == 65
    assert "has changed since its sft run finished: model/model.safetensors" in log.read_text()


def test_half_a_character_at_the_end_of_a_record(unfinished, world, tmp_path):
    """As a kill or a full disk leaves it: an unfinished line is no line."""
    whole = (unfinished / "metrics.jsonl").read_bytes()
    (unfinished / "metrics.jsonl").write_bytes(whole + '{"step": 5, "prompt": "\N{HIRAGANA LETTER A}'.encode()[:-1])
    assert run("sft", six_steps(world, unfinished), tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_the_leftover_of_a_first_save_is_nothing_to_go_on_from(unfinished, world, tmp_path):
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "checkpoints" / ".tmp-step-1-99").mkdir(parents=True)
    arguments = six_steps(world, unfinished, optimizer__lr=1e-4)
    assert run("sft", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_a_disk_that_cannot_be_read_retires_no_checkpoint(unfinished, monkeypatch):
    def away(path: Path, **_: object) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        with pytest.raises(OSError, match="Stale file handle"):
            checkpoint.latest(unfinished / "checkpoints", lambda text: None)
    assert sorted(path.name for path in (unfinished / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_old_checkpoints_that_cannot_be_removed_end_nothing(world, tmp_path):
    """NFS keeps `.nfs*` files in a directory while somebody reads them."""

    def busy(module) -> None:
        checkpoint.shutil.rmtree = lambda path, ignore_errors=False: None if ignore_errors else os.rmdir(path)

    log = tmp_path / "log"
    assert run("sft", six_steps(world, tmp_path / "sft"), log, busy) == 0, log.read_text()


@pytest.mark.parametrize("name", ["model", "checkpoints", "metrics.jsonl"])
def test_what_no_run_made_is_not_replaced(name, world, tmp_path):
    """The output is the directory that the model to train lies in."""
    log, output = tmp_path / "log", tmp_path / "mine"
    shutil.copytree(world / "model", output / name)
    before = file_digests(output)
    more = {"model": output / "model"} if name == "model" else {}
    assert run("sft", six_steps(world, output, **more), log) == 65
    assert f"{output / name}: no run of ours made it" in log.read_text()
    assert {name: digest for name, digest in file_digests(output).items() if not name.startswith(".")} == before


def test_a_run_of_another_stage_is_said_to_be_one(unfinished):
    with pytest.raises(UsageError, match=f"is a run of sft: rlhf sft --resume {unfinished}"):
        parse("rm", [f"--resume={unfinished}"])


def test_a_run_that_is_called_like_a_checkpoint(unfinished):
    place = unfinished.rename(unfinished.with_name("step-3"))
    assert parse("sft", [f"--resume={place}", f"--output={place}"]).resume.step is None


def test_processes_are_asked_for_as_before(unfinished, world, tmp_path):
    manifest = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(manifest | {"world_size": 4}))
    assert run("sft", six_steps(world, unfinished), tmp_path / "log") == 65
    assert "start it with --nproc 4 as before" in (tmp_path / "log").read_text()
