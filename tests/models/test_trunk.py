"""One sequence without pads against transformers, which is given each row by itself: log-probabilities, values, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.collate import last_row, reply_row, token_batch
from rlhf.models import trunk
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.trunk import BY_SEGMENTS, attend_by_segments, checkpoint_activations

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
         "initializer_range": 0.3}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, **EXPERTS},
    "mixtral": {"num_local_experts": 4, "sliding_window": 3},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2,
                    "num_hidden_layers": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "starcoder2": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "phi": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}  # fmt: skip
PADDED = {
    "nemotron": {"head_dim": 8},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 3,
                  "max_window_layers": 1, **EXPERTS},
    "bloom": {"n_layer": 3, "n_head": 4, "_attn_implementation": "eager"},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 3, "_attn_implementation": "eager"},
    "qwen3_next": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"],
                   "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "num_experts": 0},
}  # fmt: skip
SINGLE = dict.fromkeys(("qwen2_moe", "qwen3_moe", "mixtral", "gemma2"), torch.float32)
"""Grouped products of experts know no float64; Gemma 2's masks overflow in it."""
CAUSAL_ONLY = ("cohere", "granite", "olmo")
ROWS = [([2, 3, 4, 5, 6], [7, 8]), ([7, 8, 9], [3, 9, 2, 2, 5]), ([2, 3, 4, 5, 6], [9]), ([11], [12, 13, 1])]
"""(prompt, reply); two have the same prompt."""


def models(kind: str, **more: object) -> tuple[nn.Module, nn.Module | None]:
    """A causal language model, and a scalar one where the family has it, in float64, no dropout."""
    settings = {**SIZES, **more}
    settings = {key: value for key, value in settings.items()}
    found = []
    for factory, labels in ((AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 1})):
        if labels and kind in CAUSAL_ONLY:
            return found[0], None
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if not k.startswith("_")}, **labels)
        model = factory.from_config(config, attn_implementation=settings.get("_attn_implementation", "sdpa"))
        found.append(model.to(SINGLE.get(kind, torch.float64)).eval())
    return found[0], found[1]


