"""Replies to held-out prompts as texts: a stop token that the tokenizer takes for a word is in none."""

from __future__ import annotations

import torch

from rlhf.data.examples import PromptExample
from rlhf.data.rows import Row
from rlhf.models.load import load_tokenizer
from rlhf.rollout.evaluate import evaluate
from rlhf.rollout.experience import Experience
from rlhf.training.tiny import write_tiny_model


class Words:
    """A scorer: how many words a reply has."""

    source, columns = "mine.py:words", ()

    def __call__(self, prompts, responses, **others):
        return [len(response.split()) for response in responses]


def test_what_scorers_and_samples_have(tmp_path):
    """a b c with c a stop token, and the same cut at c."""
    write_tiny_model(tmp_path, seed=0)
    tokens, none = torch.tensor([[2, 3, 4], [2, 3, 4]]), torch.zeros(2, 3)
    experience = Experience(
        [[5], [5]], tokens, torch.ones(2, 3), torch.tensor([True, False]), none, none, None, None, torch.zeros(2)
    )
    asked = [PromptExample(place, [5], Row(f"p:{place}", {"prompt": "d"}, {})) for place in range(2)]
    metrics, samples = evaluate(experience, asked, [Words()], load_tokenizer(str(tmp_path / "model")), keep=2)
    assert [sample["response"] for sample in samples] == ["a b", "a b c"]
    assert metrics["words"] == 2.5
    assert metrics["length"] == 3
