"""What a start of several processes checks before it trains: sums are right, and ranks divide what they should."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf.errors import CheckFailed
from rlhf.training.memory import memory_line, require_divided
from rlhf.training.preflight import all_reduce_speed
from rlhf.training.processes import Peer, lost


def as_rank_one_of_two(monkeypatch, all_reduce) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)


def test_a_right_sum_and_its_speed(monkeypatch):
    # rank 0 has one less everywhere
    as_rank_one_of_two(monkeypatch, lambda tensor: tensor.mul_(2).sub_(1))
    said = all_reduce_speed(torch.device("cpu"), 2)
    assert "all-reduce of 16 MiB over 2 processes is right" in said
    algorithm, link = (float(part.split()[-1]) for part in said.split(" GB/s")[:2])
    assert link == algorithm  # 2 (n - 1) / n is 1 for two


def test_a_wrong_sum_is_named(monkeypatch):
    def one_bit_flips(tensor):
        tensor.mul_(2).sub_(1)
        tensor[123456] += 1

    as_rank_one_of_two(monkeypatch, one_bit_flips)
    with pytest.raises(CheckFailed, match=r"wrong at element 123456 on rank 1: 1874\.0, expected 1873\.0"):
        all_reduce_speed(torch.device("cpu"), 2)


def test_ranks_that_do_not_divide_are_refused():
    require_divided(SimpleNamespace(name="fsdp", held=lambda: (130, 200)), 2)  # type: ignore[arg-type]
    require_divided(SimpleNamespace(name="ddp", held=lambda: (0, 0)), 2)  # type: ignore[arg-type]
    with pytest.raises(CheckFailed, match="fsdp: this process holds 200 of 200 elements that 2 should divide"):
        require_divided(SimpleNamespace(name="fsdp", held=lambda: (200, 200)), 2)  # type: ignore[arg-type]


def test_the_memory_line_by_hand():
    """A million weights trained, two million frozen of which one million are those of another role: 4 bytes each."""
    policy, frozen = nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    twice = [nn.Sequential(frozen), nn.Sequential(frozen, nn.Linear(1000, 1000, bias=False).requires_grad_(False))]
    whole = SimpleNamespace(divided=frozenset())
    assert "weights 0.01, gradients 0.00, optimizer 0.01; together 0.02" in memory_line(policy, twice, whole, 2)  # type: ignore
    parts = SimpleNamespace(divided=frozenset({"weights", "gradients", "optimizer"}))
    assert "weights 0.01 (1/2), gradients 0.00 (1/2)" in memory_line(policy, twice, parts, 2)  # type: ignore[arg-type]


def test_only_what_could_be_seen_is_missed():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    here = Peer.this(0)
    assert ended.poll() is None or ended.wait() == 0
    assert lost([here, Peer(1, "elsewhere", ended.pid, "another host")]) == ""
    assert lost([here, Peer(1, here.host, ended.pid, here.reach)], seconds=30).startswith(f"rank 1 (pid {ended.pid} on ")
