"""`rlhf report`: what the page holds, that it holds nothing else, and what is left where a run lacks something."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from harness import before_each_step, flags
from harness import run as run_stage

from rlhf.commands.report import run
from rlhf.errors import DataError, OutputError
from rlhf.report.html.gather import gather
from rlhf.report.html.verdict import Finding

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Names of elements, and every address that a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action") and value]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def page_of(place: Path) -> Elements:
    assert run([str(place)]) == 0
    return Elements((place / "report.html").read_text())


def test_a_pipeline(place):
    page = page_of(place)
    assert [at for at in page.addresses if at.startswith("#")] == ["#sft-1", "#rm-2", "#ppo-3"]
    for said in ("KL from the reference", "Clipped tokens", "Calibration", "The same prompts, before and after", "rollout"):
        assert said in page.text
    accuracy = json.loads((place / "rm" / "run.json").read_text())["result"]["eval/accuracy"]
    assert f"right on {accuracy:.1%}" in page.text
    first = json.loads((place / "ppo" / "samples.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in page.text
    assert not list(place.glob(".report*"))


def test_the_command_of_a_recipe_and_of_a_copy(place):
    page = page_of(place / "ppo")
    recorded = json.loads((place / "ppo" / "run.json").read_text())
    assert "To run it again" in page.text
    for word in recorded["command"][1:]:
        assert word in page.text
    recorded["command"] = ["stages/ppo.py", "--reward=https://me:hunter22@host/x", "--a=b c"]
    (place / "ppo" / "run.json").write_text(json.dumps(recorded))
    text = page_of(place / "ppo").text
    assert "rlhf ppo \\\n  --reward=https://***@host/x \\\n  '--a=b c'" in text
    assert "hunter22" not in text
    recorded |= {"command": ["stages/ppo.py", "--seed", "1"], "launch": "--launch fsdp --nproc 2", "world_size": 2}
    (place / "ppo" / "run.json").write_text(json.dumps(recorded))
    assert "rlhf ppo \\\n  --seed 1 \\\n  --launch fsdp \\\n  --nproc 2" in page_of(place / "ppo").text
    recorded["command"][0] = "my/ppo_copy.py"
    for processes, first in ((1, "python my/ppo_copy.py"), (2, "accelerate launch --num_processes=2 my/ppo_copy.py")):
        (place / "ppo" / "run.json").write_text(json.dumps(recorded | {"world_size": processes}))
        assert first in page_of(place / "ppo").text


def test_no_file_of_anybody_is_written_over(place, capsys):
    record = (place / "ppo" / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="is no report"):
        run([str(place / "ppo"), "--output", str(place / "ppo" / "metrics.jsonl")])
    assert (place / "ppo" / "metrics.jsonl").read_bytes() == record
    for _ in range(2):  # a report takes the place of one
        assert run([str(place / "ppo"), "--output", str(place)]) == 0
    assert (place / "report.html").is_file()


def test_a_run_json_of_others_is_passed_over(place, capsys):
    (place / "other").mkdir()
    (place / "other" / "run.json").write_text('{"x": 1}')
    (place / "another").mkdir()
    (place / "another" / "status.json").write_text('{"state": "up"}')
    assert run([str(place)]) == 0


def test_nothing_is_fetched_and_nothing_is_run(place):
    page = page_of(place)
    assert all(at.startswith(("#", "data:")) for at in page.addresses)
    assert "script" not in page.names
    assert not re.search(r"url\(|@import", (place / "report.html").read_text())


def test_text_of_others_is_text(place):
    record = {"step": 9, "prompt": HOSTILE, "response": HOSTILE, "scores": {HOSTILE: 1.0, "score": 1.0}}
    with (place / "ppo" / "samples.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    page = page_of(place)
    assert page.text.count(HOSTILE) == 3
    assert "script" not in page.names
    assert "img" not in page.names
    assert "script" in Elements(HOSTILE).names  # the check would see one


def test_a_run_that_failed_early(place):
    ppo = place / "ppo"
    manifest = json.loads((ppo / "run.json").read_text())
    (ppo / "run.json").write_text(json.dumps(manifest | {"finished": None, "result": {}, "outputs": {}, "files": {}}))
    status = json.loads((ppo / "status.json").read_text())
    (ppo / "status.json").write_text(json.dumps(status | {"state": "failed", "reason": "a <b> too many"}))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (ppo / name).unlink()
    page = page_of(ppo)
    assert "The run failed: a <b> too many" in page.text
    assert "No step was recorded" in page.text
    (ppo / "run.json").unlink()
    assert "The run failed" in page_of(ppo).text


def test_a_stage_that_never_began_is_not_hidden(place):
    """Of a pipeline whose last stage failed before its run.json."""
    assert "ppo: done" in page_of(place).text
    (place / "ppo" / "run.json").unlink()
    status = json.loads((place / "ppo" / "status.json").read_text())
    (place / "ppo" / "status.json").write_text(json.dumps(status | {"state": "failed", "reason": "no such model"}))
    page = page_of(place)
    assert "Something is wrong" in page.text
    assert "The run failed: no such model" in page.text
    assert page.addresses[-3:] == ["#sft-1", "#rm-2", "#ppo-3"]


def test_a_real_failure(world, tmp_path):
    """The third step dies; what was known until then is on the page."""

    def die(train):
        if train.step_done == 2:
            raise DataError("prompts.jsonl:3: <no> text")

    log = tmp_path / "log"
    assert run_stage("ppo", flags("ppo", world, tmp_path / "run"), log, before_each_step(die)) == DataError.exit_code
    text = page_of(tmp_path / "run").text
    assert "The run failed: prompts.jsonl:3: <no> text" in text
    assert "Curves" in text
    assert "To run it again" in text


def test_half_a_character(place):
    with (place / "ppo" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "prompt": "p", "response": "\ud83d half", "scores": {}}) + "\n")
    assert "\\ud83d half" in page_of(place / "ppo").text


@pytest.mark.parametrize("line", ["loss 1.0", "[1]", "{}"])
def test_a_garbled_line_is_named(place, line):
    lines = (place / "ppo" / "metrics.jsonl").read_text().splitlines()
    (place / "ppo" / "metrics.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        run([str(place / "ppo")])


@pytest.mark.parametrize(("stage", "said"), [("dpo", "Accuracy"), ("kto", "right on"), ("grpo", "Scores of the rollouts")])
def test_the_other_stages(stage, said, world, tmp_path):
    more = {"rollout__record": "true"} if stage == "grpo" else {}
    log = tmp_path / "log"
    assert run_stage(stage, flags(stage, world, tmp_path / "run", **more), log) == 0, log.read_text()
    assert said in page_of(tmp_path / "run").text


def test_a_reply_without_a_score(place):
    with (place / "ppo" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "prompt": "p", "response": "r", "scores": {"score": None}}) + "\n")
    assert "score none" in page_of(place / "ppo").text


def test_what_changed_is_said(place):
    (place / "rm" / "model" / "config.json").write_text("{}")
    assert "Changed since the run finished: model/config.json" in page_of(place / "rm").text
    assert "Changed since" not in page_of(place / "sft").text


def test_a_picture_of_the_run_is_embedded(place):
    (place / "sft" / "heatmap.png").write_bytes(b"\x89PNG")
    assert "data:image/png;base64,iVBORw==" in page_of(place / "sft").addresses


def test_json_and_another_file(place, capsys):
    target = place / "other.html"
    assert run([str(place / "sft"), "--output", str(target), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == str(target)
    assert [(one["stage"], one["state"]) for one in told["runs"]] == [("sft", "done")]
    assert target.is_file()
    assert not (place / "sft" / "report.html").exists()


def test_no_run_and_no_place(place, tmp_path):
    with pytest.raises(DataError, match="no run"):
        run([str(tmp_path / "nothing")])
    with pytest.raises(OutputError, match="cannot be written"):
        run([str(place), "--output", str(tmp_path / "no" / "x.html")])


def test_a_pipeline_is_told_by_what_weighs_most(place):
    end, good, bad, worse = (Finding(*words) for words in (("good", "E"), ("good", "G"), ("bad", "B"), ("bad", "W")))
    page = gather(place / "ppo")
    for level, findings, told in (
        ("bad", [end, good, bad, worse], "B And 1 more, below."),
        ("bad", [end, good, bad], "B"),
        ("good", [end], "E"),
    ):
        assert replace(page, level=level, findings=findings).headline == told
