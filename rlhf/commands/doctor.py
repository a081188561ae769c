"""`rlhf doctor`: what this machine can run, and why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf.config.arguments import Parser
from rlhf.runs.manifest import versions

USAGE = """\
rlhf doctor [--json]

  Versions, devices, memory, disk, cores; each optional package, imported in a process of its own, with its own words where that
  fails; and which launch files work here. Nothing is changed."""

OPTIONAL = {
    "deepspeed": "--launch zero1, zero2, zero3",
    "transformer_engine.pytorch": "fp8.backend te",
    "torchao": "fp8.backend torchao",
    "bitsandbytes": "lora.base nf4",
    "gguf": ".gguf models",
    "llguidance": "json_schema of generate",
    "sentencepiece": "SentencePiece vocabularies",
    "vllm": "a server for rollout.engine vllm",
    "tensorboard": "report.trackers tensorboard",
    "wandb": "report.trackers wandb",
    "trackio": "report.trackers trackio",
    "mlflow": "report.trackers mlflow",
}
"""A module, and what needs it."""

EXTRAS = {
    "deepspeed": "deepspeed",
    "transformer_engine": "fp8",
    "torchao": "torchao",
    "bitsandbytes": "qlora",
    "gguf": "gguf",
    "llguidance": "json-schema",
    "sentencepiece": "sentencepiece",
    "vllm": "vllm",
    "tensorboard": "trackers",
}
"""The extra of rlhf that has the package; one without is installed by its name."""

NEEDS_GPU = ("gpu", "multinode")
IMPORT_SECONDS = 120


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("--json", action="store_true", dest="as_json")
    as_json = parser.parse_args(argv).as_json
    found = examined()
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))
    return 0


def examined() -> dict[str, Any]:
    with ThreadPoolExecutor(2) as pool:  # each import is a process, and takes seconds
        packages = dict(zip(OPTIONAL, pool.map(import_error, OPTIONAL), strict=True))
    devices = _devices()
    return {
        "versions": versions(),
        "devices": devices,
        "memory_gb": _memory(),
        "disk_gb": round(shutil.disk_usage(os.getcwd()).free / 1e9, 1),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "packages": packages,
        "launch": _launch_files(devices, packages),
    }


def import_error(module: str) -> str | None:
    """How to install it where it is not there; what importing it says last, where that fails; None where it works. It can do
    this process no harm."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end of its import within {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or [f"its import ended with {done.returncode}"])[-1]
    package = module.split(".")[0]
    if said != f"ModuleNotFoundError: No module named {package!r}":  # another name would be one that it needs
        return said
    what = f"'rlhf[{EXTRAS[package]}]'" if package in EXTRAS else package
    return f"not installed: pip install {what}"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    names = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{one.name}, {one.total_memory / 1e9:.0f} GB" for one in names]


def _memory() -> float:
    import torch

    from rlhf.training.memory import available

    return round(available(torch.device("cpu")) / 1e9, 1)


def _launch_files(devices: list[str], packages: dict[str, str | None]) -> dict[str, str | None]:
    """Why each of the shipped launch files does not work here; None where it does."""
    from rlhf.paths import CONFIGS

    reasons: dict[str, str | None] = {}
    for file in sorted((CONFIGS / "launch").glob("*.yaml")):
        name = file.stem
        reasons[name] = None
        if name.startswith("zero") and packages["deepspeed"]:
            reasons[name] = f"DeepSpeed: {packages['deepspeed']}"
        elif name in NEEDS_GPU and not devices:
            reasons[name] = "no GPU that torch can use"
    return reasons


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["versions  " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines.append(f"devices   {', '.join(found['devices']) or 'no GPU; the CPU runs everything, FP8 emulated'}")
    threads = found["OMP_NUM_THREADS"] or "not set"
    lines.append(f"machine   {found['cores']} cores, OMP_NUM_THREADS {threads}, {found['memory_gb']} GB memory available, ")
    lines[-1] += f"{found['disk_gb']} GB disk free here"
    for name, reason in found["packages"].items():
        lines.append(f"package   {'no ' if reason else 'yes'}  {name} ({OPTIONAL[name]})" + (f": {reason}" if reason else ""))
    for name, reason in found["launch"].items():
        lines.append(f"launch    {'no ' if reason else 'yes'}  {name}" + (f": {reason}" if reason else ""))
    return lines
