"""`rlhf compare MODEL --record FILE`: the outputs of a model's modules on fixed tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlhf.config.commands import EvaluationData, RecordConfig
from rlhf.config.parse import Invocation
from rlhf.data.collate import Row, token_batch
from rlhf.data.examples import sft_examples
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError, OutputError
from rlhf.models.actor_critic import unwrapped
from rlhf.models.load import is_scalar
from rlhf.models.precision import computing_in, precisions
from rlhf.models.recordings import Recording, recorded, write_recording
from rlhf.models.roles import Roles, open_policy, open_reward_model, positions
from rlhf.report.console import Console
from rlhf.runs.manifest import versions

SEED = 0
"""Of the built-in tokens."""


def record(invocation: Invocation[RecordConfig]) -> int:
    config, file = invocation.config, Path(invocation.config.record)
    if file.suffix != ".safetensors":
        raise OutputError(f"--record {file}: the file to write must end in .safetensors")
    if file.exists() or not file.absolute().parent.is_dir():
        problem = "is there already" if file.exists() else f"there is no directory {file.parent}"
        raise OutputError(f"--record {file}: {problem}; name another file")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no GPU that torch can use here; `rlhf doctor` says what there is")
    scalar = is_scalar(config.model, config.trust_remote_code)
    roles = (open_reward_model if scalar else open_policy)(config.model, config.trust_remote_code)
    if config.device != "auto":
        roles.policy.to(config.device)
    there = positions(roles.policy)
    if there is not None and there < config.tokens:
        Console("compare", speak=True).note(
            f"the model has {there} positions: rows have at most so many tokens, not --tokens {config.tokens}"
        )
    rows = _rows(config, roles, min(config.tokens, there or config.tokens))
    batch = token_batch(Row([], ids, range(len(ids))) for ids in rows).to(roles.device)
    (precision,) = precisions(config)
    model = roles.policy.critic if scalar else roles.policy.actor
    assert model is not None
    with computing_in(precision, roles, rows, len(rows)) as in_fp8, recorded(unwrapped(model)) as outputs:
        roles.policy(batch, roles=("critic" if scalar else "actor",))
    gpu = torch.cuda.get_device_name(roles.device) if roles.device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    about = {
        "model": config.model,
        "precision": config.precision if not in_fp8 else f"{config.precision} over {config.plain}: {in_fp8}",
        "device": f"{roles.device.type} {gpu}",
        "threads": torch.get_num_threads(),
    }
    about |= {f"versions.{name}": version for name, version in versions().items()}
    lengths = torch.tensor([len(ids) for ids in rows])
    write_recording(file, Recording(about, batch.ids, lengths, outputs))
    told = {"record": str(file), "rows": len(rows), "tokens": int(lengths.sum()), "outputs": len(outputs)} | about
    line = f"compare  {told['outputs']} outputs on {told['tokens']} tokens in {config.precision} on {about['device']}: {file}"
    print(json.dumps(told, indent=2) if invocation.as_json else line)
    return 0


def _rows(config: RecordConfig, roles: Roles, longest: int) -> list[list[int]]:
    """Token ids: the first of the data, or drawn once for all models of the same vocabulary."""
    if config.data is None:
        model = unwrapped(roles.policy.actor or roles.policy.critic)  # pyright: ignore[reportArgumentType]
        words = model.config.get_text_config().vocab_size
        drawn = torch.randint(words, (config.rows, longest), generator=torch.Generator().manual_seed(SEED))
        return drawn.tolist()
    reading = EvaluationData(
        file=config.data, max_length=max(longest, 2), too_long="truncate", loss_on="all", extra_columns="ignore"
    )
    found = sft_examples(config.data, reading, Template(roles.tokenizer, reading.template, roles.stop_ids)).items
    if len(found) < config.rows:
        raise DataError(f"{config.data}: has {len(found)} rows of text that can be used; lower --rows {config.rows}")
    return [example.ids for example in found[: config.rows]]
