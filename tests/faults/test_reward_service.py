"""A reward service that fails, lies, stalls or leads elsewhere: the run ends with a word, in time, and tells no secret."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from harness import flags, metrics, run

from rlhf.config.parse import parse
from rlhf.errors import ConfigError, DataError, StorageError
from rlhf.rollout import services
from rlhf.rollout.readers import checked_scores
from rlhf.rollout.services import RewardService, is_public, seconds_of

PROMPTS, RESPONSES = ["a b", "c"], ["x y z", "naïve \ud800"]
LENGTHS = [5.0, 7.0]
CANARY = "canary-0123456789"
Behaviour = Callable[[BaseHTTPRequestHandler], None]


class Service:
    """An HTTP server on this machine that behaves as told, the last way for ever; `asked` are the requests it had."""

    def __init__(self) -> None:
        self.behaviours: list[Behaviour] = [scores]
        self.asked: list[tuple[dict, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                service.asked.append((dict(self.headers), body))
                self.body = json.loads(body)
                behaviour = service.behaviours[min(len(service.asked), len(service.behaviours)) - 1]
                with suppress(ConnectionError):
                    behaviour(self)

            def log_message(self, *arguments: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/score.py:latest"  # no file, and no function
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def scores(handler) -> None:
    """The length of each reply."""
    reply(handler, 200, json.dumps({"scores": [len(text) for text in handler.body["responses"]]}).encode())


def says(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    return lambda handler: reply(handler, status, body, **headers)


def closes(handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cuts_short(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')


def drips_headers(handler) -> None:
    """A byte now and then: no single wait is long."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10**6:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def drips_body(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10**6):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def hangs(handler) -> None:
    """Takes the request, and says nothing."""
    time.sleep(3)


def sends_a_gigabyte(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.sent = 0
    for _ in range(1 << 10):
        handler.wfile.write(b"[" * (1 << 20))
        SENT[0] += 1 << 20


SENT = [0]


@pytest.fixture
def service(monkeypatch) -> Iterator[Service]:
    monkeypatch.setattr(services, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv(services.TOKEN, raising=False)
    made = Service()
    yield made
    made.close()


def client(service: Service, timeout_s: float = 5.0, retries: int = 2) -> RewardService:
    return RewardService(service.url, timeout_s, retries, allow_private=True)


def test_the_protocol(service):
    assert client(service)(PROMPTS, RESPONSES) == LENGTHS
    assert client(service)(PROMPTS, RESPONSES[:1]) == LENGTHS[:1]
    (headers, body), (other, _) = service.asked
    assert json.loads(body) == {"prompts": PROMPTS, "responses": RESPONSES}
    assert headers["Content-Type"] == "application/json"
    assert headers["Host"] == f"127.0.0.1:{service.port}"
    assert headers["Idempotency-Key"] == hashlib.sha256(body.encode()).hexdigest() != other["Idempotency-Key"]
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "failure",
    [says(500), says(503, Retry_After="0"), says(429), closes, cuts_short, says(200, b"<html>"), says(200, b"[" * 10**5)],
    ids=["500", "503", "429", "closes", "cuts short", "no JSON", "deep JSON"],
)
def test_what_passes_is_tried_again(service, failure, capfd):
    service.behaviours = [failure, failure, scores]
    assert client(service)(PROMPTS, RESPONSES) == LENGTHS
    assert len({headers["Idempotency-Key"] for headers, _ in service.asked}) == 1
    assert capfd.readouterr().err.count("tried again") == 2
    service.behaviours, before = [failure], len(service.asked)
    with pytest.raises(StorageError, match=r"latest: .*\(try 3 of 3\)"):
        client(service)(PROMPTS, RESPONSES)
    assert len(service.asked) - before == 3


def test_retry_after_is_waited_for(service, monkeypatch):
    service.behaviours = [says(429, Retry_After="1"), scores]
    start = time.monotonic()
    assert client(service)(PROMPTS, RESPONSES) == LENGTHS
    assert 1 <= time.monotonic() - start < 4
    assert seconds_of("3600") == services.LONGEST_RETRY_AFTER_S == 60
    assert seconds_of("Fri, 31 Dec 1999 23:59:59 GMT") == seconds_of("soon") == seconds_of("-5") == seconds_of(None) == 0
    assert seconds_of("Fri, 31 Dec 2999 23:59:59 GMT") == 60


@pytest.mark.parametrize("slow", [drips_headers, drips_body, hangs])
def test_a_slow_service_has_a_deadline(service, slow):
    service.behaviours = [slow]
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"no whole answer within 0.5 s .* \(try 2 of 2\)"):
        client(service, timeout_s=0.5, retries=1)(PROMPTS, RESPONSES)
    assert 1 <= time.monotonic() - start < 6


