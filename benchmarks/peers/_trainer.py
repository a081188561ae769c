"""What TRL's trainers here share: the job, plain arguments, and turns at their step boundaries."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _turns import Turns
from transformers import AutoTokenizer, TrainerCallback

JOB: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
PLAIN = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
         "logging_steps": 10**6, "seed": 0, "dataloader_pin_memory": False}  # fmt: skip


def arguments(kind: Any, **more: Any) -> Any:
    """TrainingArguments that write nothing and train in the job's precision."""
    return kind(output_dir=tempfile.mkdtemp(), bf16=JOB["precision"] == "bf16", **(PLAIN | more))


def load(kind: Any, directory: str, **more: Any) -> Any:
    return kind.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False, **more)


def tokenizer_of(directory: str) -> Any:
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, padding_side="left")


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt as our stages render it: with the chat template where there is one."""
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


class CountsTokens:
    """Before a trainer among the bases: says the tokens of its last step, without pads."""

    tokens = 0

    def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        CountsTokens.tokens = int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *rest, **more)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def told(cls, _: int) -> dict[str, Any]:
        return {"tokens": cls.tokens}


class StepTurns(TrainerCallback):
    """A step is a turn; `told`, given its number, says what it did, and is not counted."""

    def __init__(self, told: Callable[[int], dict[str, Any]]) -> None:
        self.turns, self.told = Turns(), told

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        spent = time.process_time() - self.turns.cpu
        self.turns.end(cpu_s=spent, **self.told(state.global_step))
