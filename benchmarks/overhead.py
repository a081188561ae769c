"""What it costs that a run can be killed anywhere: checkpoints, reseeding, digests and fsync, against the same run without.

Each run is one save interval of the reference configs (100 steps of SFT and of the reward model, 10 iterations of PPO) of a
Llama of four million random weights in float32, on one thread, ended by one checkpoint. Steps are short (512 tokens), which
puts the cost high: a checkpoint takes the same time whatever a step does. Runs are forks of this process and take turns.

Prints one JSON line. Of each stage, medians: CPU seconds of a whole run, with and without, and the difference in percent; CPU
and wall seconds of the one save; CPU seconds of a step, of reseeding and of digests; and what these three things add to the
interval's steps in percent, as measured inside the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf import digest
from rlhf.config.parse import parse
from rlhf.models.save import save_model
from rlhf.paths import STAGES
from rlhf.training import opening, session

WORDS = 4096
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": WORDS,
         "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
PROMPT, REPLY = 16, 48
"""Tokens."""
STEPS = {"sft": 100, "rm": 100, "ppo": 10}
"""`checkpoint.every` of configs/*.yaml."""
SIZES = {
    "sft": {"batch_size": 8, "micro_batch_size": 8},
    "rm": {"batch_size": 4, "micro_batch_size": 4},
    "ppo": {"rollout.batch_size": 8, "rollout.max_new_tokens": REPLY, "ppo.minibatch_size": 8, "ppo.epochs": 2,
            "micro_batch_size": 8},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        write_world(Path(place))
        stages = {stage: measured(Path(place), stage, arguments.repeats) for stage in STEPS}
    print(json.dumps({"benchmark": "overhead", "stages": stages}))


def write_world(place: Path) -> None:
    """model/, critic/ and rows of random words."""
    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{index}": index for index in range(2, WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(LlamaConfig(**SHAPE)), place / "model", tokenizer)
    save_model(LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)), place / "critic", tokenizer)

    def words(count: int) -> str:
        return " ".join(f"w{index}" for index in torch.randint(2, WORDS, (count,)).tolist())

    rows = {
        "sft": lambda: {"prompt": words(PROMPT), "completion": f" {words(REPLY)}"},
        "rm": lambda: {"prompt": words(PROMPT), "chosen": f" {words(REPLY)}", "rejected": f" {words(REPLY)}"},
        "ppo": lambda: {"prompt": words(PROMPT)},
    }
    for stage, row in rows.items():
        (place / f"{stage}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(1000)))


def measured(place: Path, stage: str, repeats: int) -> dict[str, float]:
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for repeat in range(repeats):
        for protected in (True, False) if repeat % 2 else (False, True):
            runs[protected].append(one_run(place, stage, protected, f"{stage}-{repeat}-{protected}"))

    def median(protected: bool, name: str) -> float:
        return statistics.median(run[name] for run in runs[protected])

    step, with_it, without = median(False, "step"), median(True, "run"), median(False, "run")
    inside = sum(median(True, name) for name in ("save", "reseed", "digests"))
    return {
        "run_cpu_s": round(with_it, 2),
        "run_without_cpu_s": round(without, 2),
        "side_by_side_percent": round(100 * (with_it / without - 1), 2),
        "step_cpu_s": round(step, 4),
        "save_cpu_s": round(median(True, "save"), 3),
        "save_wall_s": round(median(True, "save_wall"), 3),
        "reseed_cpu_s": round(median(True, "reseed"), 3),
        "digests_cpu_s": round(median(True, "digests"), 3),
        "of_step_time_percent": round(100 * inside / (step * STEPS[stage]), 2),
    }


def one_run(place: Path, stage: str, protected: bool, name: str) -> dict[str, float]:
    """Seconds of a fork that trains: CPU of the whole, of a step, and of each thing measured."""
    told, log = place / f"{name}.json", place / f"{name}.log"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = log.open("w", buffering=1)
            os.environ["RLHF_CACHE"] = str(place / f"{name}-cache")  # digests are made, not remembered
            told.write_text(json.dumps(train(place, stage, protected, name)))
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(log.read_text())
    return json.loads(told.read_text()) | {"run": usage.ru_utime + usage.ru_stime}


def train(place: Path, stage: str, protected: bool, name: str) -> dict[str, float]:
    spent = {"save": 0.0, "save_wall": 0.0, "reseed": 0.0, "digests": 0.0}
    ends: list[float] = []

    def timed(owner: Any, function: str, item: str) -> None:
        right = getattr(owner, function)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            cpu, wall = time.process_time(), time.monotonic()
            result = right(*arguments, **options)
            spent[item] += time.process_time() - cpu
            if item == "save":
                spent["save_wall"] += time.monotonic() - wall
            return result

        setattr(owner, function, wrapped)

    if protected:
        timed(session.Training, "save", "save")
        timed(session.Training, "_reseed", "reseed")
        timed(opening, "_manifest", "digests")
        timed(opening, "_begin", "digests")
        timed(session, "finish", "digests")
    else:
        leave_out(session.Training, "_reseed")
        leave_out(os, "fsync")
        for function in ("_hash", "_hash_mapped"):
            leave_out(digest, function, "0" * 64)
    report: Callable[..., Any] = session.Training.report

    def ended(*arguments: Any, **options: Any) -> Any:
        ends.append(time.process_time())
        return report(*arguments, **options)

    session.Training.report = ended
    models = {"model": place / "model"}
    if stage == "ppo":
        models = {"actor": place / "model", "critic": place / "critic", "reward": "count:w2"}
    fields = {
        "output": place / name,
        "data": place / f"{stage}.jsonl",
        "threads": 1,
        "schedule.unit": "steps",
        "schedule.length": STEPS[stage],
        "checkpoint.every": STEPS[stage] if protected else 0,
    }
    spec = importlib.util.spec_from_file_location(f"stage_{stage}", STAGES / f"{stage}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(parse(stage, [f"--{field}={value}" for field, value in (fields | SIZES[stage] | models).items()]))
    return spent | {"step": (ends[-1] - ends[0]) / (len(ends) - 1)}


def leave_out(owner: Any, function: str, value: Any = None) -> None:
    setattr(owner, function, lambda *_, **__: value)


if __name__ == "__main__":
    main()
