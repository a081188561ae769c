"""Policy optimisation without a critic: a reply is as good as it is better than other replies to its prompt.

    rlhf grpo --config grpo --actor runs/sft --reward runs/rm --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/grpo.py --config configs/grpo.yaml

Reads   the SFT run twice (the actor; frozen, the reference of the KL penalty); sources of reward, one or several; rows of
        prompts.
Writes  model/  metrics.jsonl  samples.jsonl  run.json

One iteration, in the notation of Shao et al. 2024 (arXiv:2402.03300):

    1. roll out   y_1 ... y_G ~ pi_old(.|x), and one score each; prompts that teach nothing give way to others
    2. score      log pi_old and log pi_ref of every token
    3. credit     A_i = score_i - baseline: the group's mean (grpo, which divides by its deviation), the mean of the others
                  (rloo), none (reinforce++, whitened over all replies), or the score of the greedy reply (remax)
    4. update     `epochs` passes over minibatches of the clipped loss
    5. report

Estimators, conventions and where TRL differs: docs/grpo.md.
"""

from __future__ import annotations

from functools import partial

import torch

from rlhf.config.parse import Invocation
from rlhf.config.schema import GrpoConfig
from rlhf.config.sections import Schedule
from rlhf.data.order import Batches, minibatches
from rlhf.data.templates import Template
from rlhf.fp8.apply import is_on as fp8_is_on
from rlhf.functional.kl import controller
from rlhf.models.roles import open_grpo
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.rollout.ahead import Ahead
from rlhf.rollout.credit import RunningScores, credit_without_critic, groups_that_teach
from rlhf.rollout.engines import open_engine
from rlhf.rollout.experience import Experience
from rlhf.rollout.readers import open_readers, open_scorers
from rlhf.rollout.recording import Recording
from rlhf.rollout.rewards import open_reward
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.scoring import in_places_of
from rlhf.rollout.watched import found_again, watched
from rlhf.runs.gate import reward_gate
from rlhf.training import invariants
from rlhf.training.alarms import AlarmWatch
from rlhf.training.collection import Collection, judge_reward, read_prompts
from rlhf.training.entry import run_stage
from rlhf.training.followers import Followers
from rlhf.training.losses import actor_loss
from rlhf.training.opening import open_training
from rlhf.training.parity import require_parity
from rlhf.training.pretraining import PretrainingMix

SHOW = ("reward/score", "kl/sequence", "policy/clip_fraction", "reward/same_scores")


