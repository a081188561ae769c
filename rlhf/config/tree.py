"""A config file as a tree of texts that know their places, before anybody says what they mean.

YAML's own guesses (`no` is false, `1e-5` is text) are not asked for: the tree is built from the parser's events and
keeps what was written. JSON needs no code of its own, being YAML. What YAML has for sharing and types (anchors,
aliases, tags, several documents) is refused: a config says each thing once, where it stands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from rlhf.config.fields import Path, dotted
from rlhf.errors import ConfigError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 16
"""Levels a file may nest: far above the schema's three, far below Python's recursion limit."""


class Place(NamedTuple):
    """Where something was given; places sort as they are read, the file from its top, then the flags."""

    order: tuple[int, int]
    text: str


COMMAND_LINE = Place((-1, 0), "command line")


def in_file(file: str, line: int, column: int) -> Place:
    """`line` and `column` count from 0, as the parser does; people count from 1."""
    return Place((line, column), f"{file}:{line + 1}:{column + 1}")


def in_flags(index: int, flag: str) -> Place:
    return Place((sys.maxsize, index), f"--{flag}")


class Mistake(NamedTuple):
    """One thing that is wrong, at the place to put it right."""

    place: Place
    field: str
    message: str

    def __str__(self) -> str:
        named_already = self.field in ("", self.place.text.removeprefix("--"))
        return ": ".join([self.place.text, *([] if named_already else [self.field]), self.message])


@dataclass(frozen=True)
class Scalar:
    """A text as it was written, without its quotes."""

    place: Place
    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Mapping:
    """A section; its own place is that of the key it hangs from."""

    place: Place
    children: dict[str, Node] = field(default_factory=dict)
    keys: dict[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Sequence:
    place: Place
    items: list[Node] = field(default_factory=list)


Node = Scalar | Mapping | Sequence


def read(text: str, file: str, mistakes: list[Mistake]) -> Mapping:
    """The tree of a YAML or JSON text; what is wrong but can be read past is added to `mistakes`.

    Raises ConfigError where nothing after it could be read: no YAML, or no mapping at its root.
    """
    unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if unprintable:
        before = text[: unprintable.start()]
        place = in_file(file, before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise ConfigError(f"{place.text}: not a text file: it holds the control character U+{ord(unprintable[0]):04X}")
    try:
        return _Reader(text, file, mistakes).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = in_file(file, mark.line, mark.column) if mark else Place((0, 0), file)
        advice = "indent with spaces, quote a text that holds `: ` or ` #`"
        raise ConfigError(f"{place.text}: not YAML: {error.problem}; {advice}") from None


class _Reader:
    def __init__(self, text: str, file: str, mistakes: list[Mistake]) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=LOADER)
        self.file = file
        self.mistakes = mistakes

    def document(self) -> Mapping:
        starts = (yaml.StreamStartEvent, yaml.DocumentStartEvent)
        event = next(event for event in self.events if not isinstance(event, starts))
        start = self._place(event)
        root = None if isinstance(event, yaml.StreamEndEvent) else self._node(event, (), start)
        if not isinstance(root, Mapping):
            raise ConfigError(f"{start.text}: expected `field: value` lines, found {given(root)}")
        for extra in self.events:
            if isinstance(extra, yaml.DocumentStartEvent):
                self._refuse(self._place(extra), (), "a second document starts here; a config is one, so keep one")
                break
        return root

    def _node(self, event: Any, path: Path, place: Place) -> Node:
        if len(path) > DEEPEST:
            raise ConfigError(f"{self._place(event).text}: nested more than {DEEPEST} deep; no field is")
        self._refuse_sharing(event, path)
        match event:
            case yaml.MappingStartEvent():
                return self._mapping(path, place)
            case yaml.SequenceStartEvent():
                items = []
                while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                    items.append(self._node(item, (*path, len(items)), self._place(item)))
                return Sequence(self._place(event), items)
            case yaml.AliasEvent():
                return Scalar(self._place(event), f"*{event.anchor}")
            case _:
                return Scalar(self._place(event), event.value, quoted=not event.implicit[0])

    def _mapping(self, path: Path, place: Place) -> Mapping:
        mapping = Mapping(place)
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            key_place = self._place(key)
            name = self._node(key, path, key_place)
            text = name.text if isinstance(name, Scalar) else given(name)
            value = self._node(next(self.events), (*path, text), key_place)
            if not isinstance(name, Scalar):
                self._refuse(key_place, path, f"a field's name is plain text, not {text}")
            elif text in mapping.children:
                self._refuse(key_place, (*path, text), f"given twice, first at {mapping.keys[text].text}; keep one")
            else:
                mapping.children[text] = value
                mapping.keys[text] = key_place
        return mapping

    def _refuse_sharing(self, event: Any, path: Path) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._refuse(self._place(event), path, f"alias `*{event.anchor}`: write the value itself")
        elif event.anchor:
            self._refuse(self._place(event), path, f"anchor `&{event.anchor}`: leave it out, there are no aliases here")
        elif event.tag:
            self._refuse(self._place(event), path, f"tag `{event.tag}`: leave it out, the field's type decides")

    def _refuse(self, place: Place, path: Path, message: str) -> None:
        self.mistakes.append(Mistake(place, dotted(path), message))

    def _place(self, event: Any) -> Place:
        return in_file(self.file, event.start_mark.line, event.start_mark.column)


def given(node: Node | None) -> str:
    """What somebody wrote, for a message: long texts cut short."""
    match node:
        case Mapping():
            return "a section of fields"
        case Sequence():
            return "a list"
        case Scalar(text=text, quoted=quoted) if text or quoted:
            words = " ".join(text.split())
            return f"`{words[:57]}...`" if len(words) > 60 else f"`{words}`"
        case _:
            return "nothing"


def put(root: Mapping, path: Path, node: Node, key: Place) -> None:
    """Set what hangs at `path`, over what the file said; sections missing on the way take their parent's place.

    Nothing is set below a text: the file's own mistake there is reported anyway.
    """
    *parents, last = (str(part) for part in path)
    section = root
    for name in parents:
        below = section.children.setdefault(name, Mapping(section.place))
        if not isinstance(below, Mapping):
            return
        section = below
    section.children[last] = node
    section.keys[last] = key


def at(root: Mapping, path: Path) -> Node | None:
    """What hangs at `path`, if anything does."""
    node: Node | None = root
    for name in path:
        node = node.children.get(str(name)) if isinstance(node, Mapping) else None
    return node


def nearest(root: Mapping, path: Path) -> Node:
    """The node at `path`, or the last one on the way to it."""
    node: Node = root
    for part in path:
        if isinstance(node, Mapping) and part in node.children:
            node = node.children[str(part)]
        elif isinstance(node, Sequence) and isinstance(part, int):
            node = node.items[part]
        else:
            break
    return node
