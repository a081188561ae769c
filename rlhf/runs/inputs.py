"""Whether what a stage reads is there, and its rows begin as they should: told before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.fields import canonical, dotted, flag_for
from rlhf.config.parse import Invocation
from rlhf.data.conversations import BadRow
from rlhf.data.formats import Record, open_source
from rlhf.data.rows import read_rows
from rlhf.data.shapes import SHAPES, Schema
from rlhf.errors import DataError
from rlhf.runs.dry_run import ROWS
from rlhf.runs.lineage import INPUT_FIELDS, content, is_no_model, specs


def require_inputs(invocation: Invocation[Any], coming: Path | None = None) -> None:
    """Goes by names and small files: nothing is hashed and no Hub is asked.

    Args:
        coming: a directory that does not hold all yet which earlier stages will have written there.

    Raises:
        DataError: as `lineage.inputs_of`, but for what has changed since; of a field that no flag gave, with the file that did.
    """
    for name, spec in specs(invocation.config):
        if coming is not None and Path(spec).absolute().is_relative_to(coming.absolute()):
            continue
        try:
            content(name, spec)
        except DataError as error:
            field = INPUT_FIELDS.get(name, name)
            whole = field.partition("[")[0]  # a flag gives all of a list
            if invocation.config_file is None or whole in _given(invocation):
                raise
            first = "" if is_no_model(name, spec) or Path(spec).exists() else "run that stage first, or "
            said = str(error).removeprefix(f"{field}: ")
            raise DataError(f"{field} of {invocation.config_file}: {said}; {first}give {flag_for(whole)}") from None


def require_rows(invocation: Invocation[Any]) -> None:
    """A file whose first row is wrong is read as the stage would read it, for that to say what is wrong: a model is opened
    before, which takes longer. What a reward asks of the rows is not known yet.

    Raises:
        DataError: as `read_rows`.
    """
    data, kind = invocation.config.data, ROWS[invocation.stage]
    columns: dict[str, Any] = {"columns": data.columns, "json_key": getattr(data, "json_key", None)}
    columns["extra_columns"] = "ignore" if kind == "prompt" else data.extra_columns
    allowed = {"on_error": data.on_error, "max_skip_fraction": data.max_skip_fraction}
    for path in filter(None, (data.train, data.eval)):
        if not _begins_well(path, Schema.of(kind, **columns), data.max_line_bytes):
            read_rows(path, kind, **columns, **allowed, max_line_bytes=data.max_line_bytes)


def _begins_well(path: str, schema: Schema, max_line_bytes: int) -> bool:
    """Whether there is a first row, and it is as it should be."""
    first = next(open_source(Path(path), [], max_line_bytes, prompts=schema.kind == "prompt"), None)
    if not isinstance(first, Record):
        return False
    try:
        SHAPES[schema.kind](schema.fields_of(first.value))
    except BadRow:
        return False
    return True


def _given(invocation: Invocation[Any]) -> set[str]:
    """The fields that the command line says."""
    words = (word[2:].partition("=")[0] for word in invocation.arguments if word.startswith("--"))
    return {dotted(canonical(type(invocation.config), word)) for word in words}