def test_nobody_there(service):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StorageError, match="no connection"):
            RewardService(f"http://127.0.0.1:{taken.getsockname()[1]}", 5, 1, allow_private=True)(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("place", "status"), [("http://169.254.169.254/latest", 302), ("file:///etc/passwd", 307), ("http://[::1]/", 308)]
)
def test_redirects_are_not_followed(service, place, status):
    service.behaviours = [says(status, Location=place)]
    with pytest.raises(DataError, match=rf"status {status}, expected 200; redirects are not followed"):
        client(service)(PROMPTS, RESPONSES)
    assert len(service.asked) == 1


def test_an_endless_body_is_not_read(service):
    service.behaviours, SENT[0] = [sends_a_gigabyte], 0
    with pytest.raises(DataError, match="longer than 16 MB"):
        client(service, timeout_s=60)(PROMPTS, RESPONSES)
    assert len(service.asked) == 1
    time.sleep(0.2)
    assert SENT[0] < 64 << 20  # what was read, and what buffers on the way hold


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [1]}', "returned 1 values, expected a list of 2"),
        (b'{"scores": 1}', "returned int, expected a list of 2"),
        (b'{"scores": "12"}', "returned str, expected a list of 2"),
        (b'{"scores": ["1", 2]}', "the score of reply 0 is '1'"),
        (b'{"scores": [1e300, 2]}', "the score of reply 0 is 1e[+]300, more than float32 holds"),
        pytest.param(
            b'{"scores": [1, 1%s]}' % (b"0" * 400), "reply 1 is 10+[.]{3}0+, more than float32 holds", id="400 digits"
        ),
        (b'{"values": [1, 2]}', "the answer has no `scores`"),
        (b"[1, 2]", "the answer has no `scores`"),
    ],
)
def test_wrong_scores_end_the_run_at_once(service, body, message):
    service.behaviours = [says(200, body)]
    with pytest.raises(DataError, match=message):
        checked_scores(client(service)(PROMPTS, RESPONSES), 2, service.url)
    assert len(service.asked) == 1


def test_no_score_and_no_number_are_passed_on(service):
    """A reply without a score is masked; NaN is for the run to judge (non_finite)."""
    service.behaviours = [says(200, b'{"scores": [null, NaN]}')]
    none, nan = checked_scores(client(service)(PROMPTS, RESPONSES), 2, service.url)
    assert none is None
    assert nan is not None
    assert math.isnan(nan)


def test_only_hosts_on_the_list_are_asked(service):
    with pytest.raises(ConfigError, match=r"127.0.0.1 is not among reward.allow_hosts \(reward.example\)"):
        RewardService(service.url, 5, 0, allow_private=True, allow_hosts=["reward.example"])
    listed = RewardService(service.url, 5, 0, allow_private=True, allow_hosts=["reward.example", "127.0.0.1"])
    assert listed(PROMPTS, RESPONSES) == LENGTHS


@pytest.mark.parametrize("status", [201, 400, 401, 404])
def test_another_status_ends_the_run_at_once(service, status):
    service.behaviours = [says(status)]
    with pytest.raises(DataError, match=f"status {status}, expected 200"):
        client(service)(PROMPTS, RESPONSES)
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0.0.0.0",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "2130706433",
        "[::ffff:7f00:1]",
    ],
)
def test_private_addresses_are_refused(host):
    with pytest.raises(ConfigError, match=r"is not a public address; set reward.allow_private: true"):
        RewardService(f"http://{host}:9/score")


