"""`rlhf convert` against `cp` and fsync of the same bytes: a random llama of 740M parameters, fp16, both ways, TP 2 x PP 2.

Prints one JSON line: medians of wall seconds and their ratio to cp, CPU seconds, and the peak of anonymous memory above that of
the same command on a tiny model, as a part of the weights. Needs 8 GB of disk and a Linux /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4}
GRID = ("--tp", "2", "--pp", "2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        print(json.dumps(measured(Path(place), arguments.layers, arguments.repeats)))


def measured(place: Path, layers: int, repeats: int) -> dict[str, object]:
    model(place / "hf", layers, 32000, SIZES)
    model(place / "tiny", 4, 512, TINY)
    weights = sum(file.stat().st_size for file in (place / "hf").glob("*.safetensors"))
    jobs = {
        "hf_to_megatron": (place / "hf", place / "megatron", ("--to", "megatron", *GRID)),
        "megatron_to_hf": (place / "megatron", place / "back", ("--to", "hf")),
    }
    own = {
        "hf_to_megatron": converted(place / "tiny", place / "tiny-megatron", ("--to", "megatron", *GRID))[2],
        "megatron_to_hf": converted(place / "tiny-megatron", place / "tiny-back", ("--to", "hf"))[2],
    }
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in jobs}
    copies: list[float] = []
    for _ in range(repeats):
        copies.append(copied(place / "hf", place / "copy"))
        for name, (source, destination, options) in jobs.items():
            shutil.rmtree(destination, ignore_errors=True)
            runs[name].append(converted(source, destination, options))
    copy = statistics.median(copies)
    result: dict[str, object] = {"benchmark": "convert", "weights_gb": weights / 1e9, "cp_seconds": copy}
    for name, seen in runs.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*seen, strict=True))
        result[name] = {
            "wall_seconds": wall,
            "wall_over_cp": wall / copy,
            "cpu_seconds": cpu,
            "anonymous_memory_over_weights": (peak - own[name]) / weights,
        }
    return result


def model(directory: Path, layers: int, vocabulary: int, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).half().save_pretrained(directory)


def copied(source: Path, destination: Path) -> float:
    shutil.rmtree(destination, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *destination.iterdir()], check=True)
    return time.perf_counter() - began


def converted(source: Path, destination: Path, options: tuple[str, ...]) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak RssAnon in bytes)"""
    with tempfile.TemporaryDirectory(dir=destination.parent) as cache:  # or the second run would know the digests of the first
        return _converted(source, destination, options, {**os.environ, "RLHF_CACHE": cache})


def _converted(
    source: Path, destination: Path, options: tuple[str, ...], environment: dict[str, str]
) -> tuple[float, float, int]:
    began, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "rlhf", "convert", str(source), str(destination), *options]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.002)
    if child.returncode:
        assert child.stderr is not None
        sys.exit(child.stderr.read().decode())
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu, peak


def anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
