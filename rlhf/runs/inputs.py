"""Whether what a stage reads is there: told before anything is started, by names and small files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.fields import canonical, dotted, flag_for
from rlhf.config.parse import Invocation
from rlhf.errors import DataError
from rlhf.runs.lineage import INPUT_FIELDS, content, is_no_model, specs


def require_inputs(invocation: Invocation[Any], coming: Path | None = None) -> None:
    """Nothing is hashed and no Hub is asked.

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


def _given(invocation: Invocation[Any]) -> set[str]:
    """The fields that the command line says."""
    words = (word[2:].partition("=")[0] for word in invocation.arguments if word.startswith("--"))
    return {dotted(canonical(type(invocation.config), word)) for word in words}