def main(invocation: Invocation) -> None:
    config: GrpoConfig = invocation.config
    rollout, grpo = config.rollout, config.grpo
    with open_training("grpo", config, invocation.resume) as train:
        # -- who takes part ------------------------------------------------------------------------------------------
        for note in reward_gate(config.reward):
            train.note(note)
        readers = open_readers(config.reward, config.data)
        scorers = open_scorers(config.eval.scorers, config.reward, config.data)
        roles = open_grpo(config)
        for note in roles.notes:
            train.note(note)
        train.record_tokenizer(roles.tokenizer)
        for frozen in roles.frozen:
            roles.prepared(frozen, train.prepare_frozen(frozen))
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)
        reward = open_reward(config.reward, readers, roles.rewards, template, config.micro_batch_size, train.most)

        prompts, held_out = read_prompts(train, config, roles, template, [*readers.values()], scorers)
        running, kl = RunningScores(), controller(config.kl.controller, config.kl.coef, config.kl.target, config.kl.horizon)
        ahead = Ahead(train.rank, train.world_size, train.gather)
        train.remember(running=running, kl=kl, ahead=ahead)
        watch = AlarmWatch(train, config, roles.tokenizer)
        followers = Followers(train, config, roles)
        mix = PretrainingMix(train, config.ptx, roles, config.micro_batch_size)
        batches = Batches(len(prompts), rollout.batch_size, train.seed("data"), config.schedule)
        others = Batches(len(prompts), rollout.batch_size, train.seed("resample"), Schedule(unit="steps"))
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)
        roles.prepared(roles.policy, policy)
        roles.calibrate([prompts[index].ids for index in batches[0]], config.micro_batch_size)
        judge_reward(train, config, readers, reward, template)
        engine = open_engine(rollout, train, roles.stop_ids, roles.pad_id)
        engine.sync(policy, version=train.step_done)
        require_parity(engine, policy, [prompt.ids for prompt in prompts], config, train)
        recording = Recording(train.run, rollout, config.reward, train.is_main, train.step_done)
        collect = Collection(train, config, roles, policy, engine, reward, scorers, held_out)
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            if held_out and step == 0:
                train.result["before"] = collect.evaluation(0)
                watch.look_at_evaluation(0, train.result["before"])
            checks = invariants.Checks()

            # 1: a prompt whose replies all score the same gives way to one of other prompts, a few times at most
            asked = [prompts[index] for index in batches[step]]
            rows, seeds = collect.rows(asked, "rollout", step)
            scored = recording.read(step, rows) or collect.replies(rows, seeds, sampling, ahead.take(step))
            for number in range(grpo.resample):
                teach = groups_that_teach(scored, rollout.samples_per_prompt, config.reward, running)
                if teach.all():
                    break
                places = (~teach).nonzero().flatten().tolist()
                drawn = [prompts[index] for index in others[step * grpo.resample + number]][: len(places)]
                more = collect.replies(*collect.rows(drawn, "resample", step, number), sampling)
                useful = groups_that_teach(more, rollout.samples_per_prompt, config.reward, running)
                asked, scored = in_places_of(asked, scored, places, drawn, more, useful.nonzero().flatten().tolist())
                rows, _ = collect.rows(asked, "rollout", step)

            # 2, 3: what the policies think of it, and which reply gets how much of the praise
            experience = collect.experience(scored, sampling)
            recording.write(step, experience)
            if rollout.overlap and step + 1 < batches.length:
                coming = collect.rows([prompts[index] for index in batches[step + 1]], "rollout", step + 1)
                ahead.begin(engine, step + 1, *coming, sampling)
            greedy = None
            if grpo.estimator == "remax":
                greedy = collect.replies(asked, [0] * len(asked), Sampling(rollout.max_new_tokens, temperature=0.0))
            experience, stats = credit_without_critic(experience, config, kl.coef, running, greedy)
            train.stats.put(stats)
            find = partial(found_again, experience, rows, roles.tokenizer, config.reward)
            usable = train.non_finite.allows(watched(experience), find, grpo.minibatch_size)
            if not experience.scored.any():
                train.note(f"step {step + 1}: no reply has a score; the update is left out")
            if usable and step == 0:
                invariants.first_scores(checks, experience, config)
                for remark in invariants.remarks(experience, config):
                    train.note(remark)
                if fp8_is_on(roles.policy):
                    train.note(invariants.batch_mates(checks, roles.policy, experience, config))

            # 4: the first epoch takes the micro-batches as they were scored, so its ratio starts at exactly 1
            sizes = len(experience), grpo.minibatch_size, grpo.epochs
            plan = list(minibatches(*sizes, train.seed("update", step))) if usable else []
            first = step == 0
            with train.phase("update"):
                for count, minibatch in enumerate(plan):
                    experience = experience.weighed(minibatch, grpo.aggregation, rollout.max_new_tokens)
                    stats_here = Stats()
                    if not experience.learned[minibatch].any():  # none of its replies has a score
                        continue
                    mix.backward(policy, step * len(plan) + count)
                    for micro in train.accumulate(minibatch, config.micro_batch_size):
                        part, stats_of = experience.rows(micro.items).to(train.device), stats_here if micro.weight else Stats()
                        train.backward(micro.weight * grpo_loss(policy, part, config, kl.coef, stats_of))
                    if not train.optimizer_step():
                        continue
                    if first:
                        invariants.first_minibatch(checks, train.reduce(stats_here))
                        checks.require(train.note)
                        first = False
                    train.stats.absorb(stats_here)
                    if grpo.target_kl and train.reduce(stats_here)["policy/approx_kl"] > grpo.target_kl:
                        break

            # 5
            checks.require(train.note)  # where no minibatch had a reply with a score
            if usable and roles.reference is not None:
                kl.update(stats["kl/sequence"], len(experience))
            followers.follow(step)
            with train.phase("rollout"):
                ahead.finish()
            engine.sync(policy, version=step + 1)
            values = train.report(step, sum(map(len, experience.prompts)) + int(experience.mask.sum()), SHOW)
            watch.look(step, values, experience, rows)
            if held_out and config.eval.every and (step + 1) % config.eval.every == 0:
                watch.look_at_evaluation(step + 1, collect.evaluation(step + 1))

        # -- the result ----------------------------------------------------------------------------------------------
        if held_out:
            train.result["after"] = collect.evaluation(train.step_done)
            watch.look_at_evaluation(train.step_done, train.result["after"])
        train.consolidate()
        if train.is_main:
            followers.save_average()
            save_model(roles.actor, train.run / "model", roles.tokenizer, roles.generation, config.lora.merge)
        train.finish(train.result, ["model", *followers.outputs])


def grpo_loss(policy, part: Experience, config: GrpoConfig, kl_coef: float, stats: Stats) -> torch.Tensor:
    """Loss of a micro-batch, by the weights of its tokens; statistics go into `stats`."""
    output = policy(part.batch(), temperature=config.rollout.temperature, entropy=config.grpo.entropy_coef > 0)
    return actor_loss(output, part, config.grpo, config.kl, kl_coef, stats)


if __name__ == "__main__":
    run_stage("grpo", main)