def test_what_is_public():
    for address in ("93.184.215.14", "2606:2800:21f:cb07::1", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"):
        assert is_public(address), address
    for address in ("64:ff9b::10.0.0.1", "2002:7f00:1::", "fe80::1%eth0", "fd00::1", "224.0.0.1", "100.64.0.1", "ff02::1"):
        assert not is_public(address), address


def test_what_was_checked_is_what_is_connected_to(service, monkeypatch):
    """A name that means one address when it is checked and another when it is used is the way around a check."""
    looked_up, real = [], socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **more):
        if host != "reward.example":
            return real(host, port, *rest, **more)
        looked_up.append(host)
        return real("127.0.0.1" if len(looked_up) != 3 else "10.0.0.1", port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    rebound = RewardService(f"http://reward.example:{service.port}/", 5, 0, allow_private=True)
    assert rebound(PROMPTS, RESPONSES) == LENGTHS
    assert looked_up == ["reward.example"] * 2  # at the start, and for the call
    assert service.asked[0][0]["Host"] == f"reward.example:{service.port}"
    rebound.allow_private = False
    with pytest.raises(ConfigError, match=r"10.0.0.1 is not a public address"):
        rebound(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"http://user:{CANARY}@127.0.0.1/", "holds a secret, which run.json would keep"),
        (f"https://{CANARY}@reward.example/", "holds a secret, which run.json would keep"),
        ("ftp://reward.example/", "ftp:// is no service"),
        ("file:///etc/passwd", "file:// is no service"),
        ("http://", "http:// is no service"),
        ("http://host:port/", "not an address"),
    ],
)
def test_bad_addresses_are_refused_before_anything_runs(address, message, tmp_path):
    with pytest.raises(ConfigError, match=rf"--reward: reward.source: {message}") as refused:
        parse("ppo", ["--actor=m", "--data=d", f"--output={tmp_path}", f"--reward={address}"])
    assert CANARY not in str(refused.value)


def test_the_token_is_sent_and_never_told(service, monkeypatch, capfd):
    monkeypatch.setenv(services.TOKEN, CANARY)
    echo = f"{CANARY}\r\n".encode()

    def echoes(handler) -> None:
        handler.wfile.write(b"HTTP/1.1 " + echo + b"\r\n")  # no status line, and quoted by the library that reads it

    asked = client(service)
    assert asked(PROMPTS, RESPONSES) == LENGTHS
    assert service.asked[0][0]["Authorization"] == f"Bearer {CANARY}"
    for behaviour in (echoes, says(200, echo), says(401, echo), says(500, echo), says(302, Location=f"http://{CANARY}/")):
        service.behaviours = [behaviour]
        with pytest.raises((DataError, StorageError)) as failed:
            asked(PROMPTS, RESPONSES)
        assert CANARY not in str(failed.value) + repr(vars(asked))
    printed = capfd.readouterr()
    assert "tried again" in printed.err
    assert CANARY not in printed.out + printed.err
    for bad in ("two words", "line\nbreak", "naïve"):
        monkeypatch.setenv(services.TOKEN, bad)
        with pytest.raises(ConfigError, match=f"{services.TOKEN} holds what no header can") as refused:
            client(service)
        assert bad not in str(refused.value)


def test_a_token_is_not_sent_in_the_open(monkeypatch):
    monkeypatch.setenv(services.TOKEN, CANARY)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("93.184.215.14", 80))])
    with pytest.raises(ConfigError, match="would be readable on its way"):
        RewardService("http://reward.example/")
    RewardService("https://reward.example/")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_checked(service, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=reward.example"]
    names = ["-addext", "subjectAltName=DNS:reward.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make + names, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    service.server.socket = context.wrap_socket(service.server.socket, server_side=True)
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))

    def ask(host: str) -> list[float]:
        return RewardService(f"https://{host}:{service.port}/", 5, 0, allow_private=True)(PROMPTS, RESPONSES)

    with pytest.raises(StorageError, match="certificate verify failed"):
        ask("reward.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ask("reward.example") == LENGTHS
    with pytest.raises(StorageError, match="certificate verify failed: Hostname mismatch"):
        ask("other.example")


@pytest.mark.slow
def test_a_run_with_a_service(service, world, tmp_path, monkeypatch):
    """As the same scores from a function, to the bit; resumed with more patience after the service had failed."""
    monkeypatch.setenv(services.TOKEN, CANARY)
    function = tmp_path / "lengths.py"
    function.write_text("def lengths(responses):\n    return [len(response) for response in responses]\n")
    short = {"schedule__length": 2, "data__eval": "null"}
    with_function = flags("ppo", world, tmp_path / "a", reward=f"{function}:lengths", **short)
    with_service = flags("ppo", world, tmp_path / "b", reward=service.url, reward__allow_private="true", **short)
    assert run("ppo", with_function, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    service.behaviours = [scores, says(500)]
    assert run("ppo", [*with_service, "--reward.retries=0"], tmp_path / "log") == 74, (tmp_path / "log").read_text()
    status = json.loads((tmp_path / "b" / "status.json").read_text())
    assert status["exit_code"] == 74
    assert "status 500 (try 1 of 1)" in status["reason"]
    service.behaviours = [scores]
    assert run("ppo", [*with_service, "--reward.retries=1"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "run.json").read_text())
    assert manifest["inputs"]["reward"] == {"path": service.url, "digest": None, "parent": None}
    assert {headers["Authorization"] for headers, _ in service.asked} == {f"Bearer {CANARY}"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]
