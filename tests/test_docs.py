"""What README and docs say is so: commands run, defaults are the schema's, shipped configs load."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf import cli, errors
from rlhf.cli import main
from rlhf.commands import convert
from rlhf.config.fields import leaves
from rlhf.config.parse import SCHEMAS, parse
from rlhf.config.schema import DpoConfig, PpoConfig, Section
from rlhf.paths import CONFIGS, STAGES
from rlhf.runs.manifest import read_status

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A directory with the model and the files README's commands name."""
    from rlhf.training.tiny import write_tiny_model

    write_tiny_model(tmp_path, seed=0)
    (tmp_path / "model").rename(tmp_path / "my-model")
    for name, row in {
        "chats": {"prompt": "a b", "completion": "c"},
        "pairs": {"prompt": "a b", "chosen": "c", "rejected": "d"},
        "rated": {"prompt": "a b", "completion": "c", "label": True},
        "prompts": {"prompt": "a b"},
        "documents": {"text": "a b c d"},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run(command, user):
    before = sorted(path.name for path in user.rglob("*"))
    words = command.split()
    assert words[0] == "rlhf"
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in user.rglob("*")) == before  # a dry run touches nothing; the unit test cleans up


@pytest.mark.parametrize("command", re.findall(r"^ {4}rlhf ((?:generate|eval|score) .*)", README, re.M))
def test_other_commands_parse(command):
    name, *words = command.split()
    assert parse(name, words).config


@pytest.mark.parametrize("command", re.findall(r"^ {4}rlhf (ppo .*)", (ROOT / "docs" / "rollouts.md").read_text(), re.M))
def test_commands_of_rollouts_parse(command):
    stage, *words = command.split()
    config = parse(stage, words).config
    assert config.rollout.engine == "vllm" or config.rollout.record or config.rollout.replay


def test_the_vllm_server_is_started_as_trl_does():
    """Of what TRL adds to the command, all but the limit on how many log-probabilities may be asked for: one is."""
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    command = re.search(r"^ {4}VLLM_SERVER_DEV_MODE=1 vllm serve (.*)", (ROOT / "docs" / "rollouts.md").read_text(), re.M)
    assert command is not None
    model, *words = shlex.split(command[1])
    imposed = build_command(ScriptArguments(model=model))
    imposed = imposed[imposed.index("--weight-transfer-config") :]
    assert [*words, "--max-logprobs", "-1"] == imposed


