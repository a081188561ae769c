"""RLHF for language models: SFT, reward model, PPO.

    policy = rlhf.load_actor("runs/ppo")
    replies = policy.generate(["What is the capital of France?"], max_new_tokens=64)
    scores = rlhf.load_reward("runs/rm").score(prompts, [reply.text for reply in replies])

Importing this package costs nothing: no torch, no transformers; they come with the first of these calls. The version is read
from the installed metadata only when somebody asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.training.inference import load_actor, load_reward

    __version__: str

__all__ = ["__version__", "load_actor", "load_reward"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf")
    if name in __all__:
        from rlhf.training import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
