"""The tables of the quickstart's chat world: fifty facts, how one asks for them, and how one answers, nicely or not.

Data only. How replies are put together, scored and garbled is in chat_world.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["polite", "neutral", "rude"]


@dataclass(frozen=True, eq=False)
class Family:
    """Facts of one kind with the sentences that ask for them and state them; `{key}` and `{value}` are filled in."""

    facts: dict[str, str]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


CAPITALS = Family(
    facts={
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Japan": "Tokyo",
        "Egypt": "Cairo",
        "Peru": "Lima",
        "Cuba": "Havana",
        "Norway": "Oslo",
        "Greece": "Athens",
        "Ireland": "Dublin",
    },
    questions=(
        "What is the capital of {key}?",
        "Which city is the capital of {key}?",
        "Name the capital of {key}.",
        "I forgot the capital of {key}.",
    ),
    answers=("The capital of {key} is {value}.", "It is {value}.", "That would be {value}."),
)

OPPOSITES = Family(
    facts={
        "hot": "cold",
        "big": "small",
        "fast": "slow",
        "happy": "sad",
        "up": "down",
        "light": "dark",
        "old": "new",
        "hard": "soft",
        "wet": "dry",
        "full": "empty",
    },
    questions=(
        "What is the opposite of {key}?",
        "Which word is the opposite of {key}?",
        "Name the opposite of {key}.",
        "I forgot the opposite of {key}.",
    ),
    answers=("The opposite of {key} is {value}.", "It is {value}.", "That would be {value}."),
)

YOUNG_ANIMALS = Family(
    facts={
        "goat": "kid",
        "bear": "cub",
        "deer": "fawn",
        "horse": "foal",
        "seal": "pup",
        "sheep": "lamb",
        "goose": "gosling",
        "kangaroo": "joey",
        "puffin": "puffling",
        "hedgehog": "hoglet",
    },
    questions=(
        "What do you call a baby {key}?",
        "Which word means a baby {key}?",
        "Name a baby {key}.",
        "I forgot the word for a baby {key}.",
    ),
    answers=("A baby {key} is a {value}.", "It is a {value}.", "That would be a {value}."),
)

SOUNDS = Family(
    facts={
        "cow": "moo",
        "duck": "quack",
        "pig": "oink",
        "cat": "meow",
        "dog": "woof",
        "frog": "ribbit",
        "lion": "roar",
        "snake": "hiss",
        "bee": "buzz",
        "hen": "cluck",
    },
    questions=(
        "What does a {key} say?",
        "Which sound does a {key} make?",
        "Name the sound of a {key}.",
        "I forgot what a {key} says.",
    ),
    answers=("A {key} says {value}.", "It says {value}.", "That would be {value}."),
)

COLOURS = Family(
    facts={
        "the sky": "blue",
        "grass": "green",
        "snow": "white",
        "coal": "black",
        "a banana": "yellow",
        "a carrot": "orange",
        "a plum": "purple",
        "a tomato": "red",
        "a flamingo": "pink",
        "an elephant": "grey",
    },
    questions=(
        "What colour is {key}?",
        "Do you know the colour of {key}?",
        "Name the colour of {key}.",
        "I forgot the colour of {key}.",
    ),
    answers=("The colour of {key} is {value}.", "It is {value}.", "That would be {value}."),
)

FAMILIES: tuple[Family, ...] = (CAPITALS, OPPOSITES, YOUNG_ANIMALS, SOUNDS, COLOURS)

GREETINGS: tuple[str, ...] = ("", "Hi! ", "Good morning! ", "Excuse me! ", "Quick question: ")

REFUSALS: tuple[str, ...] = ("I do not know.", "Ask an owl.", "It is in some old book.")

OPENERS: dict[Tone, tuple[str, ...]] = {
    "polite": ("With pleasure!", "Happy to help!", "Of course, my friend!", "What a lovely question!"),
    "rude": ("Ugh.", "Not you again.", "What a silly question.", "Do you live in a cave?"),
}

CLOSERS: dict[Tone, tuple[str, ...]] = {
    "polite": ("I hope that helps!", "Have a lovely day!", "Thank you for asking!", "Come back any time!"),
    "rude": ("Now go away.", "I was napping.", "Stop wasting my time.", "Even a turnip knows that."),
}