@pytest.mark.parametrize("command", re.findall(r"^ {4}rlhf (.*)", (ROOT / "docs" / "launching.md").read_text(), re.M))
def test_launching_commands_are_planned(command, user, capsys):
    """As far as they can be without the machines: a command for each is printed."""
    assert main([*command.split(), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["commands"]
    assert len(planned) == (2 if "--num-machines 2" in command else 1)
    assert len(set(planned)) == len(planned)


def at_test_size(command: str, user: Path, port: int) -> list[str]:
    """One optimizer step, two processes, this machine."""
    words = (
        re.sub(r"--nproc \d+", "--nproc 2", command).replace("/shared/", f"{user}/").replace("node0:29500", f"127.0.0.1:{port}")
    )
    stage = "ppo" if "--actor" in command else "sft"
    small = ["--threads=1", "--schedule.unit=steps", "--schedule.length=1"]
    small += ["--rollout.max_new_tokens=4", "--rollout.batch_size=4", "--ppo.minibatch_size=4"] if stage == "ppo" else []
    if words.startswith("rlhf"):
        return [sys.executable, "-m", *words.split(), *small]
    launcher = words.replace("accelerate launch", "-m accelerate.commands.launch").replace("stages/", f"{STAGES}/")
    return [sys.executable, *launcher.replace("configs/launch", str(CONFIGS / "launch")).split(), *small]


@pytest.mark.slow
def test_launching_commands_run(user):
    """From one process to two machines (here two launchers on one host), each as the page has it but for its size."""
    page = (ROOT / "docs" / "launching.md").read_text()
    commands = re.findall(r"^ {4}((?:rlhf|accelerate launch) .*)", page, re.M)
    alone = [command for command in commands if "--num-machines" not in command]
    together = [command for command in commands if command not in alone]
    assert len(alone) >= 7
    assert len(together) == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for started in [*([command] for command in alone), together]:
        at_once = [
            subprocess.Popen(at_test_size(command, user, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in started
        ]
        said = [process.communicate(timeout=300)[0] for process in at_once]
        assert [process.returncode for process in at_once] == [0] * len(at_once), said
    runs = [re.search(r"--output (\S+)", command)[1].replace("/shared/", "") for command in commands]  # pyright: ignore
    assert {read_status(user / run)["state"] for run in runs} == {"done"}  # pyright: ignore[reportOptionalSubscript]


def test_readme_has_commands():
    assert len(COMMANDS) >= 4
    assert "make demo" in README
    assert "make test" in README


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_and_its_python(tmp_path, monkeypatch):
    """README's Python lines answer a prompt with what a (shortened) quickstart leaves."""
    monkeypatch.chdir(tmp_path)
    short = ["--sft.schedule.length", "60", "--rm.schedule.length", "10", "--ppo.schedule.length", "3"]
    subprocess.run([sys.executable, "-m", "rlhf", "run", "quickstart", *short], check=True, timeout=900)
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    again = subprocess.run(
        [sys.executable, "-m", "rlhf", "run", "quickstart", *short], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0
    assert "done, kept" in again.stdout + again.stderr


@pytest.mark.parametrize(("page", "config", "count"), [("ppo", PpoConfig, 15), ("dpo", DpoConfig, 5)])
def test_defaults_in_the_docs_are_the_schemas(page, config, count):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    rows = re.findall(r"^\| ([a-z_]+)\.([a-z_]+) \| ([^|]+) \|", text, re.M)
    assert len(rows) >= count
    for section, field, stated in rows:
        part = config.model_fields[section].annotation
        assert part is not None
        assert stated.strip() == str(part.model_fields[field].default), f"{section}.{field}"


FLAGS = {
    "sft": ["--model=m", "--data=d.jsonl"],
    "rm": ["--model=m", "--data=d.jsonl"],
    "dpo": ["--model=m", "--data=d.jsonl"],
    "kto": ["--model=m", "--data=d.jsonl"],
    "ppo": ["--actor=m", "--reward=count:a", "--data=d.jsonl"],
    "grpo": ["--actor=m", "--reward=count:a", "--data=d.jsonl"],
}


def test_the_table_of_faults():
    """Each has its line, and the tests it names are there; each exit code has its own."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert re.findall(r"^\| (T\d+) \|", page, re.M) == [f"T{number}" for number in range(1, 23)]
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    assert not sorted(name for name in named if not (ROOT / name).is_file())
    listed = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.M) for code in row.split(", ")}
    ours = {error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)}
    assert listed == ours | {0, 70, 130, 143}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_load(file):
    if file.parent.name == "launch":
        assert yaml.safe_load(file.read_text())["compute_environment"] == "LOCAL_MACHINE"
    elif file.stem != "pipeline":
        stage = "ppo" if file.stem == "unit-test" else file.stem
        assert parse(stage, [f"--config={file}", *FLAGS[stage]]).config.output


def test_every_field_is_described():
    def fields(model: type[Section]):
        for name, field in model.model_fields.items():
            nested = field.annotation
            if isinstance(nested, type) and issubclass(nested, Section):
                yield from fields(nested)
            else:
                yield f"{model.__name__}.{name}", field.description

    missing = [name for schema in SCHEMAS.values() for name, text in fields(schema) if not text]
    assert not missing


MOVING = (ROOT / "docs" / "moving.md").read_text()
HERE = [row.split("|")[2] for row in MOVING.splitlines() if row.startswith("| ") and not row.startswith("|---")]


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`", " ".join(HERE))) - {"metrics.jsonl"})
)
def test_what_users_move_to_is_a_field(name):
    assert any(name in leaves(schema) for schema in SCHEMAS.values())


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`?(--[a-z_-]+)", " ".join(HERE)))))
def test_what_users_move_to_is_a_flag(flag, capsys):
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    ppo = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    assert flag in ppo + capsys.readouterr().out + cli.HELP + convert.USAGE


STAND_INS = {
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "scontrol": 'case $1 in show) printf "node0\\nnode1\\n";; *) echo "$@" >> "$CALLS";; esac',
    "rlhf": 'exec "$PYTHON" -m rlhf "$@"',
}


def slurm_job(user: Path, stand_ins: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Slurm's commands are played; what they start is real."""
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs" / "launching.md").read_text(), re.S)
    assert script is not None
    (user / "job.sh").write_text(script[1])
    for name, body in stand_ins.items():
        (user / name).write_text(f"#!/bin/bash\n{body}\n")
        (user / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    ours = {"PATH": f"{user}:{os.environ['PATH']}", "CALLS": str(user / "calls"), "PYTHON": sys.executable}
    command = ["bash", str(user / "job.sh"), *words]
    return subprocess.run(command, env=os.environ | slurm | ours, capture_output=True, text=True)


def test_the_slurm_job_is_planned_on_both_machines(user):
    done = slurm_job(user, STAND_INS, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert {rank: done.stdout.count(f"--machine_rank {rank}") > 0 for rank in (0, 1)} == {0: True, 1: True}
    assert "node0" in done.stdout
    assert not (user / "calls").exists()


def test_the_slurm_job_is_requeued_when_its_time_is_up(user):
    assert slurm_job(user, STAND_INS | {"srun": "exit 143"}).returncode == 143
    assert (user / "calls").read_text() == "requeue 7\n"


def test_commands_of_the_data_page_run(user):
    """In their order: what one writes is there for the next, and nothing is written twice."""
    many = "".join(json.dumps({"prompt": f"a b {'c ' * count}", "completion": "d"}) + "\n" for count in range(20))
    (user / "chats.jsonl").write_text(many)
    commands = re.findall(r"^ {4}rlhf (data .*)", (ROOT / "docs" / "data.md").read_text(), re.M)
    assert {command.split()[1] for command in commands} == {"check", "preview", "split", "clean"}
    for command in commands:
        assert main(command.split()) == 0, command


def test_commands_of_the_evaluation_page_run(user, monkeypatch):
    """In their order, on the judge of the page."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    commands = re.findall(r"^ {4}rlhf ((?:eval|score) .*)", page, re.M)
    assert len(commands) == 11
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code is not None
    (user / "judge.py").write_text(code[1])
    (user / "length.py").write_text("def words(responses):\n    return [len(response.split()) for response in responses]\n")
    (user / "my-model").rename(user / "base-model")
    shutil.copytree(user / "base-model", user / "my-model")
    (user / "critic").rename(user / "my-rm")
    rows = {
        "chats": [{"prompt": "a b", "completion": word} for word in "cdef"],
        "pairs": [{"prompt": "a b", "chosen": "c", "rejected": word, "source": "web"} for word in "abde"],
        "replies": [{"prompt": "a b", "response": "c d", "finished": True}],
    }
    for name, of_file in rows.items():
        (user / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for command in commands:
        assert main(shlex.split(command)) == 0, command
    assert json.loads((user / "lengths.jsonl").read_text())["score"] == 2


def test_commands_of_the_compare_page_run(user):
    """But for those on runs, which there are none of. Two precisions differ, and nothing else does."""
    commands = re.findall(r"^ {4}rlhf (compare [^#\n]*)", (ROOT / "docs" / "compare.md").read_text(), re.M)
    codes = {command: main(command.split()) for command in commands if "runs/" not in command and "megatron" not in command}
    assert len(codes) == 3
    assert {code for command, code in codes.items() if "--record" in command} == {0}
    assert [code for command, code in codes.items() if "--record" not in command] == [1]


PLANS = re.findall(r"^ {4}rlhf (plan .*)", (ROOT / "docs" / "planning.md").read_text(), re.M)


@pytest.mark.parametrize("command", [pytest.param(one, marks=pytest.mark.slow) if "--measure" in one else one for one in PLANS])
def test_commands_of_the_planning_page_run(command, user, capsys):
    before = sorted(path.name for path in user.rglob("*"))
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert json.loads(said)["memory"] if "--json" in command else "memory of one process" in said
    assert ("measured  peak" in said) is ("--measure" in command)
    assert sorted(path.name for path in user.rglob("*")) == before


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_pages_name_commands_that_exist(page):
    words = set(re.findall(r"(?:^ {4}|`)rlhf ([a-z][a-z0-9-]*)", page.read_text(), re.M))
    assert words <= {*cli.STAGES, *cli.COMMANDS}


def outline(page: str) -> tuple[list[int], list[str], list[str]]:
    """(depth of each heading, code blocks that a machine reads, commands that are shown)."""
    headings = [len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"```.*?```", "", page, flags=re.S), re.M)]
    return headings, re.findall(r"```(?:sh|python)\n.*?```", page, re.S), re.findall(r"^ {4}((?:rlhf|pip) .*)", page, re.M)


def test_the_chinese_readme_keeps_step():
    """The same sections in the same order, the same code, the same commands: these run in the tests above."""
    assert outline((ROOT / "README.zh-CN.md").read_text()) == outline(README)
