"""What a start costs: the words that only print, and a stage up to its first optimizer step, against importing what it needs.

Each figure is CPU seconds, user and system, of fresh processes with bytecode cached, on one thread; all take turns, `--repeats`
of each after one that is not counted. `import` is a process that imports torch, transformers' LlamaForCausalLM and tokenizer,
and Accelerator, and nothing else; a stage trains a Llama of two layers on 16 rows. Both are measured at the moment the last
import, or the first step, is done: ending an interpreter is no part of a start. `launcher` is the process of `rlhf STAGE`
itself, without the stage that it starts.

Prints one JSON line: of each, the median and the spread (lowest, highest); of each stage its ratio to `import`, the median of
ratios within a turn, without and with the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf.paths import STAGES

REPORT = """
import os, resource
def report(children):
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)[: 1 + children]]
    print("CPU", sum(usage.ru_utime + usage.ru_stime for usage in spent), flush=True)
    os._exit(0)
"""
IMPORT = """
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
report(True)
"""
FIRST_STEP = """
import runpy, sys
from rlhf.training.session import Training
right = Training.optimizer_step
def optimizer_step(*arguments, **options):
    right(*arguments, **options)
    report(True)
Training.optimizer_step = optimizer_step
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
LAUNCHER = """
import sys
from rlhf.cli import main
assert main(sys.argv[1:]) == 0
report(False)
"""
WORLD = """
import json, sys, torch
from pathlib import Path
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from rlhf.models.save import save_model
place = Path(sys.argv[1])
words = ["<pad>", "<end>", *(f"w{number}" for number in range(62))]
backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
backend.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
             tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
save_model(LlamaForCausalLM(LlamaConfig(**shape)), place / "model", tokenizer)
save_model(LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)), place / "critic", tokenizer)
prompts = [f"w{row} w{row + 1} w{row + 2}" for row in range(16)]
rows = {"sft": {"completion": " w1 w2"}, "rm": {"chosen": " w1 w2", "rejected": " w3"}, "ppo": {}}
for stage, row in rows.items():
    (place / f"{stage}.jsonl").write_text("".join(json.dumps({"prompt": prompt} | row) + "\\n" for prompt in prompts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as place:
        world = Path(place)
        python(WORLD, str(world))
        measures = all_measures(world)
        turns = [{name: measure(world, name, program) for name, program in measures.items()} for _ in range(1 + repeats)][1:]
    print(json.dumps({"benchmark": "startup", "cpu_s": {name: summary(turns, name) for name in measures}, **ratios(turns)}))


def all_measures(world: Path) -> dict[str, tuple[str, ...]]:
    """By name: arguments of Python, with `RUN` for the directory of the run."""
    models = {
        "sft": f"--model {world}/model --batch-size 4",
        "rm": f"--model {world}/model --batch-size 4",
        "ppo": f"--actor {world}/model --critic {world}/critic --reward count:w1 --rollout.batch-size 4 "
        "--rollout.max-new-tokens 4 --ppo.minibatch-size 4 --ppo.epochs 1",
    }
    common = "--output RUN --threads 1 --schedule.length 1 --schedule.unit steps"
    flags = {stage: f"{own} --data {world}/{stage}.jsonl {common}".split() for stage, own in models.items()}
    words = {
        "rlhf --help": ["--help"],
        "rlhf ppo --help": ["ppo", "--help"],
        "rlhf ppo --dry-run": ["ppo", *flags["ppo"], "--dry-run"],
    }
    return (
        {name: ("-m", "rlhf", *arguments) for name, arguments in words.items()}
        | {"import": ("-c", REPORT + IMPORT)}
        | {stage: ("-c", REPORT + FIRST_STEP, str(STAGES / f"{stage}.py"), *flags[stage]) for stage in flags}
        | {f"launcher of {stage}": ("-c", REPORT + LAUNCHER, stage, *flags[stage]) for stage in flags}
    )


def measure(world: Path, name: str, arguments: tuple[str, ...]) -> float:
    """CPU seconds: what the process reports, or else those of the whole process."""
    run = tempfile.mkdtemp(dir=world)
    before = os.times()
    said = python(*[word.replace("RUN", run) for word in arguments[1:]], option=arguments[0])
    after = os.times()
    reported = [line.split()[1] for line in said.splitlines() if line.startswith("CPU ")]
    if reported:
        return float(reported[-1])
    return after.children_user + after.children_system - before.children_user - before.children_system


def python(*arguments: str, option: str = "-c") -> str:
    # PYTHONDONTWRITEBYTECODE would have every process compile this package again
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, option, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def summary(turns: list[dict[str, float]], name: str) -> dict[str, float]:
    values = [turn[name] for turn in turns]
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def ratios(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    def ratio(stage: str, launcher: bool) -> float:
        return round(
            statistics.median((turn[stage] + launcher * turn[f"launcher of {stage}"]) / turn["import"] for turn in turns), 3
        )

    stages = ("sft", "rm", "ppo")
    return {
        "first_step_over_import": {stage: ratio(stage, launcher=False) for stage in stages},
        "with_launcher_over_import": {stage: ratio(stage, launcher=True) for stage in stages},
    }


if __name__ == "__main__":
    main()
