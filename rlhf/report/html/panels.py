"""Which figures are drawn together, and what a reader should look for in them."""

from __future__ import annotations

PANELS = (
    ("Reward", ("reward/score", "eval/score"), "mean score of a reply; should rise, then level off"),
    ("KL from the reference", ("kl/sequence", "eval/kl"), "nats a reply; the price of the reward"),
    ("Clipped tokens", ("policy/clip_fraction", "value/clip_fraction"), "share of tokens; of the policy below 0.3"),
    ("Length of replies", ("rollout/length", "eval/length"), "tokens; growth with the reward may be length bias"),
    ("Replies that end", ("rollout/ended", "eval/ended"), "share; the others are cut off"),
    ("Entropy", ("policy/entropy",), "nats a token; should not fall to 0"),
    ("Explained variance", ("value/explained_variance",), "of the critic; should come near 1"),
    ("Loss", ("loss", "eval/loss"), "should fall"),
    ("Accuracy", ("accuracy", "eval/accuracy"), "share of pairs ranked right; 0.5 is a coin"),
    ("Margin", ("margin", "eval/margin"), "score of the better reply less that of the worse"),
    ("Losses", ("policy/loss", "value/loss"), "of the surrogate; their size says little"),
    ("Gradient norm", ("optimizer/grad_norm",), "before clipping; spikes are steps to look at"),
    ("Learning rate", ("optimizer/lr",), "as scheduled"),
)
"""Title, metrics, note. What a run does not measure is left out; what is not named here comes after, one by one."""

NOT_DRAWN = ("step", "tokens")
