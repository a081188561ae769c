"""PPO-ptx: the loss of demonstrations or plain text, mixed into a policy's steps (Ouyang et al. 2022, arXiv:2203.02155)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from rlhf.config.policies import Ptx
from rlhf.config.sections import Schedule
from rlhf.data.collate import sft_batch, trained_places
from rlhf.data.examples import Examples, SftExample, sft_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.sft import sft_loss
from rlhf.models.roles import Roles
from rlhf.training.session import Training


class PretrainingMix:
    """Rows of `config.file`, `config.batch_size` of them a step; without a file it does nothing."""

    def __init__(self, train: Training, config: Ptx, roles: Roles, micro_batch_size: int) -> None:
        self.train, self.config, self.micro_batch_size = train, config, micro_batch_size
        self.rows: list[SftExample] = []
        if config.file:
            template = Template(roles.tokenizer, config.template, roles.stop_ids)
            self.rows = train.read(config.file, self._examples(config.file, template), "rows to mix in")
            self.batches = Batches(len(self.rows), config.batch_size, train.seed("ptx"), Schedule(unit="steps"))

    def _examples(self, file: str, template: Template) -> Examples[SftExample]:
        """Nothing is evaluated on them, so it is no matter whether they ask what other rows ask."""
        return replace(sft_examples(file, self.config, template), asked=[])

    def backward(self, policy: nn.Module, step: int) -> None:
        """Adds the gradient of the rows of optimizer step `step`; the policy's own micro-batches follow."""
        if not self.rows:
            return
        train = self.train
        rows = sorted((self.rows[index] for index in self.batches[step]), key=len)
        count = sum(len(trained_places(row)) for row in rows)
        for micro in train.accumulate(rows, self.micro_batch_size, more=True):
            batch = sft_batch(micro.items).to(train.device)
            output = policy(batch)
            loss = sft_loss(output.logprobs)
            # The critic has no part in it but must be in the graph: ZeRO-3 adds to the gradient of a weight that misses the
            # first backward of a step what the step before left there.
            absent = 0.0 if output.values is None else 0.0 * output.values.sum()
            train.backward(micro.weight * (self.config.coef * loss / count + absent))
            train.stats.add("ptx/loss", micro.weight * loss.detach(), micro.weight * len(batch.targets))
