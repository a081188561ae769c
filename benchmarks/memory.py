"""What one base for all roles saves: peak memory of a PPO run of one iteration, roles.mode `adapters` against `separate`.

The model is a Llama of SmolLM2-135M's shape, random weights in float32; actor and critic have LoRA of rank 8, the reward model
is an adapter on the same base. 4 prompts of 16 tokens, replies of 16, micro-batches of 1, gradient checkpointing as in
configs/ppo.yaml. Each run is a process of its own, one after the other; its peak is ru_maxrss from the imports to the saved
result. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1,
         "pad_token_id": 0}  # fmt: skip
PROMPTS, PROMPT_TOKENS, REPLY_TOKENS, MICRO_BATCH, RANK = 4, 16, 16, 1, 8

LORA = f"--lora.rank={RANK}"
RUNS = {
    "adapters": ("--roles.mode=adapters", LORA),
    "separate": ("--roles.mode=separate", LORA),
    "separate_without_lora": ("--roles.mode=separate",),
}
STAGE = Path(__file__).parents[1] / "stages" / "ppo.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary directory)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_models(arguments.write)
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        subprocess.run([sys.executable, __file__, "--write", place], check=True)
        peaks = {name: peak(Path(place), name, options) for name, options in RUNS.items()}
    ratio = round(peaks["adapters"] / peaks["separate"], 3)
    print(json.dumps({"benchmark": "memory", "peak_mib": peaks, "adapters_over_separate": ratio}))


def write_models(place: Path) -> None:
    """model/, and rm/ as an adapter on it, over the tokenizer of the tests."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf.config.sections import Lora
    from rlhf.models.load import Loading, load_scalar
    from rlhf.models.lora import add_lora
    from rlhf.models.save import save_model
    from rlhf.models.source import resolve
    from rlhf.training.tiny import WORDS, write_tiny_model

    write_tiny_model(place / "tiny", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny" / "model", trust_remote_code=False)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    trunk, base = load_scalar(str(place / "model"), Loading(), new_head=True), resolve(str(place / "model"))
    save_model(add_lora(trunk, base, Lora(rank=RANK), scalar=True, seed=0), place / "rm", tokenizer)
    prompt = {"prompt": " ".join(WORDS[index % len(WORDS)] for index in range(PROMPT_TOKENS))}
    (place / "prompts.jsonl").write_text(f"{json.dumps(prompt)}\n" * PROMPTS)


def peak(place: Path, name: str, options: tuple[str, ...]) -> int:
    """MiB"""
    fields = {
        "actor": place / "model", "critic": "zero", "reward": place / "rm", "data": place / "prompts.jsonl", "threads": 1,
        "gradient_checkpointing": "true",
        "output": place / name, "schedule.length": 1, "checkpoint.every": 0, "micro_batch_size": MICRO_BATCH, "ppo.epochs": 1,
        "rollout.batch_size": PROMPTS, "ppo.minibatch_size": PROMPTS, "rollout.max_new_tokens": REPLY_TOKENS,
        "rollout.generation_batch_size": MICRO_BATCH,
    }  # fmt: skip
    command = [sys.executable, str(STAGE), *(f"--{field}={value}" for field, value in fields.items()), *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    errors = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(errors)
    return usage.ru_maxrss // 1024


if __name__ == "__main__":
    main()
