"""Writing holds no more than the largest tensor at a time, however slow the disk is."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from threading import Lock

import pytest
from tiny import build
from torch import Tensor

from rlhf.checkpoints import writing
from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sinks import Sink, open_sink
from rlhf.checkpoints.stored import Stored


class Hand:
    """Bytes that were read and are not written yet."""

    def __init__(self) -> None:
        self.lock, self.now, self.most = Lock(), 0, 0

    def take(self, stored: Stored) -> Tensor:
        with self.lock:
            self.now += stored.bytes
            self.most = max(self.most, self.now)
        return stored.read()


class Slow:
    """A file on a slow disk."""

    def __init__(self, sink: Sink, hand: Hand) -> None:
        self.sink, self.hand = sink, hand

    def write(self, key: str, tensor: Tensor) -> str:
        time.sleep(0.01)
        digest = self.sink.write(key, tensor)
        with self.hand.lock:
            self.hand.now -= tensor.nbytes
        return digest

    def close(self) -> None:
        self.sink.close()


def test_no_more_in_hand_than_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama-gqa", tmp_path / "hf")
    conversion = plan(Request(tmp_path / "hf", tmp_path / "out", "hf"))
    hand, steps = Hand(), conversion.target.steps
    for index, step in enumerate(steps):
        counted = replace(step.source, read=lambda stored=step.source: hand.take(stored))
        steps[index] = replace(step, source=counted)
    monkeypatch.setattr(writing, "open_sink", lambda directory, file: Slow(open_sink(directory, file), hand))
    writing.write(conversion)
    sizes = sorted(step.source.bytes for step in steps)
    assert hand.now == 0
    assert hand.most == sizes[-1]
    assert sum(sizes) > 3 * sizes[-1]
