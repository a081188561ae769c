"""Who takes part in a stage: the trained policy and, in PPO, the frozen reference and the frozen reward model.

A stage asks roles for log-probabilities, values and scores; whether two roles share weights is decided here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.config.policies import Roles as PpoRoles
from rlhf.config.rewards import ONLY
from rlhf.config.schema import DpoConfig, GrpoConfig, KtoConfig, PolicyStage, PpoConfig, RmConfig, SftConfig, Stage
from rlhf.data.collate import TokenBatch, last_row, token_batch
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError
from rlhf.fp8.apply import apply
from rlhf.fp8.state import calibrating, uncalibrated
from rlhf.models.actor_critic import ActorCritic, unwrapped, value_head_for
from rlhf.models.frozen import FrozenLower, freeze_lower, lower_layers, share_lower
from rlhf.models.heads import zero_head
from rlhf.models.load import Loading, load_actor, load_generation_config, load_scalar, load_tokenizer, local, stop_ids
from rlhf.models.save import critic_of
from rlhf.models.source import resolve
from rlhf.models.tokenizers import other_part, own_template, require_rows, require_same_tokenizer
from rlhf.models.trunk import BY_SEGMENTS, compile_layers

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}
"""Dtype of the weights by `precision`; bf16 computes under autocast over fp32 master weights."""


@dataclass
class Reference:
    """The frozen policy the KL penalty is measured from: a model of its own, or a role of the trained policy's base."""

    model: nn.Module
    role: str = "actor"

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, temperature: float) -> Tensor:
        """(K,) of the batch's targets."""
        return self.model(batch, roles=(self.role,), temperature=temperature).logprobs


@dataclass
class RewardModel:
    """A frozen scalar model, read at the last real token: a model of its own, or a role of the trained policy's base."""

    model: nn.Module
    role: str = "critic"
    positions: int | None = None
    """Tokens that its longest row may have; None: as many as one likes."""
    template: Template | None = None
    """Its own, where its tokenizer or chat template is not the actor's: it then reads prompts and replies as text."""

    @torch.no_grad()
    def scores(self, batch: TokenBatch) -> Tensor:
        """(B,) one score a row of a batch that is read at last tokens."""
        return self.model(batch, roles=(self.role,)).values


@dataclass
class Roles:
    """`policy` is what is trained: the actor (SFT), the reward model as a critic (RM), or both (PPO)."""

    policy: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    reference: Reference | None = None
    rewards: dict[str, RewardModel] = field(default_factory=dict)
    """By the names of the reward's sources that are models."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of how roles share weights."""

    @property
    def actor(self) -> nn.Module:
        """As a model of its own, to be saved or looked into."""
        actor = self.policy.part("actor")
        assert actor is not None
        return actor

    @property
    def has_critic(self) -> bool:
        return self.policy.part("critic") is not None or self.policy.value_head is not None

    @property
    def critic(self) -> nn.Module:
        return critic_of(self.policy)

    @property
    def frozen(self) -> list[nn.Module]:
        """Models of frozen roles that are not in the policy."""
        models = [role.model for role in self._frozen_roles]
        return [model for model in models if self.policy not in model.modules()]

    @property
    def starts_as_reference(self) -> bool:
        """Whether the reference is the policy, as it is before its first step."""
        return self.reference is not None and not self.frozen

    @property
    def _frozen_roles(self) -> list[Reference | RewardModel]:
        return [*filter(None, [self.reference]), *self.rewards.values()]

    def prepared(self, model: nn.Module, wrapped: nn.Module) -> None:
        """What an engine made of a model: the frozen roles that it is are computed through it from now on."""
        for role in self._frozen_roles:
            if role.model is model:
                role.model = wrapped

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]

    def check_context(self, longest: int, field: str, whose: str = "the model") -> None:
        """Raises DataError where a row of `longest` tokens has more positions than the model."""
        require_positions(positions(self.policy), longest, field, whose)

    @torch.no_grad()
    def calibrate(self, prompts: Sequence[list[int]], size: int) -> None:
        """Sets delayed FP8 scales that are not set yet by forwards over some prompts, before anything is sampled with them.

        Every rank takes the same prompts, so all have the same scales, and the actor those of its reference.
        """
        templates = {id(role.model): role.template for role in self.rewards.values()}
        for model in (self.policy, *self.frozen):
            if not uncalibrated(model):
                continue
            own = templates.get(id(model))
            read = prompts if own is None else [own.text(self.tokenizer.decode(ids)) for ids in prompts]  # pyright: ignore
            with calibrating(model):
                for rows in chunks(read, size):
                    batch = token_batch(last_row(ids, []) for ids in rows)
                    model(batch.to(next(model.parameters()).device))

    @property
    def stop_ids(self) -> list[int]:
        return stop_ids(self.generation, self.tokenizer)


