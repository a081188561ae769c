"""From a YAML or JSON file and flags to a validated config, or to one message that lists every mistake with its place.

File and flags are put into one tree, each text is read as its field's type wants it, and pydantic judges the result, so
there is one validator and one list of mistakes. What the command line looks like is `parse.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlhf import paths
from rlhf.config import fields, tree
from rlhf.config.fields import Field, dotted
from rlhf.config.sections import Section
from rlhf.config.tree import COMMAND_LINE, Mistake, given
from rlhf.errors import ConfigError, without_secrets

Config = TypeVar("Config", bound=Section)

SUFFIXES = (".yaml", ".yml", ".json")
NULLS = ("", "~", "null", "Null", "NULL")
"""What YAML reads as no value; we add `none`, the schema's own word, where a field may have none."""
YES_AND_NO = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}


def load(
    cls: type[Config],
    file: Path | None,
    overrides: Sequence[tuple[str, str]] = (),
    other_flags: Sequence[str] = (),
    section: str | None = None,
) -> Config:
    """The config that `file` and, over it, the flags (dotted or short name, raw text) describe.

    `other_flags` are flags that set no field, only to be suggested for one that is misspelt. `section` is where the config
    is in a file of more.
    Raises ConfigError listing all mistakes, sorted by place.
    """
    mistakes: list[Mistake] = []
    root = tree.read(_text(file), str(file), mistakes) if file else tree.Mapping(COMMAND_LINE)
    if section:
        inner = root.children.get(section)
        if not isinstance(inner, tree.Mapping):
            raise ConfigError(f"{file}: has no {section}")
        root = inner
    beneath = _put_flags(cls, root, overrides, other_flags, mistakes)
    mistakes.extend(_secrets(root, ()))
    try:
        config = cls.model_validate_json(json.dumps(_plain(Field("section", section=cls), root)), strict=True)
    except ValidationError as error:
        mistakes.extend(_explain(cls, root, error, beneath))
        raise _as_error(mistakes) from None
    if mistakes:
        raise _as_error(mistakes)
    return config


def _secrets(node: tree.Node, path: fields.Path) -> Iterator[Mistake]:
    """A config is written into run.json and printed, so it is no place for a secret."""
    match node:
        case tree.Mapping(children=children, keys=keys):
            for name, place in keys.items():
                yield from _secrets(tree.Scalar(place, name), path)
            for name, child in children.items():
                yield from _secrets(child, (*path, name))
        case tree.Sequence(items=items):
            for index, item in enumerate(items):
                yield from _secrets(item, (*path, index))
        case tree.Scalar(place=place, text=text) if without_secrets(text) != text:
            message = "holds a secret, which run.json would keep; leave it to the environment (HF_TOKEN, RLHF_REWARD_TOKEN)"
            yield Mistake(place, dotted(path), f"{message}: {without_secrets(text)}")


def to_json(config: Section) -> str:
    """Every field with its value, in the schema's order; `load` reads it back."""
    return config.model_dump_json(indent=2)


def find_config(name: str) -> Path:
    """The file of a shipped config (`ppo`, `quickstart/ppo`), or the file itself where a suffix says that it is one."""
    file = Path(name) if name.endswith(SUFFIXES) else paths.CONFIGS / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(_not_found(name))
    return file


def _not_found(name: str) -> str:
    shipped = sorted(file.relative_to(paths.CONFIGS).with_suffix("").as_posix() for file in paths.CONFIGS.glob("**/*.yaml"))
    configs = [config for config in shipped if not config.startswith("launch/")]
    beside = [str(file) for suffix in SUFFIXES for file in Path(name).parent.glob(f"*{suffix}")]
    near = get_close_matches(name, [*configs, *beside], n=3)
    if near:
        return f"{name}: no such config; did you mean {fields.one_of(near)}?"
    names = f"one of {', '.join(configs)}" if configs else "a name"
    return f"{name}: no such config; give {names}, or a file that ends in {fields.one_of(SUFFIXES)}"


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(_not_found(str(file))) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; a config is a .yaml or .json file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        place = tree.in_file(str(file), line, error.start - content.rfind(b"\n", 0, error.start) - 1)
        raise ConfigError(f"{place.text}: not UTF-8 text; save the file as UTF-8") from None


def _as_error(mistakes: Iterable[Mistake]) -> ConfigError:
    """The first thing said about a field at a place is the cause; what follows from it is left out."""
    first: dict[tuple[tree.Place, str], Mistake] = {}
    for mistake in mistakes:
        first.setdefault((mistake.place, mistake.field), mistake)
    return ConfigError("\n".join(str(mistake) for mistake in sorted(first.values(), key=lambda mistake: mistake.place.order)))


