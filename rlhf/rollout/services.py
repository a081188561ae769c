"""A reward service over HTTP: asked with patience that ends, and told nothing that it need not know. Protocol: docs/rewards.md.

POST {"prompts": [...], "responses": [...]}  ->  {"scores": [...]}
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from rlhf.digest import text_digest
from rlhf.errors import ConfigError, DataError, StorageError
from rlhf.rollout.tries import FailedTry, with_retries

TOKEN = "RLHF_REWARD_TOKEN"
"""The environment variable that may hold a bearer token; there is no other way to give one, so none ends up in a file."""

CONNECT_S, READ_S = 5.0, 30.0
"""For a connection, and for its next bytes. A service that is given minutes (`reward.timeout_s`) may be silent for half."""

FIRST_PAUSE_S, LONGEST_RETRY_AFTER_S = 0.5, 60.0
BODY_LIMIT = 16 << 20
"""Bytes of an answer that are read: scores of half a million replies."""


ADVICE = dict.fromkeys(range(300, 400), "; redirects are not followed: give the address it leads to")
ADVICE |= dict.fromkeys((401, 403), f"; it may want another token in {TOKEN}")

TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses behind a translator (RFC 6052)."""


class NoAnswer(StorageError):
    """A service could not be had on any try."""


class RewardService:
    """A service at `http://` or `https://`.

    Args:
        timeout_s: seconds for one try, from the first packet to the last byte; looking up the host's name comes before.
        retries: tries after one that fails: status 429 or 5xx, a connection that breaks, takes too long or carries no JSON.
        allow_private: whether it may be on this machine or in a private network.
        allow_hosts: the only hosts that it may be on; none: any.

    Raises:
        ConfigError: its address is none, a private one or of another host, or the token cannot be sent to it.
        StorageError: its host is not found.
    """

    columns = ()

    def __init__(
        self,
        source: str,
        timeout_s: float = 60.0,
        retries: int = 2,
        allow_private: bool = False,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        self.source, self.timeout_s, self.retries, self.allow_private = source, timeout_s, retries, allow_private
        try:
            self.url = httpx2.URL(source)
            self.host = self.url.raw_host.decode("ascii")
            if allow_hosts and self.host not in {host.lower() for host in allow_hosts}:
                raise ConfigError(f"{source}: {self.host} is not among reward.allow_hosts ({', '.join(allow_hosts)})")
            self._addresses()
        except httpx2.InvalidURL as error:
            raise ConfigError(f"{source}: {error}") from None
        except FailedTry as failure:
            raise StorageError(f"{source}: {failure}") from None
        self._headers()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **others: Sequence[Any]) -> Any:
        """What the service gave as scores, whatever it is.

        Raises:
            DataError: it answered, and what it said would be said again: a redirect, another status, a body that is too long,
                no `scores`.
            NoAnswer: it could not be had on any try. Not DataError: nothing is wrong with what it said, there was no
                answer to read, as from a disk that fails; the run goes on where it was once the service is back.
        """
        body = json.dumps({"prompts": list(prompts), "responses": list(responses)})
        headers = self._headers() | {"Idempotency-Key": text_digest(body)}
        try:
            answer = with_retries(self.source, self.retries, lambda: self._try(body.encode(), headers), FIRST_PAUSE_S)
        except FailedTry as failure:
            raise NoAnswer(f"{failure}; see to the service, then run the same command again") from None
        if not isinstance(answer, dict) or "scores" not in answer:
            raise DataError(f"{self.source}: the answer has no `scores`, expected {{'scores': [{len(responses)} numbers]}}")
        return answer["scores"]

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        token = os.environ.get(TOKEN, "").strip()
        if not token:
            return headers
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{TOKEN} holds what no header can: spaces, or characters that are not ASCII")
        if self.url.scheme == "http" and not self.allow_private:
            raise ConfigError(f"{self.source}: {TOKEN} would be readable on its way; use https://, or unset it")
        return headers | {"Authorization": f"Bearer {token}"}

    def _addresses(self) -> list[str]:
        """Where the host is now. Each is checked, and these are connected to, whatever the name means a moment later."""
        port = self.url.port or {"http": 80, "https": 443}[self.url.scheme]
        try:
            found = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FailedTry(f"the host is not found ({error.strerror})") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self.allow_private and not is_public(address):
                raise ConfigError(
                    f"{self.source}: {address} is not a public address; set reward.allow_private: true if that is what you mean"
                )
        return addresses

    def _try(self, body: bytes, headers: dict[str, str]) -> Any:
        addresses = self._addresses()
        try:
            status, retry_after, content = asyncio.run(self._post(addresses, body, headers))
        except TimeoutError:
            raise FailedTry(f"no whole answer within {self.timeout_s:g} s (reward.timeout_s)") from None
        except httpx2.ConnectError as error:
            raise FailedTry(f"no connection: {error}") from None
        except httpx2.TransportError as error:  # its text may quote what the service sent, and that what we sent
            raise FailedTry(f"the connection failed ({type(error).__name__})") from None
        if status == 429 or status >= 500:
            raise FailedTry(f"status {status}", retry_after)
        if status != 200:
            raise DataError(f"{self.source}: status {status}, expected 200{ADVICE.get(status, '')}")
        if len(content) > BODY_LIMIT:
            raise DataError(f"{self.source}: the answer is longer than {BODY_LIMIT >> 20} MB")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise FailedTry("the answer is not JSON") from None

    async def _post(self, addresses: list[str], body: bytes, headers: dict[str, str]) -> tuple[int, float, bytes]:
        """(status, seconds to wait, as much of the body as was read) of the first address that can be connected to."""
        timeout = httpx2.Timeout(max(READ_S, self.timeout_s / 2), connect=CONNECT_S)
        host = self.url.netloc.decode("ascii")
        # httpx finds the system's certificates in more places, but reads SSL_CERT_FILE only with all the rest
        trusted = ssl.create_default_context() if "SSL_CERT_FILE" in os.environ else True
        # Nothing else from the environment: a proxy would look the name up again, and ~/.netrc may hold passwords.
        whole, asking = asyncio.timeout(self.timeout_s), httpx2.AsyncClient(timeout=timeout, trust_env=False, verify=trusted)
        async with whole, asking as client:
            for address in addresses:
                url = self.url.copy_with(host=address)
                named = {"sni_hostname": self.host}  # whose certificate it must be
                try:
                    async with client.stream(
                        "POST", url, content=body, headers=headers | {"Host": host}, follow_redirects=False, extensions=named
                    ) as response:
                        content = bytearray()
                        async for piece in response.aiter_raw():
                            content += piece
                            if len(content) > BODY_LIMIT:
                                break
                        return response.status_code, seconds_of(response.headers.get("Retry-After")), bytes(content)
                except (httpx2.ConnectError, httpx2.ConnectTimeout):
                    if address == addresses[-1]:
                        raise
        raise AssertionError("a host has addresses")


def is_public(address: str) -> bool:
    """Whether it is one of the internet at large, and not by way of an IPv4 address that is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in TRANSLATED else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    return ip.is_global and not ip.is_multicast


def seconds_of(retry_after: str | None) -> float:
    """What a Retry-After header asks for (RFC 9110, section 10.2.3: seconds or a date), a minute at most; 0 for none."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after) if retry_after.isdigit() else _from_now(retry_after)
    except (ValueError, TypeError):  # neither
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def _from_now(date: str) -> float:
    when = parsedate_to_datetime(date)
    return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
