"""Stage 3, PPO: improve the policy against a reward, without leaving it.

    rlhf ppo --config ppo --actor runs/sft --reward runs/rm --data FILE
    rlhf ppo --unit-test
    accelerate launch --config_file configs/launch/ddp.yaml stages/ppo.py --config configs/ppo.yaml

Reads   the SFT run twice (the actor; frozen, the reference of the KL penalty), the RM run twice (the critic; frozen, the
        reward) or other sources of reward, one or several; rows of prompts.
Writes  model/  critic/  metrics.jsonl  samples.jsonl  run.json

One iteration, in the notation of Schulman et al. 2017 (arXiv:1707.06347):

    1. roll out   y ~ pi_old(.|x)
    2. score      log pi_old, log pi_ref and V_old of every token; one score a reply
    3. credit     r_t = -beta KL_t, and the score on the last token; A = GAE(r, V_old), R = A + V_old
    4. update     `epochs` passes over minibatches of the clipped losses
    5. report

Conventions and defaults with their sources: docs/ppo.md. Without a critic: grpo.py.
"""

from __future__ import annotations

from functools import partial

import torch

from rlhf.config.parse import Invocation, Resume
from rlhf.config.schema import PpoConfig
from rlhf.data.order import Batches, minibatches
from rlhf.data.templates import Template
from rlhf.fp8.apply import is_on as fp8_is_on
from rlhf.functional.kl import controller
from rlhf.functional.ppo import value_loss
from rlhf.models.roles import open_ppo
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.rollout.ahead import Ahead
from rlhf.rollout.credit import RunningScores, credit
from rlhf.rollout.engines import open_engine
from rlhf.rollout.experience import Experience
from rlhf.rollout.readers import open_readers, open_scorers
from rlhf.rollout.recording import Recording
from rlhf.rollout.rewards import open_reward
from rlhf.rollout.sampling import Sampling
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

SHOW = ("reward/score", "kl/sequence", "policy/clip_fraction", "value/explained_variance")


def main(invocation: Invocation) -> None:
    if invocation.unit_test:
        from rlhf.training.unit_test import unit_test  # its probes are of no use to a real run

        unit_test(invocation.config, ppo, invocation.as_json)
    else:
        ppo(invocation.config, invocation.resume)


