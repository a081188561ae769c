"""Stage 2, the reward model: learn which of several replies people prefer.

    rlhf rm --config rm --model runs/sft --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/rm.py --config configs/rm.yaml

Reads   a language model for the trunk (usually the SFT run), or a reward model to go on with; rows of prompt, chosen, rejected,
        or of prompt and ranked responses.
Writes  model/ (a sequence classification model with one label)  metrics.jsonl  run.json

One step: every reply to every prompt once in one forward, the score read at each one's last real token, -log sigmoid of the
differences averaged over the pairs of a prompt, and that over the prompts of all ranks (Bradley and Terry 1952; Stiennon et al.
2020; Ouyang et al. 2022). Formats, losses, figures and the scale of scores: docs/reward-models.md. Left out: ensembles, and
models that write their judgement.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf.config.parse import Invocation
from rlhf.config.reward_models import RmLoss
from rlhf.config.schema import RmConfig
from rlhf.data.collate import Comparisons, comparisons, ranking_batch
from rlhf.data.examples import Examples, RankedExample, ranked_examples, reference_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.preference import accuracy, bradley_terry_loss, center_penalty, smoothed
from rlhf.models.actor_critic import unwrapped
from rlhf.models.heads import rescale_head
from rlhf.models.roles import open_rm
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.training.entry import run_stage
from rlhf.training.opening import open_training
from rlhf.training.reward_figures import (
    Scale,
    best,
    by_length,
    counted,
    figures,
    in_words,
    reliability_table,
    require_decided,
    score_all,
    score_alone,
)
from rlhf.training.session import Training

SHOW = ("loss", "accuracy", "optimizer/lr")


def main(invocation: Invocation) -> None:
    config: RmConfig = invocation.config
    with open_training("rm", config, invocation.resume) as train:
        # -- who takes part, and what is learned from ----------------------------------------------------------------
        roles = open_rm(config)
        train.record_tokenizer(roles.tokenizer)
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)

        def read(path: str, found: Examples[RankedExample], what: str) -> list[RankedExample]:
            examples = train.read(path, found, what)
            roles.check_context(max(map(len, examples)), "data.max_length")
            return examples

        def read_ranked(path: str) -> list[RankedExample]:
            return read(path, ranked_examples(path, config.data, template), "prompts with ranked replies")

        examples, held_out, reference = read_ranked(config.data.train), [], []
        if config.data.eval:
            held_out = read_ranked(config.data.eval)
            require_decided(held_out, config.data.eval)
        if config.data.reference:
            found = reference_examples(config.data.reference, config.data, template)
            reference = read(config.data.reference, found, "reference answers")

        batches = Batches(len(examples), config.batch_size, train.seed("data"), config.schedule)
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            batch = sorted((examples[index] for index in batches[step]), key=len)
            tokens = sum(map(tokens_of, batch))

            for micro in train.accumulate(batch, config.micro_batch_size):
                scores = policy(ranking_batch(micro.items).to(train.device), roles=("critic",)).values
                pairs = comparisons(micro.items, like=scores)
                losses = pair_losses(scores, pairs, config.loss)
                train.backward(micro.weight * (pairs.weight * losses).sum() / len(batch))
                add_statistics(train.stats, micro.weight, losses.detach(), scores.detach(), pairs)
            train.optimizer_step(tokens)

            train.report(step, tokens, SHOW)
            if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(train, config, policy, held_out, step + 1)

        # -- the result ----------------------------------------------------------------------------------------------
        scale = None
        if held_out:
            scores, train.result = evaluate(train, config, policy, held_out, train.step_done)
            if config.normalize == "chosen":
                scale = Scale.of(scores[best(held_out)])
        if config.normalize == "reference":
            scale = Scale.of(scores_of(train, config, policy, reference))
        train.consolidate()
        if scale:
            train.note(scale.in_words())
            train.result |= scale.figures()
        if train.is_main:
            if scale:
                rescale_head(unwrapped(roles.critic), scale.gain, scale.bias)
            save_model(roles.critic, train.run / "model", roles.tokenizer, merge=config.lora.merge)
        train.finish(train.result, ["model"])


def tokens_of(example: RankedExample) -> int:
    return sum(len(example.prompt) + len(reply) for reply in example.replies)


def pair_losses(scores: Tensor, pairs: Comparisons, config: RmLoss) -> Tensor:
    """(P,) from the scores of all replies."""
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    losses = bradley_terry_loss(chosen, rejected, pairs.margin, smoothed(pairs.target, config.label_smoothing))
    if config.center_coef:
        losses = losses + config.center_coef * center_penalty(chosen, rejected)
    return losses


def add_statistics(stats: Stats, weight: float, losses: Tensor, scores: Tensor, pairs: Comparisons) -> None:
    """Means over prompts; ties are in no order that could be right."""
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    prompts, decided = weight * pairs.weight.sum(), weight * pairs.decided.sum()
    stats.add("loss", weight * (pairs.weight * losses).sum(), prompts)
    stats.add("accuracy", weight * (pairs.decided * accuracy(chosen, rejected)).sum(), decided)
    stats.add("margin", weight * (pairs.decided * (chosen - rejected)).sum(), decided)
    stats.add("score", weight * (pairs.weight * (chosen + rejected)).sum() / 2, prompts)


def scores_of(train: Training, config: RmConfig, policy, examples: list[RankedExample]) -> Tensor:
    """(R,) of all replies, on every rank."""
    with train.evaluating():
        micro_batches = train.accumulate(by_length(examples), config.micro_batch_size)
        return score_all(policy, examples, micro_batches, train.device, train.gather)


def evaluate(
    train: Training, config: RmConfig, policy, examples: list[RankedExample], step: int
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of held-out replies, and what they come to: said, and written into metrics.jsonl."""
    scores = scores_of(train, config, policy, examples)
    with train.evaluating():
        alone = score_alone(policy, examples, train.device)
    found = counted(examples) | figures(examples, scores, alone)
    recorded = train.record_evaluation(step, {f"eval/{name}": value for name, value in found.items()})
    for sentence in in_words(found):
        train.note(sentence)
    return scores, recorded | {"eval/reliability": reliability_table(examples, scores)}


if __name__ == "__main__":
    run_stage("rm", main)
