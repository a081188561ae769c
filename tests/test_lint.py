"""What ruff does not forbid and we do: code from data, trust in strangers, errors swallowed, paths of one machine."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("rlhf", "stages", "benchmarks", ".ci", "configs") for file in (ROOT / folder).rglob("*.py"))
FOLDERS = ("rlhf", "stages", "configs", "docs", "tests", "benchmarks", ".ci")
TEXT = {".py", ".md", ".yaml", ".toml", ".json", ".txt", ""}
SHIPPED = sorted(
    file
    for place in (ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in FOLDERS))
    for file in place
    if file.is_file() and file.suffix in TEXT and not file.name.startswith(".")
)
# Everything that runs code hidden in the data it reads.
RESTRICTED_UNPICKLER = "rlhf/checkpoints/pickles.py"  # the one module that may: foreign formats are pickles, read by allow-list
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
UNSAFE_BUILTINS = {"eval", "exec"}
OF_TRANSFORMERS = re.compile(r"(transformers\.)?Auto\w+$|factory$")
# An absolute path below one of these folders; a URL or a relative path has a character before the slash.
MACHINE_PATH = re.compile(r"(?<![\w.~:/>)}*-])/(?:work|home|root|tmp|mnt|opt|Users|data)/[\w.]")


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load; empty for what is no plain name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def call_findings(call: ast.Call) -> list[str]:
    function = dotted(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    found = []
    if function in UNSAFE_BUILTINS:
        found.append(f"{function}() runs code from data")
    if function == "torch.load" and not is_true(keywords.get("weights_only")):
        found.append("torch.load needs weights_only=True")
    if is_true(keywords.get("trust_remote_code")):
        found.append("trust_remote_code=True runs a stranger's code")
    if not says_whom_it_trusts(function, set(keywords)):
        found.append(f"{function} needs trust_remote_code, or it asks on the terminal")
    return found


def says_whom_it_trusts(function: str, keywords: set[str | None]) -> bool:
    """transformers asks on the terminal whether to run a stranger's code where it is not told; a call tells it."""
    owner, _, method = function.rpartition(".")
    return (
        method not in ("from_pretrained", "from_config") or not OF_TRANSFORMERS.match(owner) or "trust_remote_code" in keywords
    )


def import_findings(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = {alias.name for alias in node.names}
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    roots = {module.split(".")[0]} if module else {imported.split(".")[0] for imported in names}
    found = [f"{root} runs code from data" for root in roots & UNSAFE_MODULES]
    if module == "yaml" and names & UNSAFE_YAML:
        found.append("yaml is read with SafeLoader or not at all")
    if module == "torch" and "load" in names:
        found.append("say torch.load, so that weights_only=True is seen")
    return found


def findings(source: str) -> list[str]:
    """Everything forbidden in the source, each with its line."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [(node.lineno, finding) for finding in call_findings(node)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [(node.lineno, finding) for finding in import_findings(node)]
        elif isinstance(node, ast.Attribute) and dotted(node) in {f"yaml.{unsafe}" for unsafe in UNSAFE_YAML}:
            found.append((node.lineno, "yaml is read with SafeLoader or not at all"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "a bare except hides every mistake, Ctrl-C included"))
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                (node.lineno, "trust_remote_code=True runs a stranger's code")
                for key, value in pairs
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and is_true(value)
            ]
    return [f"line {line}: {finding}" for line, finding in found]


def machine_paths(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), start=1)
    return [f"line {number}: {line.strip()}" for number, line in lines if MACHINE_PATH.search(line)]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_nothing_forbidden(file: Path) -> None:
    expected = ["pickle runs code from data"] if name(file) == RESTRICTED_UNPICKLER else []
    assert [finding.partition(": ")[2] for finding in findings(file.read_text("utf-8"))] == expected


@pytest.mark.parametrize("file", SHIPPED, ids=name)
def test_no_path_of_one_machine(file: Path) -> None:
    assert machine_paths(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def later():\n    import dill.settings",
        "yaml.load(stream, Loader=loader)",
        "read = yaml.unsafe_load",
        "from yaml import load",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "AutoConfig.from_pretrained(name)",
        "factory.from_config(config)",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_a_forbidden_line_is_found(source: str) -> None:
    assert len(findings(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(stream)",
        "from yaml import SafeLoader",
        "model.eval()",
        "evaluate(model)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "try:\n    pass\nexcept Exception:\n    pass",
        "import json",
    ],
)
def test_an_ordinary_line_passes(source: str) -> None:
    assert findings(source) == []


@pytest.mark.parametrize("folder", ["home", "tmp", "work", "root"])
def test_a_machine_path_is_found(folder: str) -> None:
    path = f"/{folder}/somebody/model"
    for text in (f'load("{path}")', f"see {path}", f"--output={path}", f"`{path}`"):
        assert machine_paths(text) == [f"line 1: {text}"]


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "runs/tmp/x", "tmp_path / 'data/x'", "a / b", "$HOME/work/x", "~/work/x"]
)
def test_other_slashes_pass(text: str) -> None:
    assert machine_paths(text) == []
