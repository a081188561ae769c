"""A run is new, goes on or is done by what it was made from; every single change is found and named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.load import load
from rlhf.config.parse import parse
from rlhf.config.schema import STAGES, Stage
from rlhf.digest import file_digest, tree_digest
from rlhf.errors import DataError
from rlhf.runs import lineage
from rlhf.runs.lineage import chain, fingerprint, inputs_of, state_of
from rlhf.runs.manifest import read_json, write_json


def config(stage: str, **overrides: Any) -> Stage:
    flags = [(name.replace("__", "."), str(value)) for name, value in overrides.items()]
    return load(STAGES[stage], Path(f"{stage}.yaml"), flags)


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def runs(make_run: Callable[..., None]) -> None:
    """Finished runs of all three stages."""
    for stage in ("sft", "rm", "ppo"):
        make_run(stage)


def change(file: str) -> None:
    Path(file).write_bytes(Path(file).read_bytes()[:-1] + b"!")


@pytest.mark.usefixtures("runs")
def test_the_inputs_of_every_stage() -> None:
    sft = inputs_of("sft", config("sft"))
    assert sft["model"] == {"path": "../base", "digest": tree_digest("base"), "parent": None}
    assert sft["data.train"] == {"path": "../sft.jsonl", "digest": file_digest("sft.jsonl"), "parent": None}
    ppo = inputs_of("ppo", config("ppo"))
    assert {name: entry["path"] for name, entry in ppo.items()} == {
        "actor": "../sft",
        "reward": "../rm",
        "data.train": "../prompts.jsonl",
    }
    assert ppo["actor"]["digest"] == tree_digest("sft/model")
    assert ppo["actor"]["parent"] == file_digest("sft/run.json")
    more = inputs_of("ppo", config("ppo", critic="ppo", reference="base", data__eval="pairs.jsonl"))
    assert more["critic"]["digest"] == tree_digest("ppo/critic")
    assert more["reference"]["digest"] == tree_digest("base")
    assert more["data.eval"]["digest"] == file_digest("pairs.jsonl")
    assert "critic" not in inputs_of("ppo", config("ppo", critic="zero"))


def test_rewards_that_are_functions() -> None:
    Path("reward.py").write_text("def polite(responses): ...")
    by_name = inputs_of("ppo", config("ppo", actor="base", reward="count:a"))["reward"]
    assert by_name == {"path": "count:a", "digest": None, "parent": None}
    assert inputs_of("ppo", config("ppo", actor="base", reward="pkg.mod:f"))["reward"]["digest"] is None
    polite = inputs_of("ppo", config("ppo", actor="base", reward="reward.py:polite"))["reward"]
    rude = inputs_of("ppo", config("ppo", actor="base", reward="reward.py:rude"))["reward"]
    assert polite["path"] == "../reward.py:polite"
    assert polite["digest"] != rude["digest"]
    change("reward.py")
    assert polite != inputs_of("ppo", config("ppo", actor="base", reward="reward.py:polite"))["reward"]


@pytest.mark.usefixtures("runs")
def test_each_of_several_rewards_is_an_input() -> None:
    Path("reward.py").write_text("def polite(responses): ...")
    words = ["--actor=base", "--critic=zero", "--data=prompts.jsonl", "--output=out", "--reward.sources.helpful.source=rm"]
    words += ["--reward.sources.polite.source=reward.py:polite", "--reward.sources.right.source=verify:exact"]
    found = inputs_of("ppo", parse("ppo", words).config)
    assert found["reward.sources.helpful.source"]["digest"] == tree_digest("rm/model")
    assert found["reward.sources.helpful.source"]["parent"] == file_digest("rm/run.json")
    assert found["reward.sources.right.source"] == {"path": "verify:exact", "digest": None, "parent": None}
    assert "reward" not in found
    change("reward.py")
    changed = inputs_of("ppo", parse("ppo", words).config)
    assert [name for name in found if found[name] != changed[name]] == ["reward.sources.polite.source"]


def test_a_hub_model_is_known_by_name() -> None:
    assert inputs_of("sft", config("sft", model="owner/name@main"))["model"] == {
        "path": "owner/name@main",
        "digest": None,
        "parent": None,
    }


def test_missing_inputs_are_named() -> None:
    with pytest.raises(DataError, match=r"data\.train: no file nowhere\.jsonl"):
        inputs_of("sft", config("sft", data="nowhere.jsonl"))
    with pytest.raises(DataError, match=r"data\.train: no file base \(it is a directory\)"):
        inputs_of("sft", config("sft", data="base"))
    with pytest.raises(DataError, match=r"reward\.source: no file gone\.py"):
        inputs_of("ppo", config("ppo", actor="base", reward="gone.py:f"))


@pytest.mark.usefixtures("runs")
def test_a_changed_parent_is_refused() -> None:
    change("sft/model/weights")
    with pytest.raises(DataError, match=r"actor: sft has changed since its sft run finished: model/weights\..*ppo"):
        inputs_of("ppo", config("ppo"))
    with pytest.raises(DataError, match="has changed since"):
        inputs_of("rm", config("rm", model="sft/model"))


@pytest.mark.usefixtures("runs")
def test_a_changed_critic_matters_to_those_who_read_it() -> None:
    change("ppo/critic/weights")
    inputs_of("rm", config("rm", model="ppo"))
    with pytest.raises(DataError, match=r"critic: .* critic/weights"):
        inputs_of("ppo", config("ppo", critic="ppo"))


def test_new_resumed_and_done(make_run: Callable[..., None]) -> None:
    assert state_of(Path("sft"), "sft", config("sft")) == "new"
    make_run("sft", finished=False)
    assert state_of(Path("sft"), "sft", config("sft")) == "resume"
    shutil.rmtree("sft/checkpoints")  # it never came as far as to save: there is nothing the mended data could spoil
    change("sft.jsonl")
    assert state_of(Path("sft"), "sft", config("sft", seed=1)) == "new"
    make_run("sft")
    assert state_of(Path("sft"), "sft", config("sft"), {"world_size": 1, "threads": 1}) == "done"


CHANGES = {
    "seed": ("seed: 0 -> 1", {"seed": 1}),
    "optimizer": ("optimizer.lr: 1e-05 -> 0.5", {"optimizer__lr": 0.5}),
    "data": ("contents of data.train: ", {"data": "pairs.jsonl"}),
    "held-out": ("contents of data.eval: none -> ", {"data__eval": "pairs.jsonl"}),
    "model": ("model.path: none -> a/b", {"model": "a/b"}),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("line", "overrides"), CHANGES.values(), ids=CHANGES)
def test_every_change_is_named(line: str, overrides: dict, finished: bool, make_run: Callable[..., None]) -> None:
    make_run("sft", finished)
    with pytest.raises(DataError) as caught:
        state_of(Path("sft"), "sft", config("sft", **overrides))
    assert f"\n  {line}" in str(caught.value)
    assert ("--allow-inexact-resume" in str(caught.value)) != finished
    if not finished:
        assert state_of(Path("sft"), "sft", config("sft", **overrides), allow_inexact=True) == "resume"


def test_the_machine_matters_until_the_end(make_run: Callable[..., None]) -> None:
    make_run("sft", finished=False)
    with pytest.raises(DataError, match=r"threads: 1 -> 2\n  world_size: 1 -> 4"):
        state_of(Path("sft"), "sft", config("sft"), {"world_size": 4, "threads": 2})
    recorded = read_json(Path("sft/run.json"))
    write_json(Path("sft/run.json"), recorded | {"versions": recorded["versions"] | {"torch": "1.0"}})
    with pytest.raises(DataError, match=r"versions\.torch: 1\.0 -> "):
        state_of(Path("sft"), "sft", config("sft"))
    make_run("sft")
    assert state_of(Path("sft"), "sft", config("sft"), {"world_size": 4, "threads": 2}) == "done"


def test_what_only_says_where_to_write_may_change(make_run: Callable[..., None]) -> None:
    make_run("sft")
    before = fingerprint(read_json(Path("sft/run.json")))
    shutil.copytree("sft", "elsewhere/sft")
    other = config("sft", output="elsewhere/sft", checkpoint__every=1, report__samples=0, max_hours=2)
    assert state_of(Path("elsewhere/sft"), "sft", other) == "done"
    assert not any(name.split(".")[0] in lineage.OUTPUT_FIELDS for name in before)


@pytest.mark.usefixtures("runs")
def test_a_pipeline_may_be_moved_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.rename(Path.cwd(), tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    absolute = config("ppo", output=tmp_path / "moved/ppo", actor=tmp_path / "moved/sft")
    assert state_of(Path("ppo"), "ppo", absolute) == "done"
    assert all(node.verdict == "ok" for node in chain(Path("ppo")))


@pytest.mark.usefixtures("runs")
def test_a_directory_of_something_else() -> None:
    with pytest.raises(DataError, match="holds a run of rm, not of sft"):
        state_of(Path("rm"), "sft", config("sft"))
    change("sft/model/weights")
    with pytest.raises(DataError, match="changed since this sft run finished: model/weights"):
        state_of(Path("sft"), "sft", config("sft"))
    write_json(Path("sft/run.json"), read_json(Path("sft/run.json")) | {"schema_version": 99})
    with pytest.raises(DataError, match="schema_version 99"):
        state_of(Path("sft"), "sft", config("sft"))


@pytest.mark.usefixtures("runs")
def test_the_chain_and_its_verdicts() -> None:
    actor, reward, prompts = chain(Path("ppo"))
    assert [(node.name, node.stage, node.verdict) for node in (actor, reward, prompts)] == [
        ("actor", "sft", "ok"),
        ("reward", "rm", "ok"),
        ("data.train", None, "ok"),
    ]
    assert [node.name for node in actor.inputs] == ["model", "data.train"]
    assert [node.name for node in reward.inputs[0].inputs] == ["model", "data.train"]
    change("rm/model/weights")
    Path("sft.jsonl").unlink()
    actor, reward, _ = chain(Path("ppo"))
    assert (actor.verdict, reward.verdict, actor.inputs[1].verdict) == ("ok", "changed", "missing")