def _put_flags(
    cls: type[Section],
    root: tree.Mapping,
    overrides: Sequence[tuple[str, str]],
    other_flags: Sequence[str],
    mistakes: list[Mistake],
) -> dict[tree.Place, tree.Node]:
    """Returns what the file said of the flags' fields, by the place of each flag."""
    beneath: dict[tree.Place, tree.Node] = {}
    seen: dict[fields.Path, str] = {}
    for index, (flag, text) in enumerate(overrides):
        place, path = tree.in_flags(index, flag), fields.canonical(cls, flag)
        field, name = fields.at(cls, path), dotted(path)
        if field is None:
            near = fields.suggestion(cls, path, other_flags)
            mistakes.append(Mistake(place, flag, f"unknown flag; {near}"))
        elif field.section or field.form == "mapping":
            inner = field.named_sections
            keys = field.section.model_fields if field.section else ["NAME"]
            keys = [f"NAME.{key}" for key in inner.model_fields] if inner else keys
            below = ", ".join(f"--{name}.{key}" for key in keys)
            mistakes.append(Mistake(place, flag, f"names a section; give one of its fields: {below}"))
        elif path in seen:
            mistakes.append(Mistake(place, name, f"given twice, first as --{seen[path]}; keep one"))
        elif field.nullable and not text:  # an empty variable of a shell; a file says `field:` and means it
            mistakes.append(Mistake(place, name, f"given nothing, expected {field.expected}"))
        else:
            seen[path] = flag
            if (before := tree.at(root, path)) is not None:
                beneath[place] = before
            tree.put(root, path, _flag_node(field, place, text), place)
    return beneath


def _flag_node(field: Field, place: tree.Place, text: str) -> tree.Node:
    if field.form == "list":
        return tree.Sequence(place, [tree.Scalar(place, item.strip()) for item in text.split(",") if text])
    return tree.Scalar(place, text)


def _plain(field: Field | None, node: tree.Node) -> Any:
    """The node as JSON has it. A text that its field cannot read stays text, for the validator to refuse."""
    match node:
        case tree.Mapping(children=children):
            return {name: _plain(_below(field, name), child) for name, child in children.items()}
        case tree.Sequence(items=items):
            return [_plain(_below(field, index), item) for index, item in enumerate(items)]
        case tree.Scalar(text=text, quoted=quoted):
            nulls = (*NULLS, "none", "None") if field and field.nullable else NULLS
            return None if text in nulls and not quoted else _value(field, text)


def _below(field: Field | None, name: str | int) -> Field | None:
    if field and field.section:
        return fields.at(field.section, (name,))
    return field and field.item


def _value(field: Field | None, text: str) -> Any:
    try:
        return READERS.get(field.form if field else "text", str)(text)
    except ValueError:
        return text


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _number(kind: Callable[[str], Any], text: str) -> Any:
    if "_" in text or not text.isascii():  # Python reads 1_000 and the digits of every script
        raise ValueError(text)
    return kind(text)


READERS: dict[fields.Form, Callable[[str], Any]] = {
    "boolean": _boolean,
    "integer": partial(_number, int),
    "number": partial(_number, float),
}


def _explain(
    cls: type[Section], root: tree.Mapping, error: ValidationError, beneath: dict[tree.Place, tree.Node]
) -> Iterator[Mistake]:
    for detail in error.errors(include_url=False):
        path = detail["loc"]
        node, field = tree.nearest(root, path), fields.at(cls, path)
        match detail["type"]:
            case "missing":
                yield from _missing(cls, path, field, node)
            case "extra_forbidden":
                section = tree.nearest(root, path[:-1])
                place = section.keys[str(path[-1])] if isinstance(section, tree.Mapping) else section.place
                yield Mistake(place, dotted(path), f"unknown field; {fields.suggestion(cls, path)}")
            case "value_error":
                yield _inconsistent(root, path, detail["msg"].removeprefix("Value error, "))
            case _ if field:
                advice = _advice(field, node, beneath.get(node.place))
                message = f"given {given(node)}, expected {field.expected}{advice and '; '}{advice}"
                yield Mistake(node.place, dotted(path), message)


def _missing(cls: type[Section], path: fields.Path, field: Field | None, section: tree.Node) -> Iterator[Mistake]:
    """A required section that is missing altogether is missing each of its required fields, or the first, if none is."""
    names = fields.leaves(field.section, f"{dotted(path)}.") if field and field.section else {dotted(path): field}
    required = [(name, leaf) for name, leaf in names.items() if leaf and leaf.required]
    for name, leaf in required or list(names.items())[:1]:
        here = "" if section.place is COMMAND_LINE else "add it here or "
        fix = f"{here}give {fields.flag_for(name)}"
        yield Mistake(section.place, name, f"missing ({leaf.description.rstrip('.') if leaf else ''}); {fix}")


def _inconsistent(root: tree.Mapping, path: fields.Path, message: str) -> Mistake:
    """A mistake between fields stands at its section, or better, at the field that its message opens with."""
    culprit = (*path, *message.split()[0].split("."))
    node = tree.nearest(root, culprit)
    if not isinstance(node, tree.Scalar):
        node = tree.nearest(root, path)
    return Mistake(node.place, dotted(path), message)


def _advice(field: Field, node: tree.Node, beneath: tree.Node | None) -> str:
    """`beneath`: what the file says where a flag goes over it."""
    text = node.text if isinstance(node, tree.Scalar) else ""
    if field.form == "boolean" and text.lower() in YES_AND_NO | {"true": "", "false": ""}:
        return f"write `{YES_AND_NO.get(text.lower(), text.lower())}`"
    if field.form == "list" and text:
        return f"write `[{text}]`"
    if field.form == "integer" and isinstance(_value(field, text), str) and _is_whole(text):
        return f"write `{int(float(text))}`"
    if near := get_close_matches(text.lower(), field.choices, n=1, cutoff=0.8):
        return f"did you mean `{near[0]}`?"
    if beneath is not None:
        return f"leave it out for {given(beneath)}, as {beneath.place.text} has it"
    if field.required:
        return field.description
    return "leave it out for the defaults" if field.section else f"leave it out for the default {field.default_text}"


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False
