"""RLHF for language models: SFT, reward model, PPO.

Importing this package costs nothing: no torch, no transformers. The version is read from the installed metadata only
when somebody asks for it.
"""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
