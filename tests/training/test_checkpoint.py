"""What a training checkpoint holds and how many are kept; what cannot spoil it is in tests/faults."""

from __future__ import annotations

import torch

from rlhf.training import checkpoint

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"w.exp_avg": torch.ones(2, 3)}}
STATE = {"training": {"step": 3, "tokens": 0.1 + 0.2}, "kl": {"coef": 1 / 3}}


def quiet(text: str) -> None: ...


def test_round_trip_to_the_bit(tmp_path):
    checkpoint.save(tmp_path, 3, TENSORS, STATE, keep=2)
    found = checkpoint.latest(tmp_path, quiet)
    assert found is not None
    assert found.step == 3
    assert found.state() == STATE
    assert all(torch.equal(found.tensors(n)[k], v) for n, part in TENSORS.items() for k, v in part.items())
    assert checkpoint.latest(tmp_path / "nothing", quiet) is None


def test_rotation_keeps_the_newest(tmp_path):
    for step in (2, 10, 9, 11):
        checkpoint.save(tmp_path, step, TENSORS, STATE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
