"""`rlhf runs list|show|rm` on runs of the stand-ins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.commands.runs import run
from rlhf.errors import DataError, Locked, UsageError
from rlhf.runs.lock import run_lock


@pytest.fixture(autouse=True)
def runs(make_run: Callable[..., None]) -> None:
    for stage in ("sft", "rm", "ppo"):
        make_run(stage)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[str, str]]:
    return [(one["run"], one["state"]) for one in json.loads(told(capsys, "list", ".", "--json", *arguments))]


def test_runs_are_listed_oldest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys) == [("sft", "done"), ("rm", "done"), ("ppo", "done")]
    assert listed(capsys, "--stage", "rm") == [("rm", "done")]
    assert listed(capsys, "--state", "failed") == []
    line = next(line for line in told(capsys, "list", ".").splitlines() if line.split()[:2] == ["rm", "rm"])
    assert line.split()[2] == "done"
    assert "0.9" in line
    assert "no such run" in told(capsys, "list", ".", "--state", "failed")


def test_show_is_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "show", "ppo").startswith("ppo  ppo, done in ")


def test_what_others_were_made_from_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"made from it: .*ppo.*rm.*--force"):
        run(["rm", "sft"])
    assert Path("sft/run.json").is_file()
    told(capsys, "rm", "ppo")  # nothing was made from it
    assert not Path("ppo").exists()
    told(capsys, "rm", "sft", "--force")
    assert listed(capsys) == [("rm", "done")]


def test_a_run_in_progress_stays() -> None:
    with run_lock(Path("ppo")), pytest.raises(Locked):
        run(["rm", "ppo", "--force"])
    assert Path("ppo/run.json").is_file()


def test_one_that_was_killed_goes_by_force(make_run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    status = json.loads(Path("ppo/status.json").read_text())
    Path("ppo/status.json").write_text(json.dumps(status | {"state": "running"}))
    with pytest.raises(DataError, match="says that it is running"):
        run(["rm", "ppo"])
    told(capsys, "rm", "ppo", "--force")
    assert not Path("ppo").exists()


@pytest.mark.parametrize("name", ["base", ".", "link", "other", "nothing", "sft.jsonl"])
def test_what_is_no_run_stays(name: str) -> None:
    Path("link").symlink_to("ppo")
    Path("other").mkdir()
    Path("other/run.json").write_text('{"some": "other tool"}')
    before = sorted(Path().rglob("*"))
    with pytest.raises(DataError, match=r"not a run|not the manifest"):
        run(["rm", name, "--force"])
    assert sorted(Path().rglob("*")) == before


def test_one_named_like_a_part_of_a_run_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ppo").rename("critic")
    assert ("critic", "done") in listed(capsys)
    with pytest.raises(DataError, match=r"made from it: .*critic"):
        run(["rm", "sft"])


def test_the_one_that_stands_in_it_is_gone_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("ppo")
    told(capsys, "rm", ".")
    monkeypatch.chdir("..")
    assert not Path("ppo").exists()


def test_a_killed_one_and_one_that_never_began_are_listed_so(capsys: pytest.CaptureFixture[str]) -> None:
    manifest, status = (json.loads(Path("ppo", name).read_text()) for name in ("run.json", "status.json"))
    Path("ppo/run.json").write_text(json.dumps(manifest | {"finished": None}))
    Path("ppo/status.json").write_text(json.dumps(status | {"state": "running"}))
    Path("early").mkdir()
    Path("early/status.json").write_text(json.dumps(status | {"state": "failed"}))
    Path("status.json").write_text("[]")  # of some other tool
    assert listed(capsys, "--state", "failed") == [("early", "failed")]
    assert listed(capsys, "--state", "killed") == [("ppo", "killed")]
    with run_lock(Path("ppo")):
        assert listed(capsys, "--state", "running") == [("ppo", "running")]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("status.json", {"time": "yesterday"}),
        ("status.json", {"time": "2026-01-01T00:00:00"}),  # without a zone it has no order beside ours
        ("status.json", {"time": 5}),
        ("status.json", {"state": None}),
        ("status.json", {"state": ["done"]}),
        ("run.json", {"started": "x"}),
        ("run.json", {"started": "2026-01-01T00:00:00"}),
        ("run.json", {"finished": True}),
        ("run.json", {"stage": None}),
        ("run.json", {"inputs": []}),
        ("run.json", {"result": 1}),
    ],
)
def test_a_file_of_ours_by_name_only_is_passed_over(name: str, changed: dict, capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd").mkdir()
    Path("odd", name).write_text(Path("ppo", name).read_text())
    assert ("odd", "done") in listed(capsys)
    Path("odd", name).write_text(json.dumps(json.loads(Path("odd", name).read_text()) | changed))
    assert listed(capsys) == [("sft", "done"), ("rm", "done"), ("ppo", "done")]


def test_a_run_whose_status_is_odd_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads(Path("ppo/run.json").read_text())
    Path("ppo/run.json").write_text(json.dumps(manifest | {"finished": None, "result": {"after": {"score": "high"}}}))
    Path("ppo/status.json").write_text('{"state": null}')
    assert ("ppo", "unknown") in listed(capsys)
    with pytest.raises(DataError, match=r"status.json: not the status of a run of ours"):
        run(["show", "ppo"])


def test_a_place_is_never_cut_short_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-run-of-a-rather-long-name" * 5
    Path("ppo").rename(name)
    assert name in told(capsys, "list", ".")


def test_a_run_that_holds_another_stays() -> None:
    Path("ppo").rename("sft/ppo")
    with pytest.raises(DataError, match="holds another run"):
        run(["rm", "sft", "--force"])


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="expected list, show or rm"):
        run(["remove", "sft"])
    with pytest.raises(DataError, match="no such directory"):
        run(["list", "nowhere"])
