"""`rlhf chat`, with lines piped to it: each reply is what `load_actor` says after what was said before."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf
from rlhf.cli import main
from rlhf.training import chat_command


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch, capsys):
    """(exit code, standard output, standard error) of a conversation."""

    def talked(model: Path, typed: str, *words: object, at: type[io.StringIO] = io.StringIO) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", at(typed))
        code = main(["chat", str(model), "--max-new-tokens", "9", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return talked


def said(model: Path, *messages: str, system: str | None = None) -> list[str]:
    """The greedy replies to messages, one after the other, each with all before it."""
    policy, so_far = rlhf.load_actor(model), [{"role": "system", "content": system}] if system else []
    replies = []
    for message in messages:
        so_far.append({"role": "user", "content": message})
        [reply] = policy.generate([so_far], temperature=0, max_new_tokens=9)
        so_far.append({"role": "assistant", "content": reply.text})
        replies.append(reply.text)
    return replies


def answers(output: str) -> list[str]:
    return [json.loads(line)["response"] for line in output.splitlines()]


def test_a_conversation(chatty, talk):
    code, out, err = talk(chatty, "a b\n\nc\nd", "--temperature", 0, "--json")
    expected = said(chatty, "a b", "c", "d")
    assert (code, answers(out)) == (0, expected)
    assert expected != [said(chatty, message)[0] for message in ("a b", "c", "d")]  # what came before is seen
    assert "/reset begins anew" in err
    assert talk(chatty, "a b\nc\nd\n", "--temperature", 0)[1].split() == " ".join(expected).split()  # as it is streamed


def test_commands(chatty, talk):
    typed = "a b\nc\n/reset\nc\n/system e f\nc\n/system\nc\n/quit\nd\n"
    code, out, _ = talk(chatty, typed, "--temperature", 0, "--json", "--system", "g g")
    expected = said(chatty, "a b", "c", system="g g") + said(chatty, "c", system="g g")
    assert (code, answers(out)) == (0, expected + said(chatty, "c", system="e f") + said(chatty, "c"))
    assert len(set(answers(out)[1:])) > 1


@pytest.mark.parametrize("line", ["/nothing", "/reset now", "/etc/passwd is what?"])
def test_a_line_that_is_no_command(chatty, talk, line):
    """In a pipe it ends the command, so that replies stand beside messages; at a terminal it is told, and left out."""
    code, out, err = talk(chatty, f"a b\n{line}\nc\n", "--temperature", 0, "--json")
    assert (code, answers(out)) == (65, said(chatty, "a b"))
    assert f"standard input: '{line}' is no command, and was not answered; /reset begins anew" in err
    assert "a message that begins with / is written with //" in err
    code, out, err = talk(chatty, f"a b\n{line}\nc\n", "--temperature", 0, "--json", at=Terminal)
    assert (code, answers(out.replace("> ", ""))) == (0, said(chatty, "a b", "c"))
    assert f"{line.split()[0]}: no such command; /reset begins anew" in err
    code, out, _ = talk(chatty, f"a b\n/{line}\nc\n", "--temperature", 0, "--json")
    assert (code, answers(out)) == (0, said(chatty, "a b", line, "c"))


def test_a_stop_token_that_is_a_word_is_not_streamed(models, talk):
    """`d` ends a reply of stops/, and is in none; of model/ it is a word like the others."""
    typed = "a b\nc\nd e\nf g h\nh\n"
    code, streamed, _ = talk(models / "stops", typed)
    assert code == 0
    assert streamed.split() == " ".join(answers(talk(models / "stops", typed, "--json")[1])).split()
    assert "d" not in streamed.split()
    assert "d" in talk(models / "model", typed)[1].split()


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_what_is_no_text_is_one_message(chatty, locale):
    """In a real process: under these locales Python passes such bytes on."""
    words = ["-m", "rlhf", "chat", str(chatty), "--max-new-tokens", "2"]
    run = lambda typed: subprocess.run(  # noqa: E731
        [sys.executable, *words], input=typed, capture_output=True, env=os.environ | {"LC_ALL": locale}
    )
    found = run(b"a\n\xff\xfe\n")
    assert (found.returncode, b"Traceback" in found.stderr) == (65, False)
    assert b"standard input: invalid UTF-8 byte 0xff" in found.stderr


def test_replies_follow_from_the_seed(chatty, llamas, talk, tmp_path):
    """The first is that of `rlhf generate` to the first row; a message that is said again is answered anew."""
    first = talk(chatty, "a b\n/reset\na b\n/reset\na b\n", "--json", "--seed", 4)[1]
    assert talk(chatty, "a b\n/reset\na b\n/reset\na b\n", "--json", "--seed", 4)[1] == first
    assert len(set(answers(first))) > 1
    (tmp_path / "prompts.txt").write_text("a b\n")
    words = ["--data", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "replies.jsonl"), "--max-new-tokens", "9"]
    assert main(["generate", str(chatty), *words, "--seed", "4"]) == 0
    assert json.loads((tmp_path / "replies.jsonl").read_text())["response"] == answers(first)[0]


def test_text_that_is_continued(llamas, talk):
    code, out, err = talk(llamas / "model", "a b\n/system e\n/reset\nc\n", "--temperature", 0, "--json")
    policy = rlhf.load_actor(llamas / "model")
    assert (code, answers(out)) == (0, [r.text for r in policy.generate(["a b", "c"], temperature=0, max_new_tokens=9)])
    assert "without a chat template each line is text to go on with" in err
    assert "there is no chat template to put a system message in" in err


@pytest.mark.parametrize(
    "words", [("--precision", "bf16"), ("--precision", "fp8"), ("--top-k", 2, "--repetition-penalty", 1.2)]
)
def test_options(chatty, talk, words):
    code, out, err = talk(chatty, "a b\nc\n", "--json", *words)
    assert (code, len(answers(out))) == (0, 2)
    assert err.count("linear layers in FP8") == ("fp8" in words)


def test_what_does_not_fit(chatty, talk):
    """In a pipe it ends the command; at a terminal the message is left out, and the next is answered as if it had not been."""
    long = "a " * 60
    code, out, err = talk(chatty, f"{long}\nc\n", "--temperature", 0, "--json")
    assert (code, out) == (65, "")
    assert "the model has 64: lower max_new_tokens" in err
    code, out, err = talk(chatty, f"{long}\nc\n", "--temperature", 0, "--json", at=Terminal)
    assert code == 0
    assert out.startswith('> > {"response"')
    assert json.loads(out.removeprefix("> > ").splitlines()[0])["response"] == said(chatty, "c")[0]
    assert "the message is left out" in err


def test_a_reply_that_is_stopped(chatty, talk, monkeypatch):
    answer, interrupted = chat_command.Conversation.answer, []

    def once(self, *arguments):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(chat_command.Conversation, "answer", once)
    code, out, err = talk(chatty, "a b\nc\n", "--temperature", 0, at=Terminal)
    assert code == 0
    assert "stopped: neither the message nor the reply is kept" in err
    assert said(chatty, "c")[0].split()[0] in out
    interrupted.clear()
    assert talk(chatty, "a b\n")[0] == 130


def test_nothing_that_a_terminal_would_obey(chatty, capsys):
    streamer = chat_command.Streamer(None, [])
    streamer.on_finalized_text("a\x1b[2J\tb\n\x07\x9bé")
    assert capsys.readouterr().out == "a[2J\tb\né"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--precision", "both"], 78, "precision must be one of fp32, bf16 and fp8"),
        (["--top-k", "3", "--top-p", "0.5"], 78, "top_k 3 and top_p 0.5 exclude each other"),
        (["--template", "plain", "--system", "e"], 78, "has no chat template to put it in"),
        (["--template", "nothing"], 78, "--template: given `nothing`, expected `auto`, `chat` or `plain`"),
    ],
)
def test_a_mistake_is_one_message(chatty, talk, words, code, message):
    found, out, err = talk(chatty, "a\n", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_a_model_that_is_none(llamas, talk):
    assert talk(llamas / "critic", "a\n")[0] == 65
