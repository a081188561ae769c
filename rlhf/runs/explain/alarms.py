"""Alarms of a run that samples: rules of report/alarms.py, said and recorded by training/alarms.py."""

from __future__ import annotations

from functools import partial

from rlhf.runs.explain.entry import Entry

Alarm = partial(Entry, kind="alarm")

ALARMS = (
    Alarm(
        "KL budget",
        "median kl/sequence of the latest iterations above alarms.kl_budget, in nats per reply",
        "below it: half a nat a token, twice kl.target with the adaptive controller, or what you set",
        "the policy is far from its reference, where the reward model was never trained: its scores say little there",
        ("the learning rate is too high, or there are too many iterations", "kl.coef is too small",
         "the policy exploits the reward"),
        "read the reply; take an earlier checkpoint; raise kl.coef, or kl.controller: adaptive with a kl.target",
    ),
    Alarm(
        "entropy collapse",
        "median policy/entropy below alarms.entropy_left of what it was in the first iterations, in nats per token",
        "above a tenth of the start",
        "the policy nearly always says the same: it explores nothing and cannot learn more",
        ("it found one reply that the reward likes", "the learning rate is too high", "too little KL penalty"),
        "read the reply; raise kl.coef, set entropy_coef (0.01), lower optimizer.lr",
    ),
    Alarm(
        "replies do not end",
        "the share of replies that end by themselves fell below alarms.ended_left of what it was (with its 95% interval)",
        "above half of the start",
        "replies run into rollout.max_new_tokens: what is scored is half a reply, and missing_eos rules the reward",
        ("longer replies score higher", "the reward does not see the end token", "missing_eos: none, so that ending costs"),
        "reward.missing_eos: replace, reward.length_penalty; raise kl.coef; look at reward/length_correlation",
    ),
    Alarm(
        "replies end at once",
        "median rollout/length below a fifth of what it was in the first iterations, in tokens",
        "above it",
        "the policy says nothing, since saying something costs it",
        ("scores are negative for every reply, or the length penalty is large", "the KL penalty on each token favours few",
         "the reward likes empty replies"),
        "score an empty reply by hand; reward.normalize: running; lower kl.coef or reward.length_penalty",
    ),
    Alarm(
        "length rewarded",
        "replies grew by more than alarms.length_growth, and score and length correlate by more than 0.5",
        "one of the two is not so",
        "length may be what is learned, not what makes a reply good",
        ("the reward model prefers longer replies", "max_new_tokens lets them grow", "the task does need longer replies"),
        "`rlhf eval` the reward model: length_correlation, accuracy_of_shorter; set reward.length_penalty",
    ),
    Alarm(
        "repetition",
        "the share of 4-grams that a reply has had before (rollout/repeated) rose by more than alarms.repeated",
        "below 0.05 for prose; people have 0.006, greedy decoding of a language model 0.44 (Welleck et al. 2020)",
        "replies go round in circles, and the reward does not mind",
        ("the reward counts what can be repeated", "too little KL penalty", "replies do not end and have to be filled"),
        "read the reply; raise kl.coef; add a source of reward that sees repetition (reward.sources)",
    ),
    Alarm(
        "alike replies",
        "the share of distinct 2-grams in all replies (rollout/distinct) below alarms.distinct_left of what it was",
        "above a quarter of the start",
        "all prompts get nearly the same reply, whatever they ask",
        ("one phrase scores well everywhere", "the reward does not look at the prompt", "too little KL penalty"),
        "read several replies in samples.jsonl; raise kl.coef, set entropy_coef; score a reply as one to another prompt",
    ),
    Alarm(
        "idle critic",
        "value/explained_variance was not above 0 in any of the latest iterations (twice alarms.window)",
        "above 0 after a few iterations",
        "the critic is no better than a constant: advantages are noise, and so is what is learned",
        ("the critic did not start from the reward model", "critic_lr does not fit", "returns are clipped or all alike"),
        "start the critic from the reward model, set ppo.critic_warmup, change optimizer.critic_lr; see reward/score_std",
    ),
    Alarm(
        "rising learning rate",
        "optimizer/lr is above the lowest since the warm-up",
        "it never rises after the warm-up",
        "steps grow where they should shrink, often by mistake",
        ("a run went on (--allow-inexact-resume) with another optimizer.lr", "a run went on with a longer schedule",
         "a schedule of your own in a changed recipe"),
        "look at inexact_resumes in run.json; go on with the rate and the length that the run began with",
    ),
    Alarm(
        "gold falls",
        "the metric alarms.gold fell in three evaluations in a row while eval/score rose",
        "both rise, or neither",
        "the reward is over-optimised: it goes up for reasons that the gold metric does not share (Gao et al. 2022)",
        ("the policy exploits the reward model", "too little KL penalty, or too many iterations",
         "the gold metric measures something else"),
        "take the checkpoint before the fall; raise kl.coef; train the reward model on replies of this policy",
    ),
)  # fmt: skip
