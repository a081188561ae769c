"""Weights that follow the actor's: a moving average of it that becomes a result, and a reference that is moved to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf.config.schema import PolicyStage
from rlhf.fp8.state import forget_weights
from rlhf.models.actor_critic import ActorCritic, role_of
from rlhf.models.roles import Roles
from rlhf.models.save import merged_copy, save_model
from rlhf.training.session import Training


class Followers:
    """Those that a config asks for. Made before the policy is prepared, and after the reference is."""

    def __init__(self, train: Training, config: PolicyStage, roles: Roles) -> None:
        self.train, self.config, self.roles, self.every = train, config, roles, config.kl.refresh_every
        self.reference = self.average = None
        if self.every:
            assert roles.reference is not None
            inner: ActorCritic = train.accelerator.unwrap_model(roles.reference.model)  # pyright: ignore
            self.reference = MovingReference(train, roles.policy, inner, config.kl.refresh_keep)
            train.remember_weights(reference=self.reference)
        if config.ema_decay:
            self.average = ActorAverage(train, roles.policy, config.ema_decay)
            train.remember_weights(ema=self.average)

    @property
    def outputs(self) -> list[str]:
        return ["ema"] if self.average is not None else []

    def save_average(self) -> None:
        """Of the consolidated actor, before it is saved itself, which may merge its adapters. Rank 0 calls it alone."""
        if self.average is not None:
            roles, merge = self.roles, self.config.lora.merge
            with self.average.in_place_of_actor():
                actor = merged_copy(roles.actor) if merge else roles.actor
                save_model(actor, self.train.run / "ema", roles.tokenizer, roles.generation, merge)

    def follow(self, step: int) -> None:
        """After the update of iteration `step`."""
        if self.average is not None:
            self.average.follow()
        if self.reference is not None and (step + 1) % self.every == 0:
            self.reference.follow()


class ActorAverage:
    """The actor's trained weights, averaged: decay * average + (1 - decay) * weights. In the memory of rank 0's host."""

    def __init__(self, train: Training, policy: ActorCritic, decay: float) -> None:
        self.train, self.policy, self.decay = train, policy, decay
        self.average = {name: p.detach().cpu().clone() for name, p in _of_actor(policy).items()} if train.is_main else {}

    @torch.no_grad()
    def follow(self) -> None:
        for name, parameter in _of_actor(self.policy).items():
            whole = self.train.engine.whole(parameter)
            if self.train.is_main:
                self.average[name].lerp_(whole.cpu(), 1 - self.decay)

    @contextmanager
    def in_place_of_actor(self) -> Iterator[None]:
        """In here the actor has the average for weights. Rank 0 enters alone."""
        own = {name: parameter.detach().clone() for name, parameter in _of_actor(self.policy).items()}
        self._put(self.average)
        yield
        self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in _of_actor(self.policy).items():
            parameter.copy_(weights[name])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.average.items()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if self.train.is_main:
            self.average = dict(tensors)


class MovingReference:
    """The reference's weights become keep * reference + (1 - keep) * actor, where the actor's are trained."""

    def __init__(self, train: Training, policy: ActorCritic, reference: nn.Module, keep: float) -> None:
        self.train, self.policy, self.model, self.keep = train, policy, reference, keep
        self.names = list(_of_actor(policy))

    @torch.no_grad()
    def follow(self) -> None:
        engine, own = self.train.engine, self._own()
        for name, parameter in _of_actor(self.policy).items():
            actor = engine.whole(parameter)
            engine.put(own[name], torch.lerp(actor, engine.whole(own[name]).to(actor), self.keep))
        forget_weights(self.model)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, self.train.engine.whole(parameter)) for name, parameter in self._own().items())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._own().items():
            self.train.engine.put(parameter, tensors[name])
        forget_weights(self.model)

    def _own(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}


def _of_actor(policy: ActorCritic) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad and role_of(name) == "actor"}
