"""Who may import whom. The picture in CONTRIBUTING.md is the rule; the imports, read from the source, are held to it.

Imports inside functions and under TYPE_CHECKING count: a layer that needs another one only sometimes still needs it.
Left out: modules imported by a computed name.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf"
STAGES = ROOT / "stages"
PICTURE = (
    "errors paths digest | config | functional | fp8 | checkpoints data | models | rollout | runs | report | training | "
    "commands | cli"
)
RANK = {layer: rank for rank, layers in enumerate(PICTURE.split("|")) for layer in layers.split()}
DOORS = {"__init__", "__main__"}  # rlhf/__init__.py and rlhf/__main__.py stand in front of every layer
LIGHT = {"errors", "paths", "digest", "config", "runs"}
HEAVY = {"accelerate", "datasets", "deepspeed", "peft", "torch", "transformers", "trl", "vllm"}
FUNCTIONAL_LIBRARIES = sys.stdlib_module_names | {"torch", "jaxtyping"}
MAX_LINES = 400


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported anywhere in the tree; `from a import b` counts as `a.b`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imported_on_start(tree: ast.Module) -> set[str]:
    """The same, for what merely importing the module imports: everything outside function bodies."""
    statements: list[ast.AST] = list(tree.body)
    found: set[str] = set()
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imported_modules(node)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            statements += ast.iter_child_nodes(node)
    return found


def own_layers(modules: set[str]) -> set[str]:
    """The layers of rlhf among the modules; `from rlhf import __version__` is metadata, not a layer."""
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == "rlhf" and len(part) > 1 and part[1] != "__version__"}


def top_levels(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def layer_violations(layer: str, source: str) -> list[str]:
    """What is wrong with the imports of one file of rlhf that belongs to the layer."""
    tree = ast.parse(source)
    modules = imported_modules(tree)
    wrong = [f"relative import of {module}" for module in modules if module.startswith(".")]
    for other in own_layers(modules) - {layer}:
        if other not in RANK:
            wrong.append(f"{other} is no layer of the picture")
        elif layer not in DOORS and RANK[other] >= RANK[layer]:
            wrong.append(f"{layer} may not import {other}")
    if layer in LIGHT:
        wrong += [f"{layer} may never import {name}" for name in top_levels(modules) & HEAVY]
    if layer in {"cli", "commands"} | DOORS:
        wrong += [f"{layer} must start without {name}" for name in top_levels(imported_on_start(tree)) & HEAVY]
    if layer == "functional":
        others = own_layers(modules) - {"functional", "errors"} | top_levels(modules) - {"rlhf"} - FUNCTIONAL_LIBRARIES
        wrong += [f"functional may not import {other}" for other in others]
    wrong += [f"a stage is a script, not a library: {name}" for name in top_levels(modules) & stage_names()]
    return wrong


def stage_names() -> set[str]:
    return {file.stem for file in STAGES.glob("*.py")} | {"stages"}


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
STAGE_FILES = sorted(STAGES.glob("*.py"))
OTHER_FILES = sorted(file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=name)
def test_a_layer_imports_only_from_the_left(file: Path) -> None:
    assert layer_of(file) in RANK or layer_of(file) in DOORS, f"{name(file)} has no place in the picture: {PICTURE}"
    assert layer_violations(layer_of(file), file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("rollout", "from rlhf.training import prepare"),
        ("rollout", "import rlhf.runs.launch"),
        ("rollout", "from rlhf import report"),
        ("rollout", "def later():\n    from rlhf.training import prepare"),
        ("rollout", "from ..training import prepare"),
        ("rollout", "import rlhf.helpers"),
        ("data", "from rlhf.checkpoints import convert"),
        ("functional", "from rlhf.config.schema import PPOConfig"),
        ("functional", "from rlhf.paths import STAGES"),
        ("functional", "import numpy"),
        ("config", "def later():\n    import torch"),
        ("runs", "from transformers import AutoConfig"),
        ("paths", "import torch.nn"),
        ("cli", "import torch"),
        ("cli", "try:\n    from datasets import Dataset\nexcept ImportError:\n    pass"),
        ("__init__", "import torch"),
        ("training", "import stages.ppo"),
        ("training", "from stages import ppo"),
    ],
)
def test_a_forbidden_import_is_found(layer: str, source: str) -> None:
    assert layer_violations(layer, source) != []


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("training", "from rlhf.rollout.experience import Experience"),
        ("rollout", "from rlhf.rollout import engines"),
        ("functional", "from rlhf.functional.masked import masked_mean\nfrom rlhf.errors import CheckFailed"),
        ("functional", "import math\nimport torch.nn.functional\nfrom jaxtyping import Float"),
        ("cli", "def generate():\n    import torch\n    from rlhf.models import load"),
        ("runs", "from rlhf import __version__"),
        ("__main__", "from rlhf.cli import main"),
    ],
)
def test_an_allowed_import_passes(layer: str, source: str) -> None:
    assert layer_violations(layer, source) == []


def test_contributing_shows_the_picture() -> None:
    assert f"{PICTURE} | stages" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=name)
def test_tyro_is_imported_by_config_parse_alone(file: Path) -> None:
    if file != PACKAGE / "config" / "parse.py":
        assert "tyro" not in top_levels(imported_modules(ast.parse(file.read_text("utf-8"))))


@pytest.mark.parametrize("file", STAGE_FILES, ids=name)
def test_stages_do_not_import_each_other(file: Path) -> None:
    assert top_levels(imported_modules(ast.parse(file.read_text("utf-8")))) & stage_names() == set()


def test_no_stage_is_named_after_a_module() -> None:
    """A script's folder comes first on sys.path, so a stage named `trl.py` would hide trl from the other stages."""
    assert [file.stem for file in STAGE_FILES if importlib.util.find_spec(file.stem)] == []


@pytest.mark.parametrize("file", PACKAGE_FILES + STAGE_FILES + OTHER_FILES, ids=name)
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= MAX_LINES


def heavy_modules_after(code: str, cwd: Path) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running the code."""
    report = f"import sys\n{code}\nprint('HEAVY', *({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", report], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_the_command_and_the_light_layers_start_without_torch(tmp_path: Path) -> None:
    files = [file for file in PACKAGE_FILES if layer_of(file) in LIGHT | {"commands"} or file == PACKAGE / "__init__.py"]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert heavy_modules_after(f"import rlhf.cli, {', '.join(modules)}", tmp_path) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ppo", "--help"]], ids=" ".join)
def test_help_comes_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        f"sys.argv = ['rlhf', *{arguments!r}]\n"
        "from rlhf.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as exit:\n    code = exit.code\n"
        "assert not code, code"
    )
    assert heavy_modules_after(code, tmp_path) == set()


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    assert heavy_modules_after("import accelerate.utils.constants", tmp_path) >= {"accelerate", "torch"}
