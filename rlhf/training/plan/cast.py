"""The roles of a stage on the meta device: their modules with every shape, and none of their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from rlhf.config.policies import Roles as PpoRoles
from rlhf.config.rewards import ONLY
from rlhf.config.schema import DpoConfig, KtoConfig, PolicyStage, PpoConfig, RmConfig, SftConfig, Stage
from rlhf.models.actor_critic import ActorCritic, value_head_for
from rlhf.models.frozen import freeze_lower, lower_part, place_lower
from rlhf.models.outline import outline_to_train
from rlhf.models.roles import critic_source, freeze, loading_of
from rlhf.models.source import resolve

ZERO = "zero"


@dataclass
class Cast:
    """`frozen`: the roles that are models of their own. What roles share is one tensor here as there."""

    policy: ActorCritic
    frozen: dict[str, ActorCritic] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every role by name: those of the policy, then the frozen ones."""
        own: dict[str, nn.Module] = {
            name: part for name in ("actor", "critic") if (part := getattr(self.policy, name)) is not None
        }
        if self.policy.value_head is not None:
            own["value head"] = self.policy.value_head
        return own | self.frozen


def cast_of(config: Stage) -> Cast:
    """Raises DataError where a model is not there, or of no architecture that transformers knows."""
    if isinstance(config, SftConfig):
        return Cast(ActorCritic(actor=_trained(config, config.model.path, scalar=False)))
    if isinstance(config, RmConfig):
        return Cast(ActorCritic(critic=_trained(config, config.model.path, scalar=True)))
    if isinstance(config, DpoConfig | KtoConfig):
        cast = Cast(ActorCritic(actor=_trained(config, config.model.path, scalar=False)))
        if config.model.reference not in (None, config.model.path):
            cast.frozen["reference"] = _frozen(config, str(config.model.reference), scalar=False)
        return cast
    assert isinstance(config, PolicyStage)
    on_adapters = isinstance(config.roles, PpoRoles) and config.roles.mode == "adapters"
    cast = _policy(config)
    source = config.roles.reference or config.roles.actor
    if config.kl.coef > 0 and not on_adapters:
        cast.frozen["reference"] = _frozen(config, source, scalar=False)
        if config.frozen_layers and source == config.roles.actor:
            _share_lower(cast.frozen["reference"].actor, cast.policy.actor, config.frozen_layers)
    for name, spec in config.reward.models.items():
        if on_adapters:
            cast.notes.append(f"{reward_role(name)}: an adapter on the base, counted as one of rank {config.lora.rank}")
            continue
        cast.frozen[reward_role(name)] = _frozen(config, spec, scalar=True)
    if config.frozen_layers and config.reward.models:
        cast.notes.append("frozen layers that the reward model or its critic may share with the actor are counted for each")
    return cast


def reward_role(name: str) -> str:
    """Of a source of reward."""
    return "reward" if name == ONLY else f"reward {name}"


def _policy(config: PolicyStage) -> Cast:
    actor = _trained(config, config.roles.actor, scalar=False)
    if not isinstance(config, PpoConfig):
        return Cast(ActorCritic(actor=actor))
    if config.roles.mode == "shared":
        return Cast(ActorCritic(actor=actor, value_head=value_head_for(actor)))
    origin = critic_source(config)
    from_actor = origin == ZERO or config.roles.mode == "adapters"
    critic = _trained(config, config.roles.actor if from_actor else origin, scalar=True)
    if config.roles.mode == "adapters":
        _share_base(critic, actor)
        return Cast(ActorCritic(actor=actor, critic=critic), notes=["roles are adapters on one base, which counts once"])
    if config.frozen_layers and from_actor:
        _share_lower(critic, actor, config.frozen_layers)
    return Cast(ActorCritic(actor=actor, critic=critic))


def _trained(config: Stage, spec: str, scalar: bool) -> nn.Module:
    model = outline_to_train(spec, scalar, replace(loading_of(config), nf4=False))
    freeze_lower(model, config.frozen_layers)
    if not config.lora.rank:
        return model
    from rlhf.models.lora import add_lora  # peft costs five CPU seconds to import

    return add_lora(model, resolve(spec), config.lora, scalar, config.seed)


def _frozen(config: Stage, spec: str, scalar: bool) -> ActorCritic:
    model = outline_to_train(spec, scalar, replace(loading_of(config), nf4=False))
    return freeze(ActorCritic(critic=model) if scalar else ActorCritic(actor=model))


def _share_lower(model: nn.Module | None, owner: nn.Module | None, count: int) -> None:
    assert model is not None
    assert owner is not None
    place_lower(model, lower_part(model, count), lower_part(owner, count))


def _share_base(model: nn.Module, owner: nn.Module) -> None:
    """The frozen weights of a model with adapters become the owner's, where that has one of the same name."""
    theirs = dict(owner.named_modules())
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            other = getattr(theirs.get(name), leaf, None)
            if not parameter.requires_grad and isinstance(other, nn.Parameter) and other.shape == parameter.shape:
                setattr(module, leaf, other)
