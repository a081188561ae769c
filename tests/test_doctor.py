"""`rlhf doctor`: a package that cannot be imported is told in its own words, and what hangs on it does not work."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import psutil
import pytest

from rlhf.cli import main
from rlhf.commands.doctor import EXTRAS, OPTIONAL, import_error
from rlhf.paths import CONFIGS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """With a DeepSpeed that raises when it is imported, and a wandb that ends the process."""
    broken = tmp_path_factory.mktemp("broken")
    (broken / "deepspeed.py").write_text("raise RuntimeError('CUDA_HOME does not exist')\n")
    (broken / "wandb.py").write_text("import os\nos._exit(7)\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(broken), prepend=os.pathsep)
        from rlhf.commands.doctor import examined

        return examined()


def test_what_fails_is_told_in_its_own_words(found):
    assert found["packages"]["deepspeed"] == "RuntimeError: CUDA_HOME does not exist"
    assert found["packages"]["wandb"] == "its import ended with 7"
    assert found["packages"].keys() == OPTIONAL.keys()
    assert found["packages"]["tensorboard"] is None


def test_what_hangs_on_it_does_not_work(found):
    assert found["launch"].keys() == {file.stem for file in (CONFIGS / "launch").glob("*.yaml")}
    for name, reason in found["launch"].items():
        assert ("CUDA_HOME does not exist" in (reason or "")) is name.startswith("zero")
    assert found["launch"]["cpu"] is found["launch"]["ddp"] is None


def test_the_machine(found):
    assert 0 < found["memory_gb"] <= psutil.virtual_memory().total / 1e9
    assert found["cores"] >= 1
    assert found["disk_gb"] > 0


def test_a_package_that_is_there_and_one_that_is_not():
    assert import_error("json") is None
    assert import_error("nothing_of_this_name") == "not installed: pip install nothing_of_this_name"


def test_how_to_install_it(monkeypatch, tmp_path):
    """By the extra that has it. What is there, and lacks another package, says so in its own words."""
    (tmp_path / "gguf.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_error("gguf") == "ModuleNotFoundError: No module named 'nothing_of_this_name'"
    (tmp_path / "gguf.py").write_text("raise ModuleNotFoundError(\"No module named 'gguf'\")\n")  # as if it were not there
    assert import_error("gguf") == "not installed: pip install 'rlhf[gguf]'"


def test_extras_have_the_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package.replace("_", "-") in re.split(r"[^\w-]", " ".join(extras[extra]))
    assert {module.split(".")[0] for module in OPTIONAL} - EXTRAS.keys() == {"wandb", "trackio", "mlflow"}


def test_it_is_printed_for_people_and_programs(found, monkeypatch, capsys):
    monkeypatch.setattr("rlhf.commands.doctor.examined", lambda: found)
    assert main(["doctor"]) == 0
    assert "package   no   deepspeed (--launch zero1, zero2, zero3): RuntimeError: CUDA_HOME" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
