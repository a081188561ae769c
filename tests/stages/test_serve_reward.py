"""`rlhf serve-reward`: scores as transformers would give them, refusals in words, and a run that asks it."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path

import pytest
import torch
from harness import flags, metrics, run
from transformers import AutoModelForSequenceClassification

from rlhf.errors import ConfigError, DataError
from rlhf.models.load import load_tokenizer
from rlhf.rollout.services import BODY_LIMIT, TOKEN, RewardService
from rlhf.training.serve_command import open_server, scorer, serve

PROMPTS, RESPONSES = ["a b", "c", "h g f"], ["c d e", "", "a"]


class Served:
    def __init__(self, model: Path, token: str = "") -> None:
        self.server = open_server("127.0.0.1", 0, scorer(str(model), 2, "auto", False), token)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, body: bytes, method: str = "POST", **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, "/", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.fixture
def served(world, request, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    found = Served(world / "critic", getattr(request, "param", ""))
    yield found
    found.server.shutdown()
    found.server.server_close()


def expected(world: Path) -> list[float]:
    """The last token of prompt, reply and EOS, by transformers alone."""
    tokenizer = load_tokenizer(str(world / "critic"))
    model = AutoModelForSequenceClassification.from_pretrained(world / "critic").eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([tokenizer(f"{prompt} {response}")["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            found.append(float(model.score(model.base_model(ids).last_hidden_state)[0, -1]))
    return found


def test_scores(served, world):
    client = RewardService(served.url, 10, 0, allow_private=True)
    assert client(PROMPTS, RESPONSES) == pytest.approx(expected(world), abs=1e-5)
    assert client([], []) == []


GOOD = json.dumps({"prompts": ["a"], "responses": ["b"]}).encode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 10**5, 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[]", 400, "prompts is no list of texts"),
        (b'{"prompts": ["a"]}', 400, "responses is no list of texts"),
        (b'{"prompts": ["a"], "responses": [1]}', 400, "responses is no list of texts"),
        (b'{"prompts": ["a"], "responses": []}', 400, "1 prompts and 0 responses; expected as many of both"),
        (
            json.dumps({"prompts": ["a"], "responses": ["b " * 99]}).encode(),
            400,
            "prompts[0]: with a reply it takes 101 positions",
        ),
    ],
)
def test_bad_requests(served, body, status, message):
    found, said = served.ask(body)
    assert (found, message in said["error"]) == (status, True), said
    assert served.ask(GOOD)[0] == 200  # and it goes on


def test_other_methods_and_lengths(served):
    assert served.ask(b"", "GET")[0] == 501
    assert served.ask(b"", **{"Content-Length": str(BODY_LIMIT + 1)}) == (413, {"error": "the body is longer than 16 MB"})
    assert served.ask(b"", **{"Content-Length": "-1"})[0] == 411


@pytest.mark.parametrize("served", ["secret-0123456789"], indirect=True)
def test_a_token_is_asked_for(served, monkeypatch, capfd):
    assert served.ask(GOOD)[0] == served.ask(GOOD, Authorization="Bearer secret")[0] == 401
    assert served.ask(GOOD, Authorization="Bearer secret-0123456789")[0] == 200
    monkeypatch.setenv(TOKEN, "secret-0123456789")
    assert len(RewardService(served.url, 10, 0, allow_private=True)(PROMPTS, RESPONSES)) == 3
    monkeypatch.setenv(TOKEN, "another-0123456789")
    with pytest.raises(DataError, match="status 401"):
        RewardService(served.url, 10, 0, allow_private=True)(PROMPTS, RESPONSES)
    assert "0123456789" not in "".join(capfd.readouterr())


def test_who_may_ask(served, world, monkeypatch):
    with pytest.raises(ConfigError, match=f"--host 0.0.0.0: other machines could ask; set {TOKEN}"):
        serve(str(world / "critic"), "0.0.0.0", 0, 2, "auto", False)
    with pytest.raises(ConfigError, match=rf"--host 127.0.0.1 --port {served.port}: .*in use"):
        open_server("127.0.0.1", served.port, lambda prompts, responses: [], "")


def test_a_score_that_is_no_number_is_no_answer():
    server = open_server("127.0.0.1", 0, lambda prompts, responses: [float("nan")], "")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("POST", "/", GOOD)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())) == (500, {"error": "the score of responses[0] is nan"})
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_run_asks_it(served, world, tmp_path):
    """The words of the tiny world make the same tokens again, so the scores of replies that ended are the model's own."""
    log = tmp_path / "log"
    more = {"schedule__length": 2, "data__eval": "null", "reward__allow_private": "true"}
    assert run("ppo", flags("ppo", world, tmp_path / "served", reward=served.url, **more), log) == 0, log.read_text()
    assert run("ppo", flags("ppo", world, tmp_path / "own", reward=world / "critic", **more), log) == 0, log.read_text()
    for one, other in zip(metrics(tmp_path / "served"), metrics(tmp_path / "own"), strict=True):
        assert one["reward/shaped"] == pytest.approx(other["reward/shaped"], abs=1e-4)
