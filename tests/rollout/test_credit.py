"""Advantages without a critic, against sums written out here."""

from __future__ import annotations

import pytest
import torch

from rlhf.config.rewards import Reward
from rlhf.config.schema import GrpoConfig
from rlhf.rollout.credit import RunningScores, credit_without_critic, groups_that_teach
from rlhf.rollout.engines import Samples
from rlhf.rollout.experience import Experience
from rlhf.rollout.rewards import Scores
from rlhf.rollout.scoring import Scored, in_places_of

SCORES = [1.0, 3.0, 2.0, 2.0]
COEF = 0.5


def experience() -> Experience:
    """Two prompts of two replies each, of 2, 1, 2 and 1 tokens."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 0.0], [-1.5, -1.0], [-3.0, 0.0]])
    reference = torch.tensor([[-1.2, -1.0], [-0.5, 9.0], [-1.0, -1.0], [-4.0, 9.0]])
    tokens, finished = torch.ones(4, 2, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    return Experience([[2]] * 4, tokens, mask, finished, logprobs, logprobs, None, reference, torch.tensor(SCORES))


def advantages(estimator: str, place: str, greedy: Scored | None = None, **grpo: object) -> torch.Tensor:
    config = GrpoConfig.model_validate(
        {
            "output": "o", "roles": {"actor": "a"}, "reward": {"source": "count:a"}, "data": {"train": "t"},
            "rollout": {"batch_size": 2, "samples_per_prompt": 2}, "grpo": {"estimator": estimator, "minibatch_size": 4} | grpo,
            "kl": {"coef": COEF, "estimator": "k2" if place == "loss" else "k1", "place": place},
        }
    )  # fmt: skip
    credited, _ = credit_without_critic(experience(), config, COEF, RunningScores(), greedy)
    assert credited.advantages is not None
    return credited.advantages


def scores(values: list[float]) -> Scores:
    return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool), {})


KL = [[0.2, -1.0], [0.0], [-0.5, 0.0], [1.0]]
TO_GO = [[-COEF * sum(row[t:]) for t in range(len(row))] for row in KL]


def spread(scores: list[float], own: list[list[float]]) -> torch.Tensor:
    rows = [[score + value for value in row] + [0.0] * (2 - len(row)) for score, row in zip(scores, own, strict=True)]
    return torch.tensor(rows)


def test_a_penalty_on_tokens_is_theirs_and_of_those_before() -> None:
    """RLOO: 1 - 3, 3 - 1, 0, 0, and to each token what penalties it and those after it get."""
    torch.testing.assert_close(advantages("rloo", "tokens"), spread([-2.0, 2.0, 0.0, 0.0], TO_GO))


def test_a_penalty_in_the_score_is_compared_with_it() -> None:
    whole = [score - COEF * sum(row) for score, row in zip(SCORES, KL, strict=True)]
    compared = [whole[0] - whole[1], whole[1] - whole[0], whole[2] - whole[3], whole[3] - whole[2]]
    torch.testing.assert_close(advantages("rloo", "score"), spread(compared, [[0.0] * len(row) for row in KL]))


def test_prompts_that_all_score_the_same_are_not_scaled_up() -> None:
    """The deviation of the second prompt is 0: only the scores are divided by it, never the penalties."""
    std = 2**0.5 + 1e-4
    torch.testing.assert_close(advantages("grpo", "tokens"), spread([-1 / std, 1 / std, 0.0, 0.0], TO_GO))
    torch.testing.assert_close(advantages("grpo", "loss", scale="none")[:2, 0], torch.tensor([-1.0, 1.0]))


def test_remax_compares_with_the_greedy_reply() -> None:
    greedy = Scored(
        Samples([[2]] * 2, [[1]] * 2, [[0.0]] * 2, [True] * 2, 0),
        scores([0.5, 4.0]),
    )
    torch.testing.assert_close(advantages("remax", "loss", greedy)[:, 0], torch.tensor([0.5, 2.5, -2.0, -2.0]))


def test_reinforce_plus_plus_is_white_over_all_tokens() -> None:
    found = advantages("reinforce++", "tokens")
    real = found[experience().mask.bool()]
    raw = spread(SCORES, TO_GO)[experience().mask.bool()]
    torch.testing.assert_close(real, (raw - raw.mean()) / raw.std(correction=0))
    assert found[~experience().mask.bool()].abs().sum() == 0


def test_prompts_that_teach_nothing_give_way() -> None:
    def group(name: str, values: list[float]) -> Scored:
        count = len(values)
        return Scored(
            Samples([[ord(name)]] * count, [[1]] * count, [[0.0]] * count, [True] * count, 0),
            scores(values),
        )

    first, more = group("a", [1.0, 1.0, 0.0, 2.0, 3.0, 3.0]), group("b", [5.0, 5.0, 6.0, 7.0])
    useful = groups_that_teach(more, 2, Reward(source="count:a"), RunningScores()).nonzero().flatten().tolist()
    asked, scored = in_places_of(["p", "q", "r"], first, [0, 2], ["x", "y"], more, useful)
    assert asked == ["y", "q", "r"]  # x scores the same as well, and there is no third
    assert scored.scores.scores.tolist() == [6.0, 7.0, 0.0, 2.0, 3.0, 3.0]
    assert [chr(prompt[0]) for prompt in scored.samples.prompts] == list("bbaaaa")


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce++-baseline"])
def test_one_reply_alone_cannot_be_compared(estimator: str) -> None:
    with pytest.raises(ValueError, match="samples_per_prompt must be more than 1"):
        GrpoConfig.model_validate(
            {"output": "o", "roles": {"actor": "a"}, "reward": {"source": "count:a"}, "data": {"train": "t"},
             "rollout": {"batch_size": 4, "samples_per_prompt": 1}, "grpo": {"estimator": estimator, "minibatch_size": 4}}
        )  # fmt: skip
