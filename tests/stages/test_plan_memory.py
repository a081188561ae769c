"""The peak of a stage as it runs against the plan's, within 15%, in every kind of configuration.

Measured is the largest resident memory of a fork beyond what it had when all was imported and no weight opened. As in
`rlhf plan --measure`, glibc gives freed blocks back at once (mallopt), so that it is the peak of what is alive.
"""

from __future__ import annotations

import ctypes
import json
import random
from pathlib import Path

import pytest
import torch
from harness import fork, stage_module, wait
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import rlhf.models.lora  # noqa: F401  # or its import would be a part of what is measured
from rlhf.config.engines import Engine
from rlhf.config.parse import parse
from rlhf.models.save import save_model
from rlhf.training.plan.making import Stages
from rlhf.training.plan.probe import status_of_process
from rlhf.training.session import Training

WITHIN = 0.15
M_MMAP_THRESHOLD = -3
"""mallopt(3), glibc"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")


def write_model(place: Path, vocabulary: int, **sizes: int) -> None:
    """policy/ and reward/: Llamas of random weights, whose pieces are w2, w3, ..."""
    pieces = {"<pad>": 0, "<end>": 1} | {f"w{index}": index for index in range(2, vocabulary)}
    backend = Tokenizer(WordLevel(pieces, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=vocabulary, eos_token_id=1, pad_token_id=0, bos_token_id=None, num_attention_heads=8, **sizes
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    policy.lm_head.weight.data *= 10
    policy.lm_head.weight.data[1] = 0  # beside logits of deviation 3: no reply ends before its time
    save_model(policy, place / "policy", tokenizer)
    scalar = LlamaForSequenceClassification(LlamaConfig.from_dict({**config.to_dict(), "num_labels": 1}))
    save_model(scalar, place / "reward", tokenizer)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("plans")
    write_model(place / "small", 512, hidden_size=16, intermediate_size=16, num_hidden_layers=4)
    write_model(place / "deep", 512, hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    write_model(place / "wide", 16384, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{chance.randrange(2, 512)}" for _ in range(count))

    rows = {
        "chats": lambda: {"prompt": words(32), "completion": words(95)},
        "short": lambda: {"prompt": words(8), "completion": words(23)},
        "pairs": lambda: {"prompt": words(64), "chosen": words(63), "rejected": words(63)},
        "prompts": lambda: {"prompt": words(32)},
    }
    for name, make in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(32)))
    return place


def asked(worlds: Path, output: Path, stage: str, model: str, data: str, *more: str) -> list[str]:
    roles = ["--model={0}/policy"] if stage not in ("ppo", "grpo") else ["--actor={0}/policy", "--reward={0}/reward"]
    common = [
        f"--data={worlds}/{data}.jsonl",
        f"--output={output}",
        "--threads=1",
        "--schedule.unit=steps",
        "--schedule.length=2",
    ]
    return [*(role.format(worlds / model) for role in roles), *common, "--checkpoint.every=0", *more]


def measured(stage: str, small: list[str], arguments: list[str], told: Path, log: Path) -> float:
    """Bytes at the last step's end. A small run goes before: a fork has next to no page of the libraries in its memory yet."""

    def body() -> None:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
        stage_module(stage).main(parse(stage, small))
        ctypes.CDLL(None).malloc_trim(0)  # what tests before this one have left free would hide as much of what is asked for
        base, report = status_of_process("VmRSS"), Training.report

        def reported(*words):
            told.write_text(str(status_of_process("VmHWM") - base))
            return report(*words)

        Training.report = reported  # in the fork
        stage_module(stage).main(parse(stage, arguments))

    assert wait(fork(body, log=log)) == 0, log.read_text()
    return float(told.read_text())


ROLLOUT = ("--rollout.batch_size=12", "--rollout.max_new_tokens=64")
CONFIGS = {
    "sft, a vocabulary that outweighs the rest": ("sft", "wide", "short", "--batch_size=16", "--micro_batch_size=16"),
    "dpo, replies that share a prompt": ("dpo", "deep", "pairs", "--batch_size=7", "--micro_batch_size=7"),
    "sft, several micro-batches": ("sft", "deep", "chats", "--batch_size=16", "--micro_batch_size=8"),
    "sft, one micro-batch": ("sft", "deep", "chats", "--batch_size=16", "--micro_batch_size=16"),
    "sft, activations computed again": ("sft", "deep", "chats", "--batch_size=32", "--gradient_checkpointing=true",
                                        "--micro_batch_size=32"),
    "sft, adapters": ("sft", "deep", "chats", "--batch_size=8", "--micro_batch_size=8", "--lora.rank=8"),
    "sft, layers frozen": ("sft", "deep", "chats", "--batch_size=16", "--micro_batch_size=16", "--frozen_layers=2"),
    "rm": ("rm", "deep", "pairs", "--batch_size=8", "--micro_batch_size=8"),
    "ppo": ("ppo", "deep", "prompts", *ROLLOUT, "--ppo.minibatch_size=12", "--ppo.epochs=1"),
    "ppo, one trunk": ("ppo", "deep", "prompts", *ROLLOUT, "--ppo.minibatch_size=12", "--ppo.epochs=1", "--roles.mode=shared"),
}  # fmt: skip
QUICK = list(CONFIGS)[:2]


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_the_peak_is_the_planned_one(name, worlds, tmp_path):
    stage, *rest = CONFIGS[name]
    arguments = asked(worlds, tmp_path / "run", stage, *rest)
    small = asked(worlds, tmp_path / "small", stage, "small", *rest[1:])
    plan = Stages(parse(stage, arguments).config)
    planned = plan.need(Engine("ddp", 0), 1)
    peak = measured(stage, small, arguments, tmp_path / "peak", tmp_path / "log")
    print(f"| {name} | {planned.peak / 1e6:.0f} | {peak / 1e6:.0f} | {planned.peak / peak - 1:+.1%} |")
    assert planned.peak == pytest.approx(peak, rel=WITHIN)
    assert planned.lasting != pytest.approx(peak, rel=WITHIN)  # weights and moments alone would be seen to fall short
