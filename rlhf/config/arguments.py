"""argparse as the commands use it: a mistake is one message of ours, exit code 2."""

from __future__ import annotations

import argparse
from typing import NoReturn

from rlhf.errors import UsageError


class Parser(argparse.ArgumentParser):
    def __init__(self, usage: str) -> None:
        super().__init__(prog="rlhf", usage=usage, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.usage}")


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)
