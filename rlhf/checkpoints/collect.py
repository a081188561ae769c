"""From a heap of named tensors to ours, by a table: every tensor used once, every one that is needed found."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from rlhf.checkpoints import names
from rlhf.checkpoints.operations import Operation
from rlhf.checkpoints.templates import fill, match, piece
from rlhf.errors import DataError

Table = Sequence[tuple[str, Operation]]
"""(our name, the operation that makes it from theirs)"""


@dataclass(frozen=True)
class Group:
    """One tensor of ours, and the keys it is made from."""

    ours: str
    operation: Operation
    keys: tuple[str, ...]


class UnknownKey(DataError):
    """A table has no row for a key."""


def collect(keys: Iterable[str], table: Table, place: str) -> list[Group]:
    """Sort the keys into tensors of ours.

    Raises:
        UnknownKey: a key fits no row.
        DataError: a part of a tensor is missing, or two keys claim the same place.
    """
    found: dict[tuple[str, Operation], dict[int, str]] = defaultdict(dict)
    for key in keys:
        row = _row(key, table)
        if row is None:
            raise UnknownKey(f"{place}: {key}: not a tensor of this layout{_nearest(key, table)}")
        ours, operation, member = row
        found[ours, operation][member] = key
    makers: dict[str, Group] = {}
    for (ours, operation), members in found.items():
        if len(members) < len(operation.names):
            lacking = next(index for index in range(len(operation.names)) if index not in members)
            there = next(iter(members.values()))
            raise DataError(f"{place}: {there} is there, {_sibling(there, operation, lacking)} that belongs to it is missing")
        keys_in_order = tuple(members[index] for index in range(len(members)))
        if ours in makers:
            raise DataError(f"{place}: {makers[ours].keys[0]} and {keys_in_order[0]} are both {ours}")
        makers[ours] = Group(ours, operation, keys_in_order)
    return list(makers.values())


def complete(ours: Iterable[str], place: str) -> None:
    """Every layer has what the others of its kind have, and the whole has what a language model needs.

    Raises:
        DataError: naming the tensor that is missing.
    """
    present = set(ours)
    for needed in (names.EMBEDDING, fill(names.FINAL_NORM, {"leaf": "weight"})):
        if needed not in present:
            raise DataError(f"{place}: {needed} is missing")
    layers = sorted({int(number[1]) for name in present if (number := re.match(r"decoder\.layers\.(\d+)\.", name))})
    if not layers:
        raise DataError(f"{place}: holds no layer")
    for expected, number in enumerate(layers):
        if expected != number:
            raise DataError(f"{place}: layer {expected} is missing; layer {number} is there")
    by_kind: dict[bool, dict[str, int]] = {True: {}, False: {}}
    experts = 1 + max((int(found[1]) for name in present if (found := re.search(r"\.experts\.(\d+)\.", name))), default=-1)
    pieces_of: dict[int, set[str]] = defaultdict(set)
    for name in present:
        if number := re.match(r"decoder\.layers\.(\d+)\.", name):
            pieces_of[int(number[1])].add(name[number.end() :])
    for number in layers:
        by_kind[_routed(pieces_of[number])] |= {name: number for name in pieces_of[number]}
    for number in layers:
        routed = _routed(pieces_of[number])
        needed = {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight", "input_layernorm.weight"}
        if routed:
            stems = [f"mlp.experts.{expert}.linear_fc{matrix}.weight" for expert in range(experts) for matrix in (1, 2)]
            needed |= {"mlp.router.weight", *stems}
        else:
            needed |= {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
        for name in sorted((needed | set(by_kind[routed])) - pieces_of[number]):
            other = f"; layer {by_kind[routed][name]} has its own" if name in by_kind[routed] else ""
            raise DataError(f"{place}: decoder.layers.{number}.{name} is missing{other}")


def _routed(pieces: set[str]) -> bool:
    return any(name.startswith(("mlp.router.", "mlp.experts.")) for name in pieces)


def _row(key: str, table: Table) -> tuple[str, Operation, int] | None:
    for ours, operation in table:
        for member, template in enumerate(operation.names):
            values = match(template, key)
            if values is not None:
                return fill(ours, values), operation, member
    return None


def _sibling(key: str, operation: Operation, lacking: int) -> str:
    values = next(values for template in operation.names if (values := match(template, key)) is not None)
    return fill(operation.names[lacking], values)


def _nearest(key: str, table: Table) -> str:
    known = {piece(template): template for _, operation in table for template in operation.names}
    shown = {template.replace("{leaf}", "weight") for template in known.values()}
    close = get_close_matches(piece(key), sorted(shown), n=2, cutoff=0.6)
    return f"; nearest: {' or '.join(close)}" if close else ""


def in_order(ours: Iterable[str]) -> list[str]:
    """Our names in the order a model uses them."""
    rank = {template: index for index, template in enumerate(names.NAMES)}

    def order(name: str) -> tuple[int, int, int, str]:
        template, values = names.template_of(name)
        within = rank[template]
        block = 1 if "layer" in values else (0 if within < rank[names.INPUT_NORM] else 2)
        return block, int(values.get("layer", 0)), within * 10_000 + int(values.get("expert", 0)), name

    return sorted(ours, key=order)
