"""`rlhf convert`: a checkpoint into another format, or an adapter into its base."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from rlhf import digest
from rlhf.config.arguments import Parser, positive
from rlhf.errors import OutputError, UsageError

USAGE = """\
rlhf convert SRC DST --to hf|megatron|te|bf16|fp8 [--dry-run] [--verify [--reference DIR]] [--json]

  SRC is a Megatron checkpoint (legacy, core, torch_dist; its root or one iteration), a Hugging Face directory, a run,
  a LoRA adapter or FSDP's shards (--to hf merges them), a .gguf file (--to hf).
  What it is, how it is spread over ranks and every size are found out. What cannot be known:
    --config DIR            a Hugging Face directory of the same model: config.json and tokenizer come from it
    --family NAME           the table of names to use; an unknown name lists them
    --rotary-base N         where neither args nor config.json say
    --contiguous-gate       ranks hold the rows of [gate; up] one after the other (Pai's gpt3_llama converter, v0.5.1)
  --to megatron and --to te (Transformer Engine's TransformerLayer):
    --tp N --pp N --vpp N --ep N                           ranks to spread over (default: 1)
    --names transformer-engine|local|legacy                (default: transformer-engine; --to te has its own)
    --layout torch|torch_dist                              (default: torch; torch_dist fits any ranks)
  --to bf16 and --to fp8 change the precision of a Hugging Face directory: E4M3 with a factor for each 128 x 128 block.
  --shard-gb N              size of a safetensors file (default: 5)
  --dry-run prints every tensor, its target and the operation, and touches nothing; --verify compares logits (exit 1)."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", choices=("hf", "megatron", "te", "bf16", "fp8"), required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--family")
    parser.add_argument("--rotary-base", type=float)
    parser.add_argument("--contiguous-gate", action="store_true")
    for ranks in ("tp", "pp", "vpp", "ep"):
        parser.add_argument(f"--{ranks}", type=positive, default=1)
    parser.add_argument("--names", choices=("transformer-engine", "local", "legacy"), default="transformer-engine")
    parser.add_argument("--layout", choices=("torch", "torch_dist"), default="torch")
    parser.add_argument("--shard-gb", type=float, default=5)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)
    if given.reference and not given.verify:
        raise UsageError("--reference: only --verify compares with it; give both")
    if not 1e-9 <= given.shard_gb < 1e9:
        raise UsageError("--shard-gb: expected a number above 0")

    from rlhf.checkpoints.directory import weight_files
    from rlhf.models.source import resolve

    source = given.source
    if (source / "run.json").is_file():
        source = Path(resolve(str(source)).path)
    if (source / "adapter_config.json").is_file():
        return _as_plain_model(source, "LoRA adapter", "merges", "merged into its base", given)
    if source.suffix == ".gguf" and source.is_file():
        return _as_plain_model(source, "GGUF file", "writes", "dequantised to float32", given)
    if not given.dry_run:
        digest.begin(weight_files(source))
    # Pages of 2 MB for tensors that come and go: pages of 4 kB cost 0.7 s for 1.5 GB. Torch asks when it is imported.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from rlhf.checkpoints.command import convert  # a second or two, in which the files are hashed
    from rlhf.checkpoints.convert import Request
    from rlhf.checkpoints.sizes import Grid

    request = Request(
        source=source,
        destination=given.destination,
        to=given.to,
        family=given.family,
        config=given.config,
        rotary_base=given.rotary_base,
        grid=Grid(given.tp, given.pp, given.vpp, given.ep),
        names=given.names,
        layout=given.layout,
        contiguous_gate=given.contiguous_gate,
        shard_bytes=int(given.shard_gb * 1e9),
    )
    return convert(request, given.dry_run, given.verify, given.reference, given.as_json)


def _as_plain_model(source: Path, kind: str, does: str, what: str, given: argparse.Namespace) -> int:
    """What models/ opens by itself is written as a Hugging Face directory; nothing else can be asked for."""
    if given.to != "hf":
        raise UsageError(f"{source}: a {kind}; --to hf {does} it ({what}), and the result converts to {given.to}")
    for name in ("verify", "config", "family", "rotary_base", "contiguous_gate"):
        if getattr(given, name):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: {source} is a {kind}, which is {what} and nothing else; leave it out")
    if given.destination.exists():
        raise OutputError(f"{given.destination}: is there already; name another directory, or remove it")
    if not given.dry_run:
        from rlhf.models.save import save_merged

        save_merged(str(source), given.destination)
    if given.as_json:
        print(json.dumps({"from": kind, "to": f"Hugging Face, {what}", "destination": str(given.destination)}))
    else:
        outcome = "would be " if given.dry_run else ""
        print(f"convert  the {kind} {source}, {outcome}{what}: {given.destination}")
    return 0
