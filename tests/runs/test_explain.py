"""`rlhf explain`: its tables are held to the names that the code checks by, the codes it ends with and what it says."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from rlhf import errors
from rlhf.commands.explain import run
from rlhf.errors import CheckFailed, UsageError
from rlhf.runs.explain import ALIASES, BY_NAME, ENTRIES, explained, found

PACKAGE = Path(errors.__file__).parent


def names_of_checks() -> set[str]:
    """The first argument of every `checks.expect(...)`; what an f-string puts in is `reference`, a frozen role."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "expect":
                match node.args[0]:
                    case ast.Constant(value=str(name)):
                        names.add(name)
                    case ast.JoinedStr(values=parts):
                        names.add("".join(part.value if isinstance(part, ast.Constant) else "reference" for part in parts))
    return names


def test_every_check_is_explained():
    names = names_of_checks()
    assert {"first ratio", "KL at step 0", "frozen reference", "drift at step 0", "pads"} <= names
    assert {name for name in names if (entry := found(name)) is None or entry.kind != "check"} == set()
    told = {found(name) for name in names}
    assert {entry.name for entry in ENTRIES if entry.kind == "check" and entry not in told} == set()  # nor one that is not made


def test_every_exit_code_is_explained():
    codes = {value.exit_code for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "exit_code")}
    assert {1, 2, 65, 71, 78} <= codes
    kinds = {entry.name for entry in ENTRIES if entry.kind == "exit code"}
    assert {str(code) for code in codes | {0, 70, 128 + 2, 128 + 15}} <= kinds


def test_rows_are_whole():
    assert len(BY_NAME) == len(ENTRIES)
    assert set(ALIASES.values()) <= set(BY_NAME)
    for entry in ENTRIES:
        texts = [entry.what, entry.healthy, entry.otherwise, entry.do, *entry.causes]
        assert all(texts), entry.name
        assert len(set(entry.causes)) == 3, entry.name


def test_names_that_are_not_written_in_full():
    assert explained("KL/Sequence").name == "kl/sequence"
    assert explained("sequence").name == "kl/sequence"
    assert explained("eval/kl").name == "kl/sequence"
    assert explained("eval/reward/chosen").name == "reward/chosen"
    assert explained("reward/helpful").name == "reward/*"
    assert explained("reward/helpful_std").name == "reward/*_std"
    assert explained("time/update_s").name == "time/*"
    with pytest.raises(UsageError, match="did you mean policy/entropy"):
        explained("policy/entropi")
    with pytest.raises(UsageError, match="lists all names"):
        explained("zzzzzz")
    assert found("policy/nothing") is None


def test_what_it_says(capsys):
    assert run(["first ratio"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("first ratio, a check", "exactly 0", "1. ", "2. ", "3. ", "what to do: "))
    assert run(["71", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "exit code"
    assert run([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {entry.name} " in listed for entry in ENTRIES)
    assert run(["--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(ENTRIES)


@pytest.mark.parametrize(("asked", "meant"), [("reward/scroe", "reward/score"), ("eval/accurcy", "eval/accuracy")])
def test_a_misspelt_name_is_no_figure_of_ones_own(asked, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}"):
        explained(asked)
    assert "*" in explained("eval/politeness").name


def test_a_check_of_a_copied_recipe_fails_without_a_table():
    from rlhf.training.invariants import Checks

    checks = Checks()
    checks.expect("mine", False, 1, "it is 0")
    with pytest.raises(CheckFailed, match="mine: measured 1; it should be that it is 0"):
        checks.require()


def test_a_failed_check_says_what_to_do():
    from rlhf.training.invariants import Checks

    checks, notes = Checks(), []
    checks.expect("first clip fraction", True, 0.0, "nothing is clipped in the first minibatch")
    checks.require(notes.append)
    checks.expect("first ratio", False, 0.25, "max |log ratio| of the first minibatch is exactly 0")
    with pytest.raises(CheckFailed) as raised:
        checks.require(notes.append)
    assert [note.split(":")[0] for note in notes] == ["check ok", "check FAILED"]  # each is said once
    entry, message = BY_NAME["first ratio"], str(raised.value)
    assert "measured 0.25" in message
    assert all(text in message for text in (entry.otherwise, *entry.causes, entry.do))
    assert BY_NAME["first clip fraction"].do not in message.replace(entry.do, "")


PAGE = Path(__file__).resolve().parents[2] / "docs" / "explain.md"


@pytest.mark.parametrize("command", re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)[0].splitlines())
def test_the_commands_of_the_page_run(command, capsys):
    program, word, *words = shlex.split(command)
    assert (program, word) == ("rlhf", "explain")
    assert run(words) == 0
    assert capsys.readouterr().out


def test_a_name_of_several_words_needs_no_quotes(capsys):
    for name in ("first ratio", "KL budget"):
        assert run([name]) == 0
        quoted = capsys.readouterr().out
        assert quoted.startswith(name)
        assert run(name.split()) == 0
        assert capsys.readouterr().out == quoted
    with pytest.raises(UsageError, match="nothing is called 'first rat1o'"):
        run(["first", "rat1o"])
