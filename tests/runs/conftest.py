"""A place to work in where the stages are stand-ins (stand_in.py), for tests of everything around them."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from rlhf import paths

STAND_IN = Path(__file__).with_name("stand_in.py")

CONFIGS = {
    "sft.yaml": "output: sft\nthreads: 1\nmodel: {path: base}\ndata: {train: sft.jsonl}\n",
    "rm.yaml": "output: rm\nthreads: 1\nmodel: {path: sft}\ndata: {train: pairs.jsonl}\n",
    "ppo.yaml": "output: ppo\nthreads: 1\nroles: {actor: sft}\nreward: {source: rm}\ndata: {train: prompts.jsonl}\n",
}


ROWS = {
    "sft": {"prompt": "a", "completion": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompts": {"prompt": "a"},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a base model, data, and a config for each stage."""
    stages = tmp_path / "stages"
    stages.mkdir()
    for stage in ("sft", "rm", "ppo"):
        shutil.copyfile(STAND_IN, stages / f"{stage}.py")
    monkeypatch.setattr(paths, "STAGES", stages)
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    for name in ("FAULT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    place = tmp_path / "place"
    (place / "base").mkdir(parents=True)
    (place / "base" / "config.json").write_text("{}")
    for name, row in ROWS.items():
        (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for name, text in CONFIGS.items():
        (place / name).write_text(text)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the stages fail or, with an empty text, work."""
    return lambda name: monkeypatch.setenv("FAULT", name)


@pytest.fixture
def make_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a stage's stand-in in this process: `finished` or stopped short."""

    def run(stage: str, finished: bool = True) -> None:
        monkeypatch.setenv("FAULT", "" if finished else "exit")
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", "--config", f"{stage}.yaml"])
        with suppress(SystemExit):
            runpy.run_path(str(paths.STAGES / f"{stage}.py"), run_name="__main__")
        monkeypatch.setenv("FAULT", "")

    return run
