"""What the schema says about a field, in a form that reading, messages and `--help` share.

Only the kinds of field that the schema uses are known here; a new kind (a union of sections, say) is a new branch in
`describe`, and until then a loud error.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.config.schema import SHORT_FLAGS, STAGES, Section

Form = Literal["boolean", "integer", "number", "text", "choice", "list", "mapping", "section"]
Path = tuple[str | int, ...]
"""A field's names from the root of the config; an integer counts into a list."""

FORMS: dict[type, Form] = {bool: "boolean", int: "integer", float: "number", str: "text"}
NOUNS: dict[Form, str] = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "text",
}


@dataclass(frozen=True)
class Field:
    """One field of the schema; `item` is what a list or mapping holds, `section` the class of a nested section."""

    form: Form
    nullable: bool = False
    limits: str = ""
    choices: tuple[str, ...] = ()
    item: Field | None = None
    section: type[Section] | None = None
    required: bool = True
    default: Any = None
    description: str = ""

    @property
    def named_sections(self) -> type[Section] | None:
        """What hangs from the names of a mapping, where that is sections."""
        return self.item.section if self.item and self.form == "mapping" else None

    @property
    def expected(self) -> str:
        """The values it takes, in words: `a number, above 0, or none`."""
        return self._kind + (", or none" if self.nullable else "")

    @property
    def _kind(self) -> str:
        if self.section:
            return f"the fields of a section ({', '.join(self.section.model_fields)})"
        if self.item:
            return f"a {self.form} of {self.item.expected}"
        if self.choices:
            return one_of(self.choices)
        return ", ".join(filter(None, [NOUNS[self.form], self.limits]))

    @property
    def default_text(self) -> str:
        """The default as one would write it in a file."""
        if self.default is None:
            return "none"
        if self.default in ((), {}):
            return "empty"
        return str(self.default).lower() if self.form == "boolean" else str(self.default)


def describe(annotation: Any, constraints: Sequence[Any] = ()) -> Field:
    """The field a type annotation stands for."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], [limit for extra in arguments[1:] for limit in getattr(extra, "metadata", ())])
    if origin in (Union, types.UnionType):
        (only,) = [arm for arm in arguments if arm is not types.NoneType]
        return replace(describe(only), nullable=True)
    if origin is Literal:
        return Field("choice", choices=arguments)
    if origin is tuple:
        return Field("list", item=describe(arguments[0]))
    if origin is dict:
        return Field("mapping", item=describe(arguments[1]))
    if issubclass(annotation, Section):
        return Field("section", section=annotation)
    return Field(FORMS[annotation], limits=_limits(constraints))


def _limits(constraints: Sequence[Any]) -> str:
    bounds = {name: value for constraint in constraints for name, value in _bounds(constraint)}
    if {"ge", "le"} <= bounds.keys():
        return f"from {bounds['ge']} to {bounds['le']}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(f"{word} {bounds[name]}" for name, word in words.items() if name in bounds)


def _bounds(constraint: Any) -> Iterator[tuple[str, Any]]:
    """The bounds an annotated-types constraint carries (`Ge(ge=0)` has one)."""
    return ((name, getattr(constraint, name)) for name in ("gt", "ge", "lt", "le") if hasattr(constraint, name))


@lru_cache
def of_section(section: type[Section]) -> dict[str, Field]:
    """The fields of one section, by name."""
    return {name: _from_info(info) for name, info in section.model_fields.items()}


def _from_info(info: FieldInfo) -> Field:
    return replace(
        describe(info.annotation, info.metadata),
        required=info.is_required(),
        default=None if info.is_required() else info.get_default(call_default_factory=True, validated_data={}),
        description=" ".join((info.description or "").split()),
    )


@lru_cache
def leaves(section: type[Section], prefix: str = "") -> dict[str, Field]:
    """Every field below a section that is no section itself, by dotted name."""
    found: dict[str, Field] = {}
    for name, field in of_section(section).items():
        found |= leaves(field.section, f"{prefix}{name}.") if field.section else {prefix + name: field}
    return found


def at(section: type[Section], path: Path) -> Field | None:
    """The field that `path` leads to, if there is one."""
    field: Field | None = Field("section", section=section)
    for name in path:
        if field is None:
            return None
        field = of_section(field.section).get(str(name)) if field.section else field.item
    return field


def dotted(path: Path) -> str:
    """`eval.scorers[1]` from its parts."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def canonical(section: type[Section], flag: str) -> Path:
    """The field a flag means: short flags written out, dashes read as underscores, the keys of a mapping left alone.

    A key of a mapping may have dots in it, but not where sections hang from the keys.
    """
    short = flag.replace("-", "_")
    for long, its_short in SHORT_FLAGS.items():
        if its_short == short and long in leaves(section):
            return tuple(long.split("."))
    path: Path = ()
    parts = flag.split(".")
    for index, part in enumerate(parts):
        field = at(section, path)
        if field and field.form == "mapping" and not field.named_sections:
            return (*path, ".".join(parts[index:]))
        path = (*path, part if field and field.named_sections else part.replace("-", "_"))
    return path


def flag_for(name: str) -> str:
    """The shortest flag that gives a field."""
    return "--" + SHORT_FLAGS.get(name, name)


def suggestion(section: type[Section], path: Path, other_flags: Sequence[str] | None = None) -> str:
    """What an unknown field may have been meant to be: one near it in its section, its namesakes elsewhere, a stage.

    With `other_flags`, those of the command that are no fields, it was given as a flag and the answer is in flags.
    """
    *parents, key = (str(part) for part in path)
    if dotted(path) in leaves(section):
        return f"sections nest: write `{key.rpartition('.')[2]}:` under `{key.rpartition('.')[0]}:`"
    parent = at(section, tuple(parents))
    keys = list(parent.section.model_fields) if parent and parent.section else []
    near = [dotted((*parents, close)) for close in get_close_matches(key, keys, n=1)]
    elsewhere = [leaf for leaf in leaves(section) if leaf.endswith(f".{key}") and leaf not in near]
    found = near + elsewhere or get_close_matches(dotted(path), [*leaves(section), *(other_flags or ())], n=1)
    if found:
        return f"did you mean {one_of(found if other_flags is None else [f'--{name}' for name in found])}?"
    if stages := [stage for stage, config in STAGES.items() if at(config, canonical(config, dotted(path)))]:
        return f"it belongs to {' and '.join(stages)}"
    return f"known here: {', '.join(keys)}" if other_flags is None else "--help lists them all"


def one_of(names: Sequence[str]) -> str:
    """`a`, `b` or `c`."""
    quoted = [f"`{name}`" for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
