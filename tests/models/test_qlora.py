"""LoRA on a base in 4 bits. The base is compared with bitsandbytes' own functions on the plain weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.config.schema import PpoConfig, SftConfig
from rlhf.data.collate import reply_row, token_batch
from rlhf.errors import ConfigError
from rlhf.models.load import Loading, load_actor
from rlhf.models.roles import open_ppo, open_sft
from rlhf.models.save import save_model
from rlhf.training.tiny import write_tiny_model

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")

NF4 = {"rank": 2, "base": "nf4"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    write_tiny_model(directory, seed=0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "llama")
    AutoTokenizer.from_pretrained(directory / "model").save_pretrained(directory / "llama")
    return directory / "llama"


def batch():
    return token_batch([reply_row([2, 3, 4], [5, 6]), reply_row([7], [8, 9])])


def of_sft(llama: Path, **lora: object) -> SftConfig:
    return SftConfig.model_validate(
        {"output": "none", "model": {"path": str(llama)}, "data": {"train": "none"}, "lora": NF4 | lora}
    )


def rounded(llama: Path) -> nn.Module:
    """The plain model, each linear layer's weight through NF4 and back, its scales quantised too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                codes, state = quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.copy_(dequantize_4bit(codes, state))
    return model


def train(policy: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    output = policy(batch())
    sum(part.square().sum() for part in output if part is not None).backward()
    optimizer.step()


@needs_it
@pytest.mark.parametrize("dora", [False, True])
def test_a_base_in_four_bits(dora, llama, tmp_path):
    roles = open_sft(of_sft(llama, dora=dora))
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    plain = AutoModelForCausalLM.from_pretrained(llama)
    ours, theirs, unrounded = (model(ids).logits for model in (roles.actor, rounded(llama), plain))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, unrounded, atol=1e-3)
    train(roles.policy)
    assert not torch.allclose(roles.actor(ids).logits, ours, atol=1e-2)
    save_model(roles.actor, tmp_path / "adapter", roles.tokenizer)
    save_model(roles.actor, tmp_path / "merged", roles.tokenizer, merge=True)
    # Merged is: the adapter on the plain base, not on what four bits left of it.
    merged, adapter = (load_actor(str(tmp_path / name), Loading()) for name in ("merged", "adapter"))
    weights = merged.state_dict()
    assert all(torch.allclose(weights[name], tensor, atol=1e-6) for name, tensor in adapter.state_dict().items())
    assert torch.equal(weights["model.embed_tokens.weight"], plain.state_dict()["model.embed_tokens.weight"])
    assert (weights["lm_head.weight"] == plain.lm_head.weight).all()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@needs_it
@pytest.mark.parametrize("mode", ["separate", "adapters"])
def test_the_reference_is_in_four_bits_too(mode, llama):
    config = {
        "output": "none", "roles": {"actor": str(llama), "mode": mode, "critic": "zero"}, "lora": NF4,
        "reward": {"source": "count:a"}, "data": {"train": "none"},
    }  # fmt: skip
    roles = open_ppo(PpoConfig.model_validate(config))
    with torch.no_grad():
        expected = roles.policy(batch()).logprobs
    assert roles.reference is not None
    assert torch.equal(roles.reference.logprobs(batch(), 1.0), expected)
    train(roles.policy)


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
def test_without_the_package_one_message(llama):
    with pytest.raises(ConfigError, match=r"lora\.base: `nf4` needs the package bitsandbytes: pip install 'rlhf\[qlora\]'"):
        open_sft(of_sft(llama))