def open_sft(config: SftConfig) -> Roles:
    model = load_actor(config.model.path, loading_of(config), config.model.from_scratch)
    actor = _with_layers(model, config.model.path, config, scalar=False)
    return _roles(config.model.path, ActorCritic(actor=actor), config.trust_remote_code)


def open_rm(config: RmConfig) -> Roles:
    model = load_scalar(config.model.path, loading_of(config), new_head=True)
    critic = _with_layers(model, config.model.path, config, scalar=True)
    return _roles(config.model.path, ActorCritic(critic=critic), config.trust_remote_code)


def open_dpo(config: DpoConfig | KtoConfig) -> Roles:
    """The reference is the policy itself, to be asked before its first step, unless the config names another one."""
    loading, source, other = loading_of(config), config.model.path, config.model.reference
    actor = _with_layers(load_actor(source, loading), source, config, scalar=False)
    roles = _roles(source, ActorCritic(actor=actor), config.trust_remote_code)
    if other not in (None, source):
        require_same_tokenizer(source, roles.tokenizer, "reference", other, config.trust_remote_code)
        reference = freeze(ActorCritic(actor=_as_it_computes(load_actor(other, loading), config)))
        require_rows(reference, roles.tokenizer)
        roles.reference = Reference(reference)
    elif config.loss.referenced:
        roles.reference = Reference(roles.policy)
    return roles


def open_ppo(config: PpoConfig) -> Roles:
    loading, source, rewards = loading_of(config), config.roles, config.reward.models
    if source.mode == "adapters":
        from rlhf.models.adapter_sources import open_adapters  # imports peft

        policy, role_of = open_adapters(config, loading)
        _as_it_computes(policy.base, config)
        roles = _roles_of_policy(config, policy)
        roles.reference = Reference(policy, "reference") if config.kl.coef > 0 else None
        for name, spec in rewards.items():
            roles.rewards[name] = _reward_model(roles, spec, policy, role_of[name], config)
        return roles
    actor = _with_layers(load_actor(source.actor, loading), source.actor, config, scalar=False)
    if source.mode == "shared":
        policy = ActorCritic(actor=actor, value_head=value_head_for(actor))
    else:
        policy = ActorCritic(actor=actor, critic=_open_critic(config, critic_source(config), loading))
    return _with_frozen_roles(_roles_of_policy(config, policy), config)


def open_grpo(config: GrpoConfig) -> Roles:
    """As PPO's, without a critic."""
    actor = _with_layers(load_actor(config.roles.actor, loading_of(config)), config.roles.actor, config, scalar=False)
    return _with_frozen_roles(_roles_of_policy(config, ActorCritic(actor=actor)), config)


def _with_frozen_roles(roles: Roles, config: PolicyStage) -> Roles:
    """The reference and the reward model, each a model of its own."""
    loading, source = loading_of(config), config.roles
    if config.kl.coef > 0:
        reference = freeze(ActorCritic(actor=_as_it_computes(load_actor(source.reference or source.actor, loading), config)))
        # On CPU torch multiplies a sliced tensor by another kernel when the weight wants no gradient. The reference is only
        # equal to the actor to the bit if its weights say the same; no optimizer has them and no forward records them.
        reference.requires_grad_(config.lora.rank == 0)
        roles.reference = Reference(reference)
        require_rows(reference, roles.tokenizer)
    for name, spec in config.reward.models.items():
        scalar = freeze(ActorCritic(critic=_as_it_computes(load_scalar(spec, replace(loading, nf4=False)), config)))
        roles.rewards[name] = _reward_model(roles, spec, scalar, "critic", config)
        own = roles.rewards[name].template
        require_rows(scalar, roles.tokenizer if own is None else own.tokenizer)
    if config.frozen_layers:
        roles.notes.append(_share_frozen_layers(roles, config))
    return roles


