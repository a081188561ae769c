"""Roles on one base against the same adapters on bases of their own, opened by PEFT; all in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.config.schema import PpoConfig
from rlhf.data.collate import TokenBatch, last_row, reply_row, token_batch
from rlhf.errors import DataError
from rlhf.models import trunk
from rlhf.models.actor_critic import ActorCritic, role_of
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.models.lora import write_base
from rlhf.models.roles import Roles, open_ppo
from rlhf.models.save import save_model
from rlhf.training.tiny import write_tiny_model

SIZES = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1,
         "pad_token_id": 0}  # fmt: skip
ROLES = ("actor", "critic", "reference", "reward")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """llama/ and, on it, the adapters sft/ and rm/ as PEFT writes them, every factor drawn at random; critic/, no adapter."""
    directory = tmp_path_factory.mktemp("sources")
    write_tiny_model(directory, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory / "llama")
    tokenizer.save_pretrained(directory / "llama")
    for name, factory, targets, dora in (
        ("sft", AutoModelForCausalLM, ["q_proj", "down_proj"], False),
        ("rm", AutoModelForSequenceClassification, ["v_proj", "up_proj"], False),
        ("dora-sft", AutoModelForCausalLM, ["q_proj", "down_proj"], True),
        ("dora-rm", AutoModelForSequenceClassification, "all-linear", True),
    ):
        scalar = factory is AutoModelForSequenceClassification
        base = factory.from_pretrained(directory / "llama", **({"num_labels": 1} if scalar else {}))
        config = LoraConfig(
            task_type="SEQ_CLS" if scalar else "CAUSAL_LM", r=3 if scalar else 2, lora_alpha=5, target_modules=targets,
            modules_to_save=["score"] if scalar else None, exclude_modules=["score"] if scalar else None, use_dora=dora,
            lora_dropout=0.5,
        )  # fmt: skip
        model = get_peft_model(base, config)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
        model.save_pretrained(directory / name)
        write_base(directory / name, str(directory / "llama"))
        tokenizer.save_pretrained(directory / name)
    return directory


def opened(
    sources: Path,
    actor: str = "sft",
    reward: str = "rm",
    critic: str | None = None,
    precision: str = "fp64",
    gradient_checkpointing: bool = False,
    **lora: object,
) -> Roles:
    config = {
        "output": "none",
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "roles": {"actor": str(sources / actor), "critic": critic, "mode": "adapters"},
        "reward": {"source": str(sources / reward)},
        "data": {"train": "none"},
        "lora": {"rank": 2, **lora},
    }
    return open_ppo(PpoConfig.model_validate(config))


def batch() -> TokenBatch:
    return token_batch([reply_row([2, 3, 4], [5, 6]), reply_row([7], [8, 9]), reply_row([3, 3], [9, 2])])


def plain(sources: Path, adapter: str, scalar: bool) -> torch.nn.Module:
    """A base of its own with one adapter, by transformers and PEFT alone."""
    factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    base = factory.from_pretrained(sources / "llama", dtype=torch.float64, **({"num_labels": 1} if scalar else {}))
    return PeftModel.from_pretrained(base, str(sources / adapter), is_trainable=True).eval()  # they were trained with dropout


def loss(policy: ActorCritic, weights: Tensor) -> Tensor:
    """Of log-probabilities and values together, in one graph, so that both roles are walked back at once."""
    output = policy(batch())
    return (output.logprobs * weights).square().sum() + (output.values - weights).square().sum()


def gradients(policy: ActorCritic) -> dict[tuple[str, ...], Tensor]:
    """By role and the place in the trunk, which is named alike wherever the adapter lies."""
    found = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            place = name.split(".score.")[0] if ".score." in name else name.partition("layers.")[2]
            place = "head" if ".score." in name or name.startswith("heads.") else place
            found[role_of(name), *(part for part in place.split(".") if part not in ("default", *ROLES))] = parameter.grad
    return found


@pytest.mark.parametrize("kind", ["", "dora-"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_base_is_bases_of_their_own(kind, checkpointing, sources):
    """Outputs of all four roles and gradients; with checkpointing too, whose recomputation must see the right adapter."""
    roles = opened(sources, f"{kind}sft", f"{kind}rm", gradient_checkpointing=checkpointing)
    separate = ActorCritic(plain(sources, f"{kind}sft", False), plain(sources, f"{kind}rm", True))
    ours, theirs = roles.policy(batch()), separate(batch())
    assert torch.allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-12)
    assert torch.allclose(ours.values, theirs.values, rtol=0, atol=1e-12)
    assert torch.equal(roles.policy(batch(), roles=("reference",)).logprobs, ours.logprobs)
    assert torch.allclose(roles.policy(batch(), roles=("reward",)).values, ours.values, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    for policy in (roles.policy, separate):
        loss(policy, weights).backward()
    expected, found = gradients(separate), gradients(roles.policy)
    assert set(found) == set(expected)
    for place, gradient in expected.items():
        assert torch.allclose(found[place], gradient, rtol=0, atol=1e-10), place
    assert any(gradient.abs().max() > 1e-3 for place, gradient in expected.items() if place[0] == "critic")


def test_logits_in_parts_are_computed_again_by_the_adapter_that_was_active(sources, monkeypatch):
    """An LM head with an adapter, recomputed in a backward pass that began with another role's."""
    found = []
    for at_once in (trunk.LOGITS_AT_ONCE, 2 * SIZES["vocab_size"]):
        monkeypatch.setattr(trunk, "LOGITS_AT_ONCE", at_once)
        policy = opened(sources, "llama", critic="zero", targets="q_proj,lm_head").policy
        torch.manual_seed(0)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        output = policy(batch())
        with policy.active("critic"):
            (output.logprobs.square().sum() + output.values.square().sum()).backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    whole, parts = found
    assert any("lm_head" in name for name in whole)
    assert whole.keys() == parts.keys()
    assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-12) for name in whole)


