"""Models in and out: every tensor accounted for, heads never random, directories anyone can load."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.data.collate import last_row, reply_row, token_batch
from rlhf.errors import DataError
from rlhf.models.actor_critic import ActorCritic, value_head_for
from rlhf.models.heads import initialise_head, scalar_head, zero_head
from rlhf.models.load import Loading, load_actor, load_scalar, load_tokenizer
from rlhf.models.save import critic_of, save_model
from rlhf.training.tiny import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """model/, critic/ (GPT-2) and llama/."""
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, seed=0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "llama")
    AutoTokenizer.from_pretrained(directory / "model").save_pretrained(directory / "llama")
    return directory


IDS = torch.tensor([[2, 3, 4, 5, 6]])


@pytest.mark.parametrize("name", ["model", "llama"])
def test_e4_actor_round_trip(name, tiny, tmp_path):
    actor = load_actor(str(tiny / name), Loading())
    save_model(actor, tmp_path / "saved", load_tokenizer(str(tiny / name)), actor.generation_config)
    again = load_actor(str(tmp_path / "saved"), Loading())
    assert torch.equal(actor(IDS).logits, again(IDS).logits)
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()  # E8: tied, still


def test_e5_head_is_drawn_with_the_root():
    class Fake(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.score = nn.Linear(width, 1)

    for width, std in ((768, 0.036061), (4096, 0.015623)):
        fake = Fake(width)
        initialise_head(fake, seed=1)
        assert fake.score.weight.std().item() == pytest.approx(std, rel=0.08 if width < 1000 else 0.05)
        assert std == pytest.approx(1 / math.sqrt(width + 1), rel=1e-4)
        assert fake.score.bias.item() == 0
        zero_head(fake)
        assert not fake.score.weight.any()
    with pytest.raises(DataError, match="no scalar head"):
        scalar_head(nn.Linear(2, 2))


def test_e4_a_missing_head_is_an_error_naming_the_tensor(tiny):
    with pytest.raises(DataError, match=r"score\.weight"):
        load_scalar(str(tiny / "model"), Loading())
    assert load_scalar(str(tiny / "model"), Loading(seed=3), new_head=True).score.weight.any()


def test_a_reward_model_is_no_actor(tiny):
    with pytest.raises(DataError, match="reward model, not a policy"):
        load_actor(str(tiny / "critic"), Loading())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.weight"), r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"),
        (lambda w: w.update({"transformer.h.9.extra": torch.zeros(2)}), r"no place for, transformer\.h\.9\.extra"),
        (lambda w: w.update({"transformer.ln_f.weight": torch.zeros(3)}), r"ln_f\.weight|size mismatch|cannot open"),
    ],
)
def test_every_tensor_is_accounted_for(change, message, tiny, tmp_path):
    (tmp_path / "broken").mkdir()
    for file in (tiny / "model").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=message):
        load_actor(str(tmp_path / "broken"), Loading())


def test_e7_dropout_is_off(tiny):
    config = json.loads((tiny / "model" / "config.json").read_text())
    assert config["attn_pdrop"] > 0  # the file would have it on
    actor = load_actor(str(tiny / "model"), Loading()).train()
    assert torch.equal(actor(IDS).logits, actor(IDS).logits)


def test_from_scratch_follows_the_seed(tiny):
    one, same, other = (load_actor(str(tiny / "llama"), Loading(seed=seed), from_scratch=True) for seed in (0, 0, 1))
    assert torch.equal(one(IDS).logits, same(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)


def test_e10_a_shared_trunk_is_two_copies(tiny, tmp_path):
    """Logits and values of one forward over a shared trunk are those of separate models with the same weights."""
    actor = load_actor(str(tiny / "llama"), Loading())
    head = value_head_for(actor)
    assert not head.weight.any()
    nn.init.normal_(head.weight)
    shared = ActorCritic(actor=actor, value_head=head)
    batch = token_batch(reply_row(ids[:1], ids[1:]) for ids in IDS.tolist())
    output = shared(batch)
    critic = critic_of(shared)
    save_model(critic, tmp_path / "critic", load_tokenizer(str(tiny / "llama")))
    separate = ActorCritic(
        actor=load_actor(str(tiny / "llama"), Loading()), critic=load_scalar(str(tmp_path / "critic"), Loading())
    )
    other = separate(batch)
    assert torch.equal(output.logprobs, other.logprobs)
    assert torch.allclose(output.values, other.values, atol=1e-6)


def test_transformers_scores_our_critic_as_we_do(tiny):
    """A plain sequence classification model reads the last token; the pad id is distinct here."""
    from rlhf.models.roles import RewardModel

    rows = [[2, 3, 1], [4, 5, 6, 7, 1], [0, 3, 0]]  # the pad id inside the text decides nothing, nor at its end
    ids, mask = torch.tensor([[2, 3, 1, 0, 0], [4, 5, 6, 7, 1]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny / "critic", pad_token_id=0).eval()
    expected = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    ours = RewardModel(ActorCritic(critic=load_scalar(str(tiny / "critic"), Loading())))
    scores = ours.scores(token_batch(last_row([], row) for row in rows))
    assert torch.allclose(scores[:2], expected, atol=1e-6)
    hidden = getattr(theirs, theirs.base_model_prefix)(torch.tensor([[0, 3, 0]])).last_hidden_state
    assert torch.allclose(scores[2], theirs.score(hidden)[0, -1, 0], atol=1e-6)


def test_an_adapter_on_a_changed_base_is_refused(tiny, tmp_path):
    from rlhf.config.sections import Lora
    from rlhf.models.lora import add_lora
    from rlhf.models.source import resolve

    (tmp_path / "base").mkdir()
    for file in (tiny / "llama").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    base = load_actor(str(tmp_path / "base"), Loading())
    plain = base(IDS).logits
    adapted = add_lora(base, resolve(str(tmp_path / "base")), Lora(rank=2), scalar=False, seed=0)
    assert torch.equal(adapted(IDS).logits, plain)  # E6: at the start an adapter changes nothing
    save_model(adapted, tmp_path / "adapter", load_tokenizer(str(tiny / "llama")))
    assert torch.allclose(load_actor(str(tmp_path / "adapter"), Loading())(IDS).logits, plain, atol=1e-6)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: corrupt, or cut short"):
        load_actor(str(tmp_path / "adapter"), Loading())
    weights.write_bytes(whole)
    (tmp_path / "base" / "config.json").write_text((tmp_path / "base" / "config.json").read_text() + " ")
    with pytest.raises(DataError, match="changed since"):
        load_actor(str(tmp_path / "adapter"), Loading())
    source, lora = resolve(str(tiny / "llama")), Lora(rank=2, targets="no_such_layer")
    with pytest.raises(DataError, match="targets"):
        add_lora(load_actor(str(tiny / "llama"), Loading()), source, lora, scalar=False, seed=0)