def _share_frozen_layers(roles: Roles, config: PolicyStage) -> str:
    """One lower part for the actor and all who have the same; returns who has it, in words."""
    count, shared, own = config.frozen_layers, ["actor"], []
    lower = FrozenLower(lower_layers(roles.actor, count), config.frozen_cache)
    keeps = config.frozen_cache.limit_mib > 0 and unwrapped(roles.actor).config._attn_implementation == BY_SEGMENTS
    if keeps:
        roles.policy.lower["actor"] = lower
    others = {
        "reference": (roles.reference and roles.reference.model, "actor"),
        "critic": (roles.policy, "critic"),
        **{_named(name): (reward.model, "critic") for name, reward in roles.rewards.items()},
    }
    for name, (model, role) in others.items():
        part = model and getattr(model, role)
        if not isinstance(part, nn.Module):
            continue
        if share_lower(part, roles.actor, count):
            shared.append(name)
            if keeps:
                model.lower[role] = lower
        else:
            own.append(name)
    apart = f"; other weights, so a copy of their own: {', '.join(own)}" if own else ""
    kept = (
        f"what they make of a row is computed once an iteration and kept, {config.frozen_cache.limit_mib} MiB of it at most"
        if keeps
        else "what they make of a row is computed each time (frozen_cache.limit_mib is 0, or rows are not in one sequence)"
    )
    return f"the lowest {count} layers and the embeddings are frozen, in memory once for {', '.join(shared)}{apart}; {kept}"


def _roles_of_policy(config: PolicyStage, policy: ActorCritic) -> Roles:
    source, tokenizer = config.roles, load_tokenizer(config.roles.actor, config.trust_remote_code)
    critic = source.critic if isinstance(source, PpoRoles) else None
    for role, spec in (("reference", source.reference), ("critic", critic)):
        if spec not in (None, "zero"):
            require_same_tokenizer(source.actor, tokenizer, role, spec, config.trust_remote_code)
    if isinstance(config, PpoConfig) and config.roles.mode != "shared" and critic is None and critic_source(config) != "zero":
        spec = critic_source(config)
        if other := other_part(tokenizer, load_tokenizer(spec, config.trust_remote_code)):
            raise DataError(
                f"the critic would start from the reward model {spec}, whose {other} is not that of the actor {source.actor}: "
                "set roles.critic to `zero`, or to a model that has the actor's"
            )
    return _roles(source.actor, policy, config.trust_remote_code, tokenizer)


def critic_source(config: PpoConfig) -> str:
    """What the critic starts from; `zero`: the actor's trunk, and a head of zeros."""
    return config.roles.critic or next(iter(config.reward.models.values()), "zero")


def _reward_model(roles: Roles, spec: str, model: ActorCritic, role: str, config: PolicyStage) -> RewardModel:
    """With a template of its own, which is told, where it would read the actor's tokens as others."""
    reward = RewardModel(model, role, positions(model))
    tokenizer = load_tokenizer(spec, config.trust_remote_code)
    if other := other_part(roles.tokenizer, tokenizer):
        reward.template = own_template(spec, tokenizer)
        how = "by its chat template" if reward.template.chat else "as plain text"
        roles.notes.append(f"the {other} of the reward model {spec} is not the actor's: it reads replies as text, {how}")
    return reward


def _named(reward: str) -> str:
    return "reward model" if reward == ONLY else f"reward model {reward}"


def open_policy(spec: str, trust_remote_code: bool = False) -> Roles:
    """A policy that is used and not trained."""
    actor = load_actor(spec, Loading(trust_remote_code=trust_remote_code))
    return _in_use(spec, ActorCritic(actor=actor), trust_remote_code)