def ppo(config: PpoConfig, resume: Resume | None = None, probe: invariants.Probe | None = None) -> None:
    """Trains. `probe` is called once, between credit and update of the first iteration, with all that takes part."""
    with open_training("ppo", config, resume) as train:
        # -- who takes part: whether roles share weights is not this page's business ---------------------------------
        for note in reward_gate(config.reward):
            train.note(note)
        readers = open_readers(config.reward, config.data)
        scorers = open_scorers(config.eval.scorers, config.reward, config.data)
        roles = open_ppo(config)
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
        rollout = config.rollout
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p)
        batches = Batches(len(prompts), config.rollout.batch_size, train.seed("data"), config.schedule)
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)
        roles.prepared(roles.policy, policy)
        roles.calibrate([prompts[index].ids for index in batches[0]], config.micro_batch_size)
        judge_reward(train, config, readers, reward, template)
        engine = open_engine(rollout, train, roles.stop_ids, roles.pad_id)
        engine.sync(policy, version=train.step_done)
        require_parity(engine, policy, [prompt.ids for prompt in prompts], config, train)
        recording = Recording(train.run, rollout, config.reward, train.is_main, train.step_done)
        collect = Collection(train, config, roles, policy, engine, reward, scorers, held_out)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            if held_out and step == 0:
                train.result["before"] = collect.evaluation(0)
                watch.look_at_evaluation(0, train.result["before"])
            checks = invariants.Checks()

            # 1, 2: what the old policy did, and how good it was
            asked, seeds = collect.rows([prompts[index] for index in batches[step]], "rollout", step)
            scored = recording.read(step, asked) or collect.replies(asked, seeds, sampling, ahead.take(step))
            experience = collect.experience(scored, sampling)
            recording.write(step, experience)
            if rollout.overlap and step + 1 < batches.length:
                coming = collect.rows([prompts[index] for index in batches[step + 1]], "rollout", step + 1)
                ahead.begin(engine, step + 1, *coming, sampling)

            # 3: which token gets how much of it
            experience, stats = credit(experience, config, kl.coef, running)
            train.stats.put(stats)
            find = partial(found_again, experience, asked, roles.tokenizer, config.reward)
            usable = train.non_finite.allows(watched(experience), find, config.ppo.minibatch_size)
            if not experience.scored.any():
                train.note(f"step {step + 1}: no reply has a score; the update is left out")
            if usable and step == 0:
                invariants.first_scores(checks, experience, config)
                for remark in invariants.remarks(experience, config):
                    train.note(remark)
                invariants.whitening(checks, experience, config)
                if fp8_is_on(roles.policy):
                    train.note(invariants.batch_mates(checks, roles.policy, experience, config))
                if probe is not None:
                    loss_of = partial(ppo_loss, policy, config=config, kl_coef=kl.coef, stats=Stats())
                    probe(checks, train, roles, policy, experience, loss_of)

            # 4: the first epoch takes the micro-batches as they were scored, so its ratio starts at exactly 1
            warming_up = step < config.ppo.critic_warmup
            sizes = len(experience), config.ppo.minibatch_size, config.ppo.epochs
            plan = list(minibatches(*sizes, train.seed("update", step))) if usable else []
            first = step == 0
            with train.phase("update"):
                for count, minibatch in enumerate(plan):
                    experience = experience.weighed(minibatch, config.ppo.aggregation, rollout.max_new_tokens)
                    stats_here = Stats()
                    if not experience.learned[minibatch].any():  # none of its replies has a score
                        continue
                    if not warming_up:
                        mix.backward(policy, step * len(plan) + count)
                    for micro in train.accumulate(minibatch, config.micro_batch_size):
                        part, stats_of = experience.rows(micro.items).to(train.device), stats_here if micro.weight else Stats()
                        train.backward(micro.weight * ppo_loss(policy, part, config, kl.coef, stats_of, warming_up))
                    if not train.optimizer_step(frozen_roles=("actor",) if warming_up else ()):
                        continue
                    if first:
                        invariants.first_minibatch(checks, train.reduce(stats_here))
                        checks.require(train.note)
                        first = False
                    train.stats.absorb(stats_here)
                    if config.ppo.target_kl and train.reduce(stats_here)["policy/approx_kl"] > config.ppo.target_kl:
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
            watch.look(step, values, experience, asked)
            if held_out and config.eval.every and (step + 1) % config.eval.every == 0:
                watch.look_at_evaluation(step + 1, collect.evaluation(step + 1))

        # -- the result ----------------------------------------------------------------------------------------------
        if held_out:
            train.result["after"] = collect.evaluation(train.step_done)
            watch.look_at_evaluation(train.step_done, train.result["after"])
        train.consolidate()
        if train.is_main:
            save_model(roles.critic, train.run / "critic", roles.tokenizer, merge=config.lora.merge)
            followers.save_average()
            save_model(roles.actor, train.run / "model", roles.tokenizer, roles.generation, config.lora.merge)
        train.finish(train.result, ["model", "critic", *followers.outputs])


def ppo_loss(
    policy, part: Experience, config: PpoConfig, kl_coef: float, stats: Stats, warming_up: bool = False
) -> torch.Tensor:
    """Policy and value loss of a micro-batch, by the weights of its tokens; statistics go into `stats`."""
    output = policy(part.batch(), temperature=config.rollout.temperature, entropy=config.ppo.entropy_coef > 0)
    of_policy = actor_loss(output, part, config.ppo, config.kl, kl_coef, stats)
    assert part.values is not None
    assert part.returns is not None
    assert part.weights is not None
    states = part.spread(output.values), part.values, part.returns, part.learned
    of_value, told = value_loss(*states, config.ppo.value_clip, part.weights)
    stats.add_all({f"value/{name}": value for name, value in told.items()}, part.learned.sum())
    stats.add("value/loss", of_value.detach(), part.weights.sum())
    # A critic warm-up keeps the policy in the graph: every weight takes part in every backward, whatever the engine.
    return (0.0 if warming_up else 1.0) * of_policy + config.ppo.value_coef * of_value


if __name__ == "__main__":
    run_stage("ppo", main)