def row_by_row(actor, critic, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers alone: each row in a forward of its own, without mask or positions."""
    logprobs, values = [], []
    for prompt, reply in ROWS:
        ids = torch.tensor([prompt + reply])
        before = slice(len(prompt) - 1, ids.shape[1] - 1)
        logits = actor(input_ids=ids, use_cache=False).logits[0, before] / temperature
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1))
        if critic is None:
            continue
        inner = getattr(critic, critic.base_model_prefix)(input_ids=ids, use_cache=False)
        values.append(critic.score(inner.last_hidden_state)[0, before, 0])
    return torch.cat(logprobs), torch.cat(values) if values else torch.zeros(0)


def gradients(parts, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    for part in parts:
        part.zero_grad(set_to_none=True)
    loss.backward()
    return {f"{n}.{name}": p.grad for n, part in enumerate(parts) for name, p in part.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize(
    ("kind", "settings", "in_one"), [*((*one, True) for one in FAMILIES.items()), *((*one, False) for one in PADDED.items())]
)
def test_a_batch_is_its_rows(kind, settings, in_one, share):
    models_of_kind = models(kind, **settings)
    parts = list(filter(None, models_of_kind))
    for part in parts:
        attend_by_segments(part)  # pyright: ignore[reportArgumentType]
    attentions = {part.config._attn_implementation for part in parts}  # pyright: ignore
    assert (attentions == {BY_SEGMENTS}) == in_one
    expected = row_by_row(*models_of_kind, 0.7)
    assert expected[0].std() > 0.3
    wanted = gradients(parts, expected[0].square().sum() + expected[1].square().sum())
    batch = token_batch((reply_row(*row) for row in ROWS), share_prompts=share)
    output = ActorCritic(*parts)(batch, temperature=0.7)
    # Some norms and rotations compute in float32 whatever the weights are in.
    assert torch.allclose(output.logprobs, expected[0], rtol=0, atol=1e-4 if kind in SINGLE else 1e-5)
    values = output.values if len(parts) > 1 else torch.zeros(0)
    assert torch.allclose(values, expected[1].to(values.dtype), rtol=0, atol=1e-4 if kind in SINGLE else 1e-5)
    found = gradients(parts, output.logprobs.square().sum() + values.square().sum())
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-3 if kind in SINGLE else 1e-4), name


def test_every_kind_that_is_trusted_is_compared():
    assert set(FAMILIES) == trunk.BY_ATTENTION_ALONE
    with_windows = {kind for kind, settings in FAMILIES.items() if "sliding_window" in settings}
    assert with_windows == trunk.WINDOWED


def test_rows_that_saw_each_other_would_be_found():
    """The negative control: one segment for the whole sequence."""
    actor, critic = models("llama")
    attend_by_segments(actor)  # pyright: ignore[reportArgumentType]
    batch = token_batch(reply_row(*row) for row in ROWS)
    whole = (trunk.Segment(0, len(batch.ids)),)
    joined = type(batch)(batch.ids, batch.position_ids, batch.read, batch.targets, whole, batch.tokens)
    assert not torch.allclose(
        ActorCritic(actor)(joined).logprobs, row_by_row(actor, critic, 1.0)[0], rtol=0, atol=1e-2
    )  # fmt: skip


def test_a_model_that_drops_the_segments_is_found():
    actor, _ = models("llama")
    attend_by_segments(actor)  # pyright: ignore[reportArgumentType]
    for layer in actor.model.layers:  # pyright: ignore
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, segments, plain=plain, **k: plain(*a, **k)
    with pytest.raises(ValueError, match="LlamaAttention was not handed the segments: rows would see each other"):
        ActorCritic(actor)(token_batch(reply_row(*row) for row in ROWS))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_in_parts_are_the_whole(checkpointing, monkeypatch):
    actor, _ = models("cohere", logit_scale=0.25)
    attend_by_segments(actor)  # pyright: ignore[reportArgumentType]
    if checkpointing:
        checkpoint_activations(actor.train())  # pyright: ignore[reportArgumentType]
    batch = token_batch(reply_row(*row) for row in ROWS)
    results = []
    largest: list[int] = []
    for at_once in (2**26, 3 * SIZES["vocab_size"]):  # 11 places at once, or 3
        monkeypatch.setattr(trunk, "LOGITS_AT_ONCE", at_once)
        largest.clear()
        handle = actor.lm_head.register_forward_hook(lambda _, __, logits: largest.append(logits.shape[1]))  # pyright: ignore
        logprobs = ActorCritic(actor)(batch, temperature=0.7).logprobs
        results.append((logprobs.detach(), gradients([actor], logprobs.square().sum())))
        handle.remove()
        assert max(largest) == (11 if at_once == 2**26 else 3)
    (one, first), (other, second) = results
    assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-10) for name in first)


def test_sampling_has_sdpa_and_its_masks():
    """The same module samples, with pads and a cache; and plainly, without a mask."""
    ours, _ = models("mistral", sliding_window=4)
    plain, _ = models("mistral", sliding_window=4)
    attend_by_segments(ours)  # pyright: ignore[reportArgumentType]
    ids = torch.tensor([[0, 0, 2, 3, 4, 5, 6], [7, 8, 9, 3, 3, 9, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[1:]}):
        assert torch.equal(ours(**inputs).logits[mask[-len(inputs["input_ids"]) :].bool()],
                           plain(**inputs).logits[mask[-len(inputs["input_ids"]) :].bool()])  # fmt: skip
    generated = [model.generate(ids[1:], max_new_tokens=6, do_sample=False) for model in (ours, plain)]  # pyright: ignore
    assert torch.equal(*generated)


def test_scores_are_read_at_last_tokens():
    _, critic = models("llama")
    attend_by_segments(critic)  # pyright: ignore[reportArgumentType]
    scores = ActorCritic(critic=critic)(token_batch(last_row(*row) for row in ROWS)).values
    expected = [critic(input_ids=torch.tensor([prompt + reply])).logits.item() for prompt, reply in ROWS]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
