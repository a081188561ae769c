"""Models in use, from Python: `rlhf.load_actor(...).generate(...)` and `rlhf.load_reward(...).score(...)`.

What the commands generate, chat and serve-reward do is done here, once. Left out: files, and FP8 but through the commands.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config.decoding import BatchDecoding, Decoding, Opening, Rescoring, checked
from rlhf.data.examples import PromptExample
from rlhf.data.order import row_seeds
from rlhf.data.rows import Row
from rlhf.data.templates import Messages, Template
from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.models.actor_critic import unwrapped
from rlhf.models.precision import Precision, computing_in
from rlhf.models.roles import RewardModel, Roles, open_policy, open_text_reward
from rlhf.report.console import Console
from rlhf.rollout.decoding import Reply, Step
from rlhf.rollout.engines import NativeEngine, Samples
from rlhf.rollout.rewards import ModelReward, Replies, decode, said
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.steps import JsonSchema, RepetitionPenalty, RequireFinite, Schema

Prompt = str | Messages


@dataclass(frozen=True)
class Generated:
    """One reply."""

    prompt: int
    """Place of its prompt among those given."""
    sample: int
    """Its number among the replies to that prompt."""
    text: str
    """Without the stop token, special tokens and outer blanks."""
    finished: bool
    """It ended by itself, and not at max_new_tokens."""
    tokens: list[int]
    """Token ids, with the stop token where it ended by itself."""


def load_actor(
    model: str | Path,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    template: Literal["auto", "chat", "plain"] = "auto",
    trust_remote_code: bool = False,
) -> Policy:
    """A policy to generate with, on the GPU if there is one.

    Args:
        model: a run, a Hugging Face id (`id@revision`) or directory, an adapter, a Megatron checkpoint or a .gguf file.
        precision: bf16: autocast over float32 weights.
        template: chat: the tokenizer's chat template; plain: prompts are text to go on with; auto: chat where there is one.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        ConfigError: options that cannot be.
        DataError: no such model, or it is no policy.
    """
    asked = checked(Opening, model=str(model), precision=precision, template=template, trust_remote_code=trust_remote_code)
    roles = open_policy(asked.model, asked.trust_remote_code)
    own = Template(roles.tokenizer, asked.template, roles.stop_ids)
    return Policy(asked.model, roles, own, Precision(asked.precision, asked.precision == "bf16"))


def load_reward(
    model: str | Path, *, template: Literal["auto", "chat", "plain"] = "auto", trust_remote_code: bool = False
) -> RewardScorer:
    """A reward model to score with; arguments and errors as of `load_actor`."""
    asked = checked(Opening, model=str(model), template=template, trust_remote_code=trust_remote_code)
    return RewardScorer(asked.model, open_text_reward(asked.model, asked.template, asked.trust_remote_code))


class Policy:
    def __init__(self, name: str, roles: Roles, template: Template, precision: Precision) -> None:
        self.name, self.roles, self.template, self.precision = name, roles, template, precision

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        samples_per_prompt: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        json_schema: str | dict[str, Any] | None = None,
    ) -> list[Generated]:
        """Replies, those to the first prompt first; the options are the fields of `rlhf generate`, and so are the replies.

        Args:
            prompts: texts (with a chat template, what a user says) or lists of {"role", "content"} messages.
            json_schema: a JSON Schema, or the name of a file of one.

        Raises:
            ConfigError: options that cannot be, or exclude each other.
            DataError: a prompt that the template does not take, or that is too long for the model with its reply.
        """
        config = checked(
            BatchDecoding,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            batch_size=batch_size,
            json_schema=_as_json(json_schema) if isinstance(json_schema, dict) else json_schema,
        )
        if isinstance(prompts, str):
            raise ConfigError("prompts: given one text, expected a list of prompts")
        schema = None if config.json_schema is None else Schema(config.json_schema)
        for note in schema.notes if schema else ():
            warnings.warn(note, stacklevel=2)
        ids = [self.template.prompt(prompt, f"prompts[{place}]") for place, prompt in enumerate(prompts)]
        if empty := [place for place, tokens in enumerate(ids) if not tokens]:
            raise DataError(f"prompts[{empty[0]}]: has no tokens; expected at least one to go on from")
        return self.replies(ids, range(len(ids)), config, samples_per_prompt, batch_size, schema) if ids else []

    def replies(
        self,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        config: Decoding,
        samples: int = 1,
        batch_size: int = 1,
        schema: Schema | None = None,
        precision: Precision | None = None,
        note: Callable[[str], None] = lambda _: None,
        told: Callable[[Reply], None] | None = None,
    ) -> list[Generated]:
        """Replies to prompts of token ids; raises CheckFailed as `draw`.

        Args:
            places: what each prompt's replies are seeded by, beside config.seed.
            samples: replies to each prompt.
            batch_size: replies sampled at a time.
            precision: another one than the policy's own.
            note: is told what a user should know.
            told: is given each reply whenever it has one more token.
        """
        roles = self.roles
        roles.check_context(max(map(len, prompts)) + config.max_new_tokens, "max_new_tokens, or shorten the prompts")
        steps: list[Step] = []
        if config.repetition_penalty != 1:
            steps.append(RepetitionPenalty(config.repetition_penalty))
        if schema is not None:
            head = unwrapped(roles.actor).get_output_embeddings()
            steps.append(JsonSchema(schema, roles.tokenizer, roles.stop_ids, head.weight.shape[0]))  # pyright: ignore
        # 0 is nothing to the user and everything to the sampler.
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k or 0, config.top_p or 1.0)
        drawn, texts = self.draw(
            prompts, places, config.seed, sampling, precision or self.precision, batch_size, samples, steps, note, told
        )
        which = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)]
        made = [Generated(*row) for row in zip(*zip(*which, strict=True), texts, drawn.finished, drawn.responses, strict=True)]
        if schema is not None:
            schema.require_json([reply.text for reply in made if reply.finished])
        return made

    def draw(
        self,
        prompts: Sequence[list[int]],
        places: Sequence[int],
        seed: int,
        sampling: Sampling,
        precision: Precision,
        batch_size: int,
        samples: int = 1,
        steps: Sequence[Step] = (),
        note: Callable[[str], None] = lambda _: None,
        told: Callable[[Reply], None] | None = None,
    ) -> tuple[Samples, list[str]]:
        """Replies as tokens and as texts, those to the first prompt first; arguments as of `replies`.

        Raises:
            CheckFailed: a logit is no finite number.
        """
        roles = self.roles
        steps = [*steps, RequireFinite(self.name, roles.tokenizer, sampling.temperature)]
        engine = NativeEngine(nullcontext, roles.stop_ids, roles.pad_id, batch_size, note, steps, told)
        engine.sync(roles.policy, version=0)
        which = [prompt for prompt in range(len(prompts)) for _ in range(samples)]
        seeds = row_seeds(seed, [places[prompt] for prompt in which])
        with computing_in(precision, roles, prompts, batch_size) as in_fp8:
            if in_fp8:
                note(in_fp8)
            drawn = engine.generate([prompts[prompt] for prompt in which], sampling, seeds)
        return drawn, decode(said(drawn.responses, drawn.finished), roles.tokenizer)


def counting(console: Console, replies: int, roles: Roles, max_new_tokens: int) -> Callable[[Reply], None]:
    """Is told of each token of so many replies, and says on the console how far they are."""
    count = console.count(replies, "replies")

    def told(reply: Reply) -> None:
        count.add(int(reply.tokens[-1] in roles.stop_ids or len(reply.tokens) == max_new_tokens), 1)

    return told


class RewardScorer:
    """A reward model that reads texts with its own tokenizer, as the service `rlhf serve-reward` does.

    `rlhf ppo` may give a reply another score: it hands over the actor's tokens or, where the tokenizers differ and there is no
    chat template, the text with its outer blanks, which `Generated.text` is without.
    """

    def __init__(self, name: str, model: RewardModel) -> None:
        self.name, self.model = name, model

    def score(
        self,
        prompts: Sequence[Prompt],
        replies: Sequence[str],
        *,
        finished: Sequence[bool] | None = None,
        batch_size: int = 16,
    ) -> list[float]:
        """One score for each reply.

        Args:
            prompts: texts or lists of {"role", "content"} messages, one for each reply.
            finished: whether each reply ended by itself; one that did not is read without an end. None: all did.
            batch_size: rows per forward pass; memory and speed only.

        Raises:
            ConfigError: options that cannot be, or one text where a list is expected.
            DataError: not as many of each, or a row that the template or the model's positions do not take.
            CheckFailed: a score is no finite number.
        """
        for name, given in (("prompts", prompts), ("replies", replies)):
            if isinstance(given, str):
                raise ConfigError(f"{name}: given one text, expected a list of {name}")
        asked = checked(Rescoring, replies=replies, finished=finished, batch_size=batch_size)
        replies, finished = asked.replies, asked.finished or (True,) * len(asked.replies)
        if not len(prompts) == len(replies) == len(finished):
            raise DataError(
                f"{len(prompts)} prompts, {len(replies)} replies and {len(finished)} of finished; expected as many of each"
            )
        if not replies:
            return []
        rows = [Row(f"prompts[{place}]", {"prompt": prompt}, {}) for place, prompt in enumerate(prompts)]
        examples = [PromptExample(place, [], row) for place, row in enumerate(rows)]
        none: list[list[int]] = [[] for _ in rows]
        reward = ModelReward(self.name, self.model, asked.batch_size, advice="shorten the prompt or the reply")
        scores = reward(Replies(examples, none, replies, finished, none))
        for row, score in zip(rows, scores, strict=True):
            if not math.isfinite(score):
                raise CheckFailed(f"{row.where}: {self.name} scores its reply {score}, expected a finite number")
        return scores


def _as_json(schema: dict[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema: cannot be written as JSON: {error}") from None
