"""Sampling replies: the native engine against transformers' `generate` with a KV cache, same model, prompts and temperature.

Three settings, the two sides in turn. `equal`: one batch, every reply as long as allowed. `varying`: more prompts than slots,
replies end at uniformly distributed lengths; `generate` takes batches of as many rows as there are slots. `prompts`: as
`varying`, with prompts of many lengths, which `generate` is given sorted by length.

How replies end is in the model, so it is the same for both sides: a hook sets the logit of the end token from the position
alone, such that of the replies not yet ended 1 in (longest - place) ends at each place from the shortest length on. The logits
of the other tokens are near 0 in a random model, so their sum is near the vocabulary's size.

Prints one JSON line. Of each setting: tokens of replies per CPU second, medians of both sides and of the ratios of neighbours,
with the smallest and largest. `alone`: rows whose tokens differ from those of the same seed sampled one at a time, and how many
of these by a near-tie (the number drawn lay within 1e-5 of the border between the two tokens in float64).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models.actor_critic import ActorCritic
from rlhf.rollout.engines import NativeEngine
from rlhf.rollout.sampling import Sampling, uniform

PAD, END = 0, 1
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama-256x4": (
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1024},
        {"slots": 32, "waiting": 128, "prompt": 16, "reply": 64, "shortest": 8, "longest": 128},
    ),
    "smollm2-135m": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152},
        {"slots": 8, "waiting": 24, "prompt": 16, "reply": 32, "shortest": 4, "longest": 64},
    ),
}  # fmt: skip


class Setting:
    def __init__(self, name: str, model: LlamaForCausalLM, sizes: dict[str, int]) -> None:
        self.name, self.model, self.slots = name, model, sizes["slots"]
        self.ends = name != "equal"
        self.longest = sizes["longest" if self.ends else "reply"]
        random = torch.Generator().manual_seed(0)
        count, length = sizes["waiting" if self.ends else "slots"], sizes["prompt"]
        lengths = torch.randint(length // 2, 2 * length, (count,), generator=random) if name == "prompts" else [length] * count
        self.prompts = [torch.randint(2, model.config.vocab_size, (int(n),), generator=random).tolist() for n in lengths]
        place = torch.arange(self.longest + 2)
        hazard = (1 / (self.longest - place).clamp(min=1)).where(place >= sizes["shortest"] - 1, 0).clamp(max=1 - 1e-6)
        self.end_logits = (hazard / (1 - hazard)).log() + torch.tensor(model.config.vocab_size - 1).log()
        if not self.ends:
            self.end_logits = torch.full_like(self.end_logits, -torch.inf)

    def hook(self) -> Any:
        """Sets the end token's logit. `place` counts from the end of the shortest prompt: a longer one has a shorter reply."""

        def set_logit(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
            place = kwargs["position_ids"][:, -1] - (min(map(len, self.prompts)) - 1)
            output.logits[:, -1, END] = self.end_logits.to(output.logits)[place.clamp(0, len(self.end_logits) - 1)]

        return self.model.register_forward_hook(set_logit, with_kwargs=True)

    def ours(self, repeat: int) -> int:
        samples = self.engine(self.slots).generate(self.prompts, Sampling(self.longest), self.seeds(repeat))
        return sum(map(len, samples.responses))

    def engine(self, slots: int) -> NativeEngine:
        engine = NativeEngine(nullcontext, [END], PAD, slots)
        engine.sync(ActorCritic(actor=self.model), 0)
        return engine

    def seeds(self, repeat: int) -> list[int]:
        return [repeat * 2**32 + row * 7919 for row in range(len(self.prompts))]

    @torch.no_grad()
    def theirs(self, repeat: int) -> int:
        torch.manual_seed(repeat)
        tokens, prompts = 0, sorted(self.prompts, key=len)
        for start in range(0, len(prompts), self.slots):
            batch = prompts[start : start + self.slots]
            length = len(batch[-1])
            ids = torch.tensor([[PAD] * (length - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch])
            replies = self.model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.longest,
                eos_token_id=END, pad_token_id=PAD, use_cache=True,
            )[:, length:]  # fmt: skip
            before_end = ((replies == END).cumsum(1) - (replies == END).int()) == 0
            tokens += int(before_end.sum())
        return tokens

    def alone(self, rows: int) -> dict[str, int]:
        together = self.engine(self.slots).generate(self.prompts, Sampling(self.longest), self.seeds(0)).responses
        differ, ties = 0, 0
        exact = copy.deepcopy(self.model).double()
        rows = min(rows, len(self.prompts))
        for row in range(rows):
            prompt, seed = self.prompts[row], self.seeds(0)[row]
            single = self.engine(1).generate([prompt], Sampling(self.longest), [seed]).responses[0]
            if single != together[row]:
                differ += 1
                ties += near_tie(exact, prompt, seed, single, together[row])
        return {"rows": rows, "differ": differ, "near_ties": ties}


@torch.no_grad()
def near_tie(model: LlamaForCausalLM, prompt: list[int], seed: int, one: list[int], other: list[int]) -> bool:
    place = next(index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    ids = torch.tensor([prompt + one[:place]])
    logits = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0, -1]
    borders = logits.softmax(-1).cumsum(-1)[min(one[place], other[place]) : max(one[place], other[place])]
    return bool((borders - uniform(torch.tensor([seed]), place)).abs().max() < 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-256x4")
    parser.add_argument(
        "--settings", nargs="+", choices=("equal", "varying", "prompts"), default=["equal", "varying", "prompts"]
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", type=int, default=32, help="rows that are sampled one at a time as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, sizes = MODELS[arguments.model]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=END, pad_token_id=PAD)
    )
    results = {}
    for name in arguments.settings:
        setting = Setting(name, model.eval(), sizes)
        hook = setting.hook()
        results[name] = measured(setting, arguments.repeats) | {"alone": setting.alone(arguments.alone)}
        hook.remove()
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "rollout", "model": arguments.model, "threads": arguments.threads} | about | results))


def measured(setting: Setting, repeats: int) -> dict[str, Any]:
    setting.ours(0), setting.theirs(0)
    found: dict[str, list[float]] = {"ours": [], "generate": []}
    for repeat in range(repeats):
        for side in ("ours", "generate") if repeat % 2 else ("generate", "ours"):
            before = time.process_time()
            tokens = setting.ours(repeat) if side == "ours" else setting.theirs(repeat)
            found[side].append(tokens / (time.process_time() - before))
    ratios = [one / other for one, other in zip(found["ours"], found["generate"], strict=True)]
    return {f"{side}_tokens_per_cpu_s": spread(values, 0) for side, values in found.items()} | {"ratio": spread(ratios, 2)}


def spread(values: list[float], digits: int) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


if __name__ == "__main__":
    main()
