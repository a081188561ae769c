"""The words of `rlhf`, a module each: how it is asked (`USAGE`) and what it does (`run`, which returns the exit code).

None of them imports torch before it has read its flags: what is asked wrongly is said at once.
"""

STAGES = ("sft", "rm", "dpo", "kto", "ppo", "grpo")