def open_reward_model(spec: str, trust_remote_code: bool = False) -> Roles:
    """A reward model, or critic, that is used and not trained: it stands in the critic's place."""
    critic = load_scalar(spec, Loading(trust_remote_code=trust_remote_code))
    return _in_use(spec, ActorCritic(critic=critic), trust_remote_code)


def open_text_reward(spec: str, template: str, trust_remote_code: bool = False) -> RewardModel:
    """A reward model that reads prompts and replies as texts, with its own tokenizer; `template` as of `Template`."""
    roles = open_reward_model(spec, trust_remote_code)
    own = Template(roles.tokenizer, template, roles.stop_ids)
    return RewardModel(roles.policy, "critic", positions(roles.policy), own)


def _in_use(spec: str, policy: ActorCritic, trust_remote_code: bool) -> Roles:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _roles(spec, freeze(policy).to(device), trust_remote_code)


def freeze(model: ActorCritic) -> ActorCritic:
    return model.requires_grad_(False).eval()


def _open_critic(config: PpoConfig, source: str, loading: Loading) -> nn.Module:
    if source != "zero":
        return _with_layers(load_scalar(source, loading, role="critic"), source, config, scalar=True)
    critic = load_scalar(config.roles.actor, loading, new_head=True)
    zero_head(critic)
    return _with_layers(critic, config.roles.actor, config, scalar=True)


def _with_layers(model: nn.Module, spec: str, config: Stage, scalar: bool) -> nn.Module:
    """A model that is trained: with adapters where the config has them, its linear layers (or its adapters' base) in FP8."""
    freeze_lower(model, config.frozen_layers)
    return _as_it_computes(_with_lora(model, spec, config, scalar), config)


def _as_it_computes(model: nn.Module, config: Stage) -> nn.Module:
    """In FP8, or compiled, where the config says so: the same for all roles, or they would differ where they are equal."""
    if config.fp8.recipe != "none":
        apply(model, config.fp8)
    if config.compile:
        compile_layers(unwrapped(model), config.frozen_layers)
    return model


def _with_lora(model: nn.Module, spec: str, config: Stage, scalar: bool) -> nn.Module:
    lora, source = config.lora, resolve(spec)
    if not lora.rank:
        return model
    from rlhf.models.lora import add_lora  # peft costs five CPU seconds to import; only those who use it pay

    is_adapter = (Path(local(source).path) / "adapter_config.json").exists()
    if is_adapter and lora.base != "plain":
        raise ConfigError(f"lora.base: {spec} is an adapter; merge it first (`rlhf convert {spec} DST --to hf`) and name that")
    if is_adapter and not lora.merge:
        raise ConfigError(
            f"lora: {spec} is itself an adapter; a second one on top of it has no base on disk. "
            "Set lora.merge: true here, or in the stage that made it"
        )
    return add_lora(model, source, lora, scalar, config.seed)  # pyright: ignore[reportArgumentType]


def _roles(
    source: str, policy: ActorCritic, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase | None = None
) -> Roles:
    """`tokenizer`: the source's, where it has been opened already."""
    tokenizer = load_tokenizer(source, trust_remote_code) if tokenizer is None else tokenizer
    generation = load_generation_config(source)
    require_rows(policy, tokenizer)
    stops = stop_ids(generation, tokenizer)
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    generation.pad_token_id = tokenizer.pad_token_id
    return Roles(policy, tokenizer, generation)


def positions(model: ActorCritic) -> int | None:
    """Tokens that its longest row may have; None: as many as one likes."""
    inner = unwrapped(model.actor or model.critic)  # pyright: ignore[reportArgumentType]
    return getattr(inner.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore


def require_positions(there: int | None, longest: int, field: str, whose: str) -> None:
    """Raises DataError where there are fewer than the longest row takes."""
    if there and longest > there:
        raise DataError(f"the longest row takes {longest} positions, {whose} has {there}: lower {field}")


def loading_of(config: Stage) -> Loading:
    """How a stage's models are held."""
    nf4 = config.lora.base == "nf4"
    return Loading(
        DTYPES[config.precision],
        config.attention,
        config.gradient_checkpointing,
        config.seed,
        nf4,
        config.trust_remote_code,
    )
