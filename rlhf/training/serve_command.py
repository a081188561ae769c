"""`rlhf serve-reward`: a reward model behind the protocol of docs/rewards.md; others may be written by it.

Requests are taken by a thread each and scored one after the other. Not a server for the open internet: it has no TLS.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.rollout.services import BODY_LIMIT, TOKEN
from rlhf.training.inference import load_reward

SILENT_S = 60
"""Seconds that a client may keep a connection without a byte."""


@dataclass(frozen=True)
class Refusal(Exception):
    """An answer other than scores."""

    status: HTTPStatus
    message: str


def serve(model: str, host: str, port: int, batch_size: int, template: str, trust_remote_code: bool) -> int:
    """Answers until it is ended. Port 0 is any that is free; the address is printed once requests are taken.

    Raises:
        ConfigError: the address cannot be had, or other machines could ask without a token.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token and not _is_loopback(host):
        raise ConfigError(f"--host {host}: other machines could ask; set {TOKEN}, which they then have to know")
    server = open_server(host, port, scorer(model, batch_size, template, trust_remote_code), token)
    address = f"[{host}]" if ":" in host else host
    print(f"serve-reward  {model}: http://{address}:{server.server_address[1]}", flush=True)
    server.serve_forever()
    return 0


def scorer(
    model: str, batch_size: int, template: str, trust_remote_code: bool
) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """(prompts, responses) -> scores, each prompt as the words of a user and each response as a whole reply to it."""
    reward = load_reward(model, template=template, trust_remote_code=trust_remote_code)  # pyright: ignore[reportArgumentType]
    one_at_a_time = Lock()

    def scores(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        with one_at_a_time:
            return reward.score(prompts, responses, batch_size=batch_size)

    return scores


def open_server(
    host: str, port: int, scores: Callable[[Sequence[str], Sequence[str]], list[float]], token: str
) -> ThreadingHTTPServer:
    """Raises ConfigError where the address cannot be had."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SILENT_S
        server_version, sys_version = "rlhf", ""

        def do_POST(self) -> None:
            try:
                prompts, responses = request(self._body())
                try:
                    found = scores(prompts, responses)
                except (ConfigError, DataError) as error:  # what the template or the positions of the model do not take
                    raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from None
                except CheckFailed as error:  # a score that is no number
                    raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from None
                if bad := [index for index, score in enumerate(found) if not math.isfinite(score)]:
                    raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"the score of responses[{bad[0]}] is {found[bad[0]]}")
                self._answer(HTTPStatus.OK, {"scores": found})
            except Refusal as refusal:
                self.send_error(refusal.status, refusal.message)

        def _body(self) -> bytes:
            given = self.headers.get("Authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise Refusal(HTTPStatus.UNAUTHORIZED, f"expected the token of {TOKEN}: `Authorization: Bearer TOKEN`")
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdigit():
                raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
            if int(length[:20]) > BODY_LIMIT:
                raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {BODY_LIMIT >> 20} MB")
            return self.rfile.read(int(length))

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            said = message or HTTPStatus(code).phrase
            print(f"rlhf: serve-reward: {int(code)}: {said}", file=sys.stderr, flush=True)
            self._answer(code, {"error": said})

        def _answer(self, code: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose others (port 0: any that is free)") from None


def request(body: bytes) -> tuple[list[str], list[str]]:
    """(prompts, responses) of a request; raises Refusal where it is none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    found = []
    for name in ("prompts", "responses"):
        texts = content.get(name) if isinstance(content, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"expected {{'prompts': [texts], 'responses': [texts]}}; {name} is no list of texts"
            )
        found.append(texts)
    if len(found[0]) != len(found[1]):
        raise Refusal(
            HTTPStatus.BAD_REQUEST, f"{len(found[0])} prompts and {len(found[1])} responses; expected as many of both"
        )
    return found[0], found[1]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
