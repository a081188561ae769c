"""Opening all roles of PPO as adapters on one base: which base that is, and which adapter each role starts from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf.config.rewards import ONLY
from rlhf.config.schema import PpoConfig
from rlhf.digest import tree_digest
from rlhf.errors import DataError
from rlhf.models.actor_critic import value_head_for
from rlhf.models.adapters import ACTOR, CRITIC, REFERENCE, REWARD, AdaptedBase, owner, scalar_linear
from rlhf.models.heads import HEAD
from rlhf.models.load import Loading, load_actor, local
from rlhf.models.lora import drawing, opened_config, peft_config
from rlhf.models.source import Role, resolve

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Origin:
    """Where a role comes from: a base, and the adapter on it if there is one."""

    spec: str
    base: str
    adapter: Path | None
    config: LoraConfig | None

    @property
    def identity(self) -> str:
        """Of the base: equal for equal bytes, wherever they lie; a hub id stands for itself."""
        return tree_digest(Path(self.base)) if Path(self.base).is_dir() else self.base


def origin(spec: str, scalar: bool = False, role: Role = "model") -> Origin:
    """Raises DataError where a reward model or critic is no adapter: a whole trunk has no place on another base."""
    source = local(resolve(spec, role))
    directory = Path(source.path)
    if (directory / "adapter_config.json").is_file():
        config, base = opened_config(directory, scalar)
        if scalar and config.task_type != TaskType.SEQ_CLS:
            raise DataError(f"{spec}: an adapter without a scalar head: this is a policy, not a reward model")
        return Origin(spec, base, directory, config)  # pyright: ignore[reportArgumentType]
    if scalar:
        raise DataError(
            f"{spec}: has a trunk of its own; with roles.mode `adapters` a reward model is an adapter on the actor's base. "
            "Train it as one: `rlhf rm --model BASE --lora.rank N`"
        )
    return Origin(spec, f"{source.path}@{source.revision}" if source.revision else source.path, None, None)


def open_adapters(config: PpoConfig, loading: Loading) -> tuple[AdaptedBase, dict[str, str]]:
    """The policy of `roles.mode: adapters`, with the adapters of its frozen roles; and the roles of reward models by name."""
    roles, rewards = config.roles, config.reward.models
    role_of = {name: REWARD if name == ONLY else f"{REWARD}_{name}" for name in rewards}
    origins = {ACTOR: origin(roles.actor)}
    if config.kl.coef > 0:
        origins[REFERENCE] = origin(roles.reference or roles.actor)
    for name, spec in rewards.items():
        origins[role_of[name]] = origin(spec, scalar=True)
    if (critic := roles.critic or next(iter(rewards.values()), "zero")) != "zero":
        origins[CRITIC] = origin(critic, scalar=True, role="critic")
    base = origins[ACTOR]
    for role, found in origins.items():
        _require_same_base(base, role, found)

    model = load_actor(base.base, loading)
    head = value_head_for(model)
    fresh = peft_config(config.lora, scalar=False, revision=resolve(base.base).revision)
    configs = {ACTOR: fresh, CRITIC: fresh} | {role: found.config for role, found in origins.items() if found.config}
    with drawing(model, config.lora, scalar=False, seed=config.seed):
        peft = get_peft_model(model, _as_policy(configs.pop(ACTOR)), adapter_name=ACTOR)  # pyright: ignore
    for role, adapter in configs.items():
        with drawing(model, config.lora, scalar=role == CRITIC, seed=config.seed):
            peft.add_adapter(role, _as_policy(adapter))
    heads = {CRITIC: head}
    for role, found in origins.items():
        weights = _load(peft, role, found.adapter) if found.adapter is not None else {}
        if weights:
            heads[role] = scalar_linear(weights, loading.dtype)
        elif role in (CRITIC, *role_of.values()):
            raise DataError(f"{found.adapter or found.base}: an adapter without a scalar head; train it with `rlhf rm`")
    return AdaptedBase(peft, heads), role_of


def _require_same_base(actor: Origin, role: str, other: Origin) -> None:
    if actor.identity == other.identity:
        return
    name = "reward model" if role.startswith(REWARD) else role
    raise DataError(
        f"roles.mode `adapters` needs one base: the actor {actor.spec} stands on {actor.base}, the {name} {other.spec} on "
        f"{other.base}. Train the {name} on the actor's base (`rlhf rm --model {actor.base} --lora.rank N`), or, to train both "
        "on the SFT model, merge that first (`rlhf convert SFT DST --to hf`)"
    )


def _as_policy(config: LoraConfig) -> LoraConfig:
    """For the layers of a causal language model, without dropout; the scalar head is kept beside it."""
    config = copy.copy(config)
    config.task_type, config.modules_to_save, config.exclude_modules = TaskType.CAUSAL_LM, None, None
    config.lora_dropout, config.inference_mode = 0.0, False
    return config


def _load(peft: PeftModel, role: str, directory: Path) -> dict[str, Tensor]:
    """Fills a role's adapter from its directory, every tensor accounted for; returns the weights of the scalar head."""
    try:
        tensors = load_file(directory / WEIGHTS)
        head = {name.rpartition(".")[2]: tensors.pop(name) for name in list(tensors) if f".{HEAD}." in name}
        report = set_peft_model_state_dict(peft, tensors, adapter_name=role)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{directory / WEIGHTS}: cannot be read into its base: {str(error).strip().splitlines()[0]}") from error
    lacking = sorted(name for name in report.missing_keys if owner(name) == role)
    for what, names in (("lacks", lacking), ("holds, but its base has no place for,", sorted(report.unexpected_keys))):
        if names:
            raise DataError(f"{directory / WEIGHTS}: {what} {', '.join(names[:5])}")
    return head
