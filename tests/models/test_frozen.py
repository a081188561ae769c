"""Weights that roles have in common: frozen lower layers in memory once, and one trunk with two heads; against copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.config.schema import PpoConfig
from rlhf.data.collate import last_row, reply_row, token_batch
from rlhf.models.actor_critic import ActorCritic, value_head_for
from rlhf.models.frozen import forget_rows
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.models.lora import add_lora, folded_weights
from rlhf.models.roles import Roles, open_ppo
from rlhf.training.tiny import write_tiny_model

SIZES = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
         "tie_word_embeddings": True}  # fmt: skip
DOUBLE = Loading(dtype=torch.float64)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """llama/; rm/ with the same embeddings and two lower layers, its third and its head trained; other/, a stranger."""
    directory = tmp_path_factory.mktemp("frozen")
    write_tiny_model(directory, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    torch.manual_seed(0)
    actor = LlamaForCausalLM(LlamaConfig(**SIZES))
    reward, other = (LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)) for _ in range(2))
    reward.model.embed_tokens.load_state_dict(actor.model.embed_tokens.state_dict())
    reward.model.layers[:2].load_state_dict(actor.model.layers[:2].state_dict())
    for name, model in (("llama", actor), ("rm", reward), ("other", other)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


def opened(
    sources: Path, frozen_layers: int, reward: str = "rm", critic: str | None = None, mode: str = "separate", **more: object
) -> Roles:
    config = {
        "output": "none", "precision": "fp64", "frozen_layers": frozen_layers, "data": {"train": "none"},
        "roles": {"actor": str(sources / "llama"), "critic": critic, "mode": mode},
        "reward": {"source": str(sources / reward)}, **more,
    }  # fmt: skip
    return open_ppo(PpoConfig.model_validate(config))


def batch():
    return token_batch([reply_row([2, 3, 4], [5, 6]), reply_row([7], [8, 9]), reply_row([3, 3], [9, 2])])


def places(model: nn.Module) -> dict[str, int]:
    """Where in memory each weight lies, by its place in the trunk."""
    trunk = model.model  # pyright: ignore[reportAttributeAccessIssue]
    return {name: weight.data_ptr() for name, weight in trunk.named_parameters()}


def of_roles(roles: Roles) -> dict[str, nn.Module]:
    assert roles.reference is not None
    return {
        "reference": roles.reference.model.actor,
        "critic": roles.policy.critic,
        "reward": roles.rewards["reward"].model.critic,
    }  # pyright: ignore


def test_frozen_layers_are_in_memory_once(sources):
    roles = opened(sources, 2)
    actor = places(roles.policy.actor)  # pyright: ignore[reportArgumentType]
    lower = {name for name in actor if name.startswith(("embed_tokens.", "layers.0.", "layers.1."))}
    assert len(lower) == 1 + 2 * 9
    for name, model in of_roles(roles).items():
        there = places(model)
        assert {place for place in there if there[place] == actor[place]} == lower, name
    reference = of_roles(roles)["reference"]
    assert reference.lm_head.weight.data_ptr() == roles.policy.actor.lm_head.weight.data_ptr()  # pyright: ignore
    assert roles.notes == [
        "the lowest 2 layers and the embeddings are frozen, in memory once for actor, reference, critic, reward model; "
        "what they make of a row is computed once an iteration and kept, 1024 MiB of it at most"
    ]
    trained = {name for name, weight in roles.policy.named_parameters() if weight.requires_grad}
    assert trained == {
        name for name, _ in roles.policy.named_parameters() if ".2." in name or ".norm." in name or "score" in name
    }


def test_other_weights_keep_a_copy_of_their_own(sources):
    roles = opened(sources, 2, reward="other", critic="zero")
    assert "in memory once for actor, reference, critic; other weights, so a copy of their own: reward model" in roles.notes[0]
    assert not set(places(of_roles(roles)["reward"]).values()) & set(places(roles.policy.actor).values())  # pyright: ignore
    assert "actor, reference; other weights, so a copy of their own: critic, reward model" in opened(sources, 3).notes[0]


def test_frozen_layers_compute_what_copies_do(sources):
    """Outputs of every role, and the gradients of what is trained; also after a step, which the reference must not feel."""
    one, copies = opened(sources, 2), opened(sources, 0)
    before = of_roles(one)["reference"].state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for roles in (one, copies):
        output = roles.policy(batch())
        (output.logprobs.square().sum() + output.values.square().sum()).backward()
    expected = dict(copies.policy.named_parameters())
    for name, weight in one.policy.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, expected[name].grad, rtol=0, atol=1e-12), name
        else:
            assert weight.grad is None
    whole = token_batch([last_row([2, 3, 4], [5, 6]), last_row([7], [8, 9])])
    with torch.no_grad():
        for weight in one.policy.parameters():
            if weight.grad is not None:
                weight.sub_(weight.grad)
    for roles in (one, copies):
        assert roles.reference is not None
    assert torch.equal(one.reference.logprobs(batch(), 1.0), copies.reference.logprobs(batch(), 1.0))  # pyright: ignore
    assert torch.equal(one.rewards["reward"].scores(whole), copies.rewards["reward"].scores(whole))  # pyright: ignore
    assert all(torch.equal(tensor, before[name]) for name, tensor in of_roles(one)["reference"].state_dict().items())


def test_a_shared_trunk_has_the_gradients_of_two_copies(sources):
    """Two heads on one trunk, and two trunks that are copies of each other: the loss is the same, the gradients add up.

    On a GPT-2, as the norms of a Llama compute in float32 whatever its weights are in.
    """
    actor, copy = (load_actor(str(sources / "model"), DOUBLE) for _ in range(2))
    critic = load_scalar(str(sources / "critic"), DOUBLE)
    critic.transformer.load_state_dict(copy.transformer.state_dict())
    head = value_head_for(actor)
    head.load_state_dict(critic.score.state_dict())
    losses = []
    for policy in (ActorCritic(actor=actor, value_head=head), ActorCritic(actor=copy, critic=critic)):
        output = policy(batch())
        losses.append(output.logprobs.square().sum() + 0.1 * (output.values - 1).square().sum())
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    of_policy, of_values = dict(copy.transformer.named_parameters()), dict(critic.transformer.named_parameters())
    for name, weight in actor.transformer.named_parameters():
        parts = of_policy[name].grad, of_values[name].grad
        assert all(part.abs().max() > 1e-6 for part in parts), name
        assert torch.allclose(weight.grad, parts[0] + parts[1], rtol=0, atol=1e-10), name
    assert torch.allclose(head.weight.grad, critic.score.weight.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("source", ["llama", "model"])  # GPT-2 keeps its matrices the other way round
@pytest.mark.parametrize("dora", [False, True])
def test_folded_weights_are_what_peft_merges(dora, source, sources):
    from rlhf.config.sections import Lora
    from rlhf.models.source import resolve

    place = str(sources / source)
    adapted = add_lora(load_actor(place, DOUBLE), resolve(place), Lora(rank=2, dora=dora), scalar=False, seed=0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    folded = {name: tensor.clone() for name, tensor in folded_weights(adapted.get_base_model()).items()}  # pyright: ignore
    merged = adapted.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    assert set(folded) == set(merged)
    assert all(torch.allclose(folded[name], tensor, rtol=0, atol=1e-12) for name, tensor in merged.items())
    assert any(not torch.equal(tensor, load_actor(place, DOUBLE).state_dict()[name]) for name, tensor in merged.items())


# ---- what frozen layers made of a row is kept ------------------------------------------------------------------------


def calls_of_lower(roles: Roles) -> list[str]:
    """Grows by a name whenever a frozen layer computes."""
    found: list[str] = []
    for number, layer in enumerate(roles.policy.actor.model.layers[:2]):  # pyright: ignore
        layer.mlp.register_forward_hook(lambda *_, number=number: found.append(f"layer {number}"))  # pyright: ignore
    return found


def forward_and_gradients(roles: Roles) -> list[torch.Tensor]:
    roles.policy.zero_grad(set_to_none=True)
    output = roles.policy(batch())
    (output.logprobs.square().sum() + output.values.square().sum()).backward()
    return [output.logprobs, output.values, *(weight.grad for weight in roles.policy.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_are_computed_once_for_all_roles(sources, precision, checkpointing):
    """And to the bit what they are computed to again."""
    more = {"precision": precision, "gradient_checkpointing": checkpointing}
    kept, again = opened(sources, 2, **more), opened(sources, 2, frozen_cache={"limit_mib": 0}, **more)
    computed, computed_again = calls_of_lower(kept), calls_of_lower(again)
    rows = token_batch([last_row([2, 3, 4], [5, 6]), last_row([7], [8, 9]), last_row([3, 3], [9, 2])])
    for epoch in range(3):
        for one, other in zip(forward_and_gradients(kept), forward_and_gradients(again), strict=True):
            assert torch.equal(one, other), epoch
        for roles in (kept, again):
            with torch.no_grad():
                for weight in roles.policy.parameters():
                    weight.sub_(weight.grad if weight.grad is not None else 0)
    for ours, theirs in ((kept.reference, again.reference), (kept.rewards["reward"], again.rewards["reward"])):
        assert ours is not None
        assert theirs is not None
    assert torch.equal(kept.reference.logprobs(batch(), 0.7), again.reference.logprobs(batch(), 0.7))  # pyright: ignore
    assert torch.equal(kept.rewards["reward"].scores(rows), again.rewards["reward"].scores(rows))  # pyright: ignore
    assert computed == ["layer 0", "layer 1"]
    assert len(computed_again) == 2 * (3 * 2 + 2)
    forget_rows(kept.policy)
    kept.policy(batch())
    assert len(computed) == 4


def test_a_role_with_other_weights_computes_its_own(sources):
    roles, without = (opened(sources, 2, reward="other", frozen_cache={"limit_mib": limit}) for limit in (64, 0))
    assert set(roles.policy.lower) == {"actor"}
    for one, other in zip(forward_and_gradients(roles), forward_and_gradients(without), strict=True):
        assert torch.equal(one, other)


def test_shared_prompts_are_kept_too(sources):
    """A whole row and the rest of a row with the same tokens are two things."""
    rows = [reply_row([2, 3, 4], [5, 6]), reply_row([2, 3, 4], [8])]
    roles, without = (opened(sources, 2, frozen_cache={"limit_mib": limit}) for limit in (64, 0))
    for batch_ in (token_batch(rows), token_batch(rows[:1]), token_batch(rows), token_batch([*rows[1:], *rows[:1]])):
        for one, other in zip(roles.policy(batch_)[:2], without.policy(batch_)[:2], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert len(roles.policy.lower["actor"].kept) == 3 + 1


@pytest.mark.parametrize("cache", [{}, {"dtype": "bf16"}])
def test_a_row_is_what_it_was_among_other_rows(sources, cache):
    """A batch with an unknown row is computed whole, but the rows that were known are what they were: PPO's first ratio is 1.

    Of a short batch a product may be rounded in another way than of a long one, so what is kept is marked here.
    """
    roles = opened(sources, 2, frozen_cache=cache)
    rows = [reply_row([2, 3, 4], [5, 6]), reply_row([7], [8, 9])]
    first = roles.policy(token_batch(rows[:1])).logprobs
    for key, part in roles.policy.lower["actor"].kept.items():
        roles.policy.lower["actor"].kept[key] = 1.5 * part
    mixed, known = roles.policy(token_batch(rows)).logprobs, roles.policy(token_batch(rows)).logprobs
    assert torch.equal(mixed, known)
    assert not torch.allclose(mixed[:2], first, atol=1e-3)
    twice = token_batch([rows[1], rows[1]], share_prompts=False)
    assert torch.equal(*roles.policy(twice).logprobs.split(2))


def test_the_limit_holds(sources):
    """Rows that have no room are computed again, and nothing else changes."""
    roles, without = opened(sources, 2), opened(sources, 2, frozen_cache={"limit_mib": 0})
    lower = roles.policy.lower["actor"]
    lower.limit_bytes = 5 * 32 * 8  # one row of five tokens in float64
    computed = calls_of_lower(roles)
    for _ in range(2):
        assert all(map(torch.equal, forward_and_gradients(roles), forward_and_gradients(without)))
    assert (len(lower.kept), lower.kept_bytes) == (1, 5 * 32 * 8)
    assert len(computed) == 2 * 2 * 2


@pytest.mark.parametrize("cache", [{"dtype": "bf16"}, {"dtype": "bf16", "place": "host"}])
def test_rounded_activations_are_so_from_the_first_time_on(sources, cache):
    roles, exact = opened(sources, 2, precision="fp32", frozen_cache=cache), opened(sources, 2, precision="fp32")
    first, second = roles.policy(batch()), roles.policy(batch())
    assert all(map(torch.equal, first[:2], second[:2]))  # or PPO's first ratio would not be 1
    assert {part.dtype for part in roles.policy.lower["actor"].kept.values()} == {torch.bfloat16}
    difference = (first.logprobs - exact.policy(batch()).logprobs).abs().max()
    assert 1e-6 < difference < 0.05
