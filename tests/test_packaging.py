"""The package as other people get it: a wheel, an sdist and an editable install, built here and looked into.

Built without isolation and installed without dependencies, so nothing is downloaded: the fresh environment borrows the
libraries of this one, but not the checkout.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlhf
from rlhf import paths

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def source_files(folder: str) -> set[str]:
    """Files of one folder of the checkout, relative to it; what Python leaves behind does not count."""
    files = (file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(ROOT / folder).as_posix() for file in files}


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sdist_names(sdist: Path) -> set[str]:
    """Names inside the sdist without its leading `rlhf-VERSION/`."""
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built straight from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist; beside it lies the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; returns its bin folder.

    A .pth file adds this environment's site-packages to the path but not what *its* .pth files add: the libraries are
    there, the editable checkout is not.
    """
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    return python.parent


def test_the_editable_install_reads_the_checkout() -> None:
    assert paths.STAGES == ROOT / "stages"
    assert paths.CONFIGS == ROOT / "configs"


def test_the_version_comes_from_the_metadata() -> None:
    assert rlhf.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        _ = rlhf.load_everything


def test_an_editable_install_leaves_no_copy_of_the_package() -> None:
    assert not (Path(sysconfig.get_path("purelib")) / "rlhf").exists()


@pytest.mark.parametrize("text", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
def test_every_dependency_has_a_tested_version(text: str) -> None:
    """constraints.txt pins what pyproject only bounds from below, and the two do not contradict each other."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonicalize_name(pin): tested for pin, _, tested in (line.partition("==") for line in lines)}
    requirement = Requirement(text)
    assert all(specifier.operator == ">=" for specifier in requirement.specifier), "pyproject sets floors only"
    assert canonicalize_name(requirement.name) in pins
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_stages_and_the_configs(wheel: Path) -> None:
    names = wheel_names(wheel)
    metadata = f"rlhf-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"rlhf", metadata}
    package = {name.removeprefix("rlhf/") for name in names if name.startswith("rlhf/")}
    assert package == (
        source_files("rlhf")
        | {f"_stages/{name}" for name in source_files("stages")}
        | {f"_configs/{name}" for name in source_files("configs")}
    )
    assert {"_stages/sft.py", "_stages/rm.py", "_stages/ppo.py", "_configs/quickstart/pipeline.yaml"} <= package
    assert f"{metadata}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_and_its_tests_need(sdist: Path) -> None:
    names = sdist_names(sdist)
    for folder in ("rlhf", "stages", "configs", "tests", "docs"):
        assert {f"{folder}/{name}" for name in source_files(folder)} <= names
    single = {"README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run"}
    assert single <= names
    strangers = {name for name in names if name.startswith((".venv/", "runs/")) or "__pycache__" in name}
    assert strangers == set()


@pytest.mark.slow
def test_a_wheel_from_the_sdist_is_the_same_wheel(sdist: Path, wheel: Path) -> None:
    assert wheel_names(next(sdist.parent.glob("*.whl"))) == wheel_names(wheel)


@pytest.mark.slow
def test_the_installed_wheel_finds_its_own_stages(installed: Path, tmp_path: Path) -> None:
    code = "from rlhf import paths; print(paths.PACKAGE); print(paths.STAGES); print(paths.CONFIGS)"
    package, stages, configs = map(Path, run(installed / "python", "-c", code, cwd=tmp_path).stdout.split())
    assert package.is_relative_to(installed.parent), "the checkout was imported, not the wheel"
    assert (stages, configs) == (package / "_stages", package / "_configs")
    assert (stages / "ppo.py").is_file()


@pytest.mark.slow
def test_the_installed_wheel_passes_its_own_ppo_test(installed: Path, tmp_path: Path) -> None:
    answer = run(installed / "rlhf", "ppo", "--unit-test", "--json", cwd=tmp_path).stdout
    assert json.loads(answer)["passed"] is True
