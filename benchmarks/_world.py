"""Models of random weights and rows of random words, the same for us and for the peers.

A word is `w` and its token id, so a row's text says its ids. `python benchmarks/_world.py PLACE SHAPE P` writes the models in a
process of its own, as those who measure import no torch.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _sides import environment

PAD, END = 0, 1
COMMON = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}
TINY = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8, "tie_word_embeddings": False} | COMMON  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": TINY | {"vocab_size": 1024},
    "tiny-49k": TINY | {"vocab_size": 49152},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True} | COMMON,
}  # fmt: skip
"""Llamas: four million weights with a small and a large vocabulary, and SmolLM2-135M's."""
for _hidden in (128, 384, 512, 768):
    _sizes = {"hidden_size": _hidden, "intermediate_size": 43 * _hidden // 16, "num_attention_heads": _hidden // 32}
    SHAPES[f"tiny-h{_hidden}"] = SHAPES["tiny"] | _sizes | {"num_key_value_heads": _hidden // 32}
NEVER = 1e-9
RANK = 8


def models(place: Path, shape: str, end_probability: float = NEVER) -> Path:
    """The directory of policy/, reward/ and reward-adapter/, written where it is not there yet.

    Args:
        end_probability: of the end of a reply at each of its tokens.
    """
    directory = place / f"{shape}-{end_probability:.3g}"
    if not (directory / "complete").exists():
        command = [sys.executable, __file__, directory, shape, str(end_probability)]
        subprocess.run(command, env=environment(1), check=True, stdout=sys.stderr)
    return directory


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(chance: random.Random, count: int, vocabulary: int) -> str:
    return " ".join(f"w{chance.randrange(2, vocabulary)}" for _ in range(count))


def write_models(directory: Path, shape: str, end_probability: float) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from rlhf.models.save import save_model

    sizes = SHAPES[shape]
    vocabulary = {"<pad>": PAD, "<end>": END} | {f"w{index}": index for index in range(2, sizes["vocab_size"])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=2048
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**sizes))
    set_end_probability(policy, end_probability)
    reward = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1))
    # A reward model trained with its lower half frozen has the policy's, which is what `frozen_layers` can share.
    lower, count = policy.model.state_dict(), sizes["num_hidden_layers"] // 2
    upper = tuple(f"layers.{layer}." for layer in range(count, sizes["num_hidden_layers"]))
    reward.model.load_state_dict(
        {name: own if name.startswith(upper) else lower[name] for name, own in reward.model.state_dict().items()}
    )
    save_model(policy, directory / "policy", tokenizer)
    save_model(reward, directory / "reward", tokenizer)
    write_adapter(directory, tokenizer)
    (directory / "complete").touch()


def write_adapter(directory: Path, tokenizer: Any) -> None:
    """reward-adapter/: a reward model as an adapter on policy/, which PPO's mode `adapters` wants."""
    from rlhf.config.sections import Lora
    from rlhf.models.load import Loading, load_scalar
    from rlhf.models.lora import add_lora
    from rlhf.models.save import save_model
    from rlhf.models.source import resolve

    trunk, base = load_scalar(str(directory / "policy"), Loading(), new_head=True), resolve(str(directory / "policy"))
    save_model(add_lora(trunk, base, Lora(rank=RANK), scalar=True, seed=0), directory / "reward-adapter", tokenizer)


def set_end_probability(model: Any, probability: float) -> None:
    """Gives EOS about this probability after any text.

    A Llama's head has no bias. One component of all embeddings is made the same, so that it is nearly constant in the last
    hidden state, and its weight in the row of EOS is a bias.
    """
    import torch

    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = embedding.norm(dim=1).mean()
        ids = torch.randint(2, len(embedding), (4, 64))
        logits = model(ids).logits.flatten(0, 1)
        others = torch.cat([logits[:, :END], logits[:, END + 1 :]], 1).logsumexp(1)
        wanted = (others + math.log(probability / (1 - probability)) - logits[:, END]).mean()
        component = model.model(ids).last_hidden_state[..., 0].mean()
        head[END, 0] += wanted / component


if __name__ == "__main__":
    write_models(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