def test_what_is_trained(sources):
    policy = opened(sources).policy
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name == "heads.critic.weight" for name in trained)
    assert not any(".reward." in name or ".reference." in name for name in trained)
    assert {role_of(name) for name in trained} == {"actor", "critic"}
    assert role_of("heads.critic.weight") == "critic"


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("actor", ["llama", "sft", "dora-sft"])
@torch.no_grad()
def test_the_reference_is_the_actor_to_the_bit(actor, precision, targets, sources):
    for dora in (False, True):
        policy = opened(sources, actor, dora=dora, targets=targets, precision=precision, critic="zero").policy.train()
        output = policy(batch())
        assert torch.equal(output.logprobs, policy(batch(), roles=("reference",)).logprobs)
        assert not output.values.any()


@torch.no_grad()
def test_outside_of_a_forward_the_actor_is_active(sources):
    policy = opened(sources).policy
    expected = policy(batch(), roles=("actor",)).logprobs
    policy(batch(), roles=("reward",))
    plain_base = AutoModelForCausalLM.from_pretrained(sources / "llama", dtype=torch.float64)
    direct, other = (
        model(torch.tensor([[2, 3, 4, 5, 6]])).logits[0, 2:4].log_softmax(-1)[[0, 1], [5, 6]]
        for model in (policy.actor, plain_base)
    )
    assert torch.allclose(direct, expected[:2], rtol=0, atol=1e-12)
    assert not torch.allclose(other, expected[:2])


@pytest.mark.parametrize("kind", ["", "dora-"])
@pytest.mark.parametrize("merge", [False, True])
@torch.no_grad()
def test_saved_roles_answer_as_in_training(merge, kind, sources, tmp_path):
    roles = opened(sources, f"{kind}sft", f"{kind}rm")
    for parameter in roles.policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    expected = roles.policy(batch())[:2]
    save_model(roles.critic, tmp_path / "critic", roles.tokenizer, merge=merge)
    save_model(roles.actor, tmp_path / "model", roles.tokenizer, roles.generation, merge)
    loading = Loading(dtype=torch.float64)
    again = ActorCritic(load_actor(str(tmp_path / "model"), loading), load_scalar(str(tmp_path / "critic"), loading))(batch())[
        :2
    ]
    for ours, theirs in zip(expected, again, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    after = roles.policy(batch())[:2]
    assert all(torch.equal(one, other) for one, other in zip(expected, after, strict=True))
    if merge:
        assert not (tmp_path / "model" / "adapter_config.json").exists()
        return
    assert json.loads((tmp_path / "critic" / "base.json").read_text()) == json.loads((sources / "rm" / "base.json").read_text())
    shutil.copytree(sources / "llama", tmp_path / "llama")
    by_peft = ActorCritic(plain(tmp_path, "model", False), plain(tmp_path, "critic", True))(batch())[:2]
    for ours, theirs in zip(expected, by_peft, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model") is not None


def test_another_base_is_refused_by_name(sources, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(other)
    shutil.copytree(sources / "rm", tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
    (tmp_path / "rm" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    write_base(tmp_path / "rm", str(other))
    with pytest.raises(DataError, match=rf"stands on {sources}/llama, the reward model .* on {other}\. Train"):
        opened(sources, reward=str(tmp_path / "rm"))
    shutil.rmtree(other)
    shutil.copytree(sources / "llama", other)  # the same bytes in another place are the same base
    write_base(tmp_path / "rm", str(other))
    opened(sources, reward=str(tmp_path / "rm"))


def test_a_whole_reward_model_is_refused(sources):
    with pytest.raises(DataError, match="rlhf rm --model BASE"):
        opened(sources, reward="critic")
    with pytest.raises(DataError, match="without a scalar head"):
        opened(sources, reward="sft")
    with pytest.raises(DataError, match="not a policy"):
        opened(sources, actor="rm")


def test_an_ensemble_of_adapters_on_one_base(sources, tmp_path):
    """Each scores as it does on a base of its own, and the critic starts from the one that is named."""
    shutil.copytree(sources / "rm", tmp_path / "rm")
    weights = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "rm" / "adapter_model.safetensors", {"format": "pt"}
    )
    places = {"one": sources / "rm", "two": tmp_path / "rm"}
    config = {
        "output": "none", "precision": "fp64", "data": {"train": "none"}, "lora": {"rank": 2},
        "roles": {"actor": str(sources / "sft"), "critic": str(places["two"]), "mode": "adapters"},
        "reward": {"sources": {name: {"source": str(place)} for name, place in places.items()}, "combine": "min"},
    }  # fmt: skip
    roles = open_ppo(PpoConfig.model_validate(config))
    rows = token_batch([last_row([2, 3, 4], [5, 6]), last_row([7], [8])])
    for name, place in places.items():
        alone = ActorCritic(critic=plain(sources, str(place), True))(rows, roles=("critic",)).values
        assert torch.allclose(roles.rewards[name].scores(rows), alone, rtol=0, atol=1e-12)
    two = roles.rewards["two"].scores(rows)
    assert torch.equal(roles.policy(rows, roles=("critic",)).values, two)
    assert not torch.allclose(roles.rewards["one"].scores(rows), two)
    assert not [name for name, weight in roles.policy.named_parameters() if weight.requires_grad and ".reward_" in name]
