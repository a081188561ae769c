"""Whole runs of PPO whose reward is a function that fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from harness import flags, metrics, run, start_on, wait

ROOM_S = 5
"""What a deadline may be missed by."""

pytestmark = pytest.mark.usefixtures("started")


def ppo_flags(world: Path, output: Path, **more: object) -> list[str]:
    return flags("ppo", world, output, **{"schedule__length": 2, "data__eval": "null", **more})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_after_a_failed_try(world, tmp_path, processes):
    """And ends equal to the bit to one whose function never fails, and to one that counts by itself."""
    counts = "def f(responses):\n    return [response.split().count('a') for response in responses]\n"
    (tmp_path / "counts.py").write_text(counts)
    flaky = "import os\nfrom pathlib import Path\nplace = Path(__file__).with_name('tried' + os.environ.get('RANK', '0'))\n"
    flaky += counts.replace("\n", "\n    if not place.exists():\n        place.touch()\n        os._exit(9)\n", 1)
    (tmp_path / "flaky.py").write_text(flaky)
    sources = {"a": "count:a", "b": f"{tmp_path}/counts.py:f", "c": f"{tmp_path}/flaky.py:f"}
    for name, source in sources.items():
        arguments = ppo_flags(world, tmp_path / name, reward=source, data__eval=world / "prompts.jsonl")
        arguments.append(f"--eval.scorers={tmp_path}/counts.py:f")
        codes = [wait(pid) for pid in start_on(processes, "ppo", arguments, tmp_path / "log")]
        assert codes == [0] * processes, (tmp_path / "log").read_text()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") == metrics(tmp_path / "c")
    assert len(list(tmp_path.glob("tried*"))) == processes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("time.sleep(1000)", "gave no answer within 2 s"),
        ("return [1.0] + ['2'] * (len(responses) - 1)", "the score of reply 1 is '2'"),
        ("os._exit(3)", "exit code 3"),
    ],
    ids=["hangs", "text", "dies"],
)
def test_a_run_ends_with_a_word(world, tmp_path, processes, body, reason):
    (tmp_path / "mine.py").write_text(f"import os, time\ndef f(responses):\n    {body}\n")
    source = f"{tmp_path}/mine.py:f"
    arguments = ppo_flags(world, tmp_path / "run", reward=source, reward__timeout_s=2, reward__retries=1)
    start = time.monotonic()
    codes = [wait(pid) for pid in start_on(processes, "ppo", arguments, tmp_path / "log")]
    assert time.monotonic() - start < 2 * 2 + ROOM_S + 30  # the models are opened first
    assert 65 in codes
    assert set(codes) <= {65, 74}  # who waits for the one that fails loses it
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)
    assert reason in status["reason"]
    assert reason in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_mistake_ends_the_run_before_models_are_opened(world, tmp_path):
    (tmp_path / "mine.py").write_text("def f(answers): ...\n")

    def change(stage) -> None:
        stage.open_ppo = None

    for source in (f"{tmp_path}/mine.py:nothing", f"{tmp_path}/mine.py:f"):
        arguments = ppo_flags(world, tmp_path / "run", reward=source)
        assert run("ppo", arguments, tmp_path / "log", change) == 65, (tmp_path / "log").read_text()
    arguments = [*ppo_flags(world, tmp_path / "run"), f"--eval.scorers={tmp_path}/mine.py:nothing"]
    assert run("ppo", arguments, tmp_path / "log", change) == 65, (tmp_path / "log").read_text()


@pytest.mark.slow
def test_more_patience_is_no_other_run(world, tmp_path):
    """A run whose function took too long goes on with a later deadline."""
    text = "import time\nfrom pathlib import Path\ncalls = 0\n\ndef f(responses):\n    global calls\n    calls += 1\n"
    text += "    time.sleep(4 * (calls == 2))\n    return [len(response) for response in responses]\n"
    (tmp_path / "slow.py").write_text(text)
    arguments = ppo_flags(world, tmp_path / "run", reward=f"{tmp_path}/slow.py:f", reward__retries=0)
    assert run("ppo", [*arguments, "--reward.timeout_s=2"], tmp_path / "log") == 65
    assert "gave no answer within 2 s" in (tmp_path / "log").read_text()
    assert run("ppo", [*arguments, "--reward.timeout_s=30"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
