"""Whether tokenizers and models belong together: who may be handed the actor's token ids as they are, and who reads text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.data.templates import Template, tokenizer_digests
from rlhf.errors import DataError
from rlhf.models.actor_critic import ActorCritic, unwrapped
from rlhf.models.load import load_generation_config, load_tokenizer, stop_ids


def require_rows(policy: ActorCritic, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError where a token has no row in the embedding of a model that is given its ids."""
    highest = max(tokenizer.get_vocab().values())
    for part in filter(None, (policy.actor, policy.critic)):
        model = unwrapped(part)
        rows: int = model.get_input_embeddings().num_embeddings  # pyright: ignore
        if highest >= rows:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} has ids up to {highest}, the embedding of {model.config.name_or_path} "
                f"only {rows} rows; they do not belong together: put the model's own tokenizer beside it"
            )


def require_same_tokenizer(
    actor: str, tokenizer: PreTrainedTokenizerBase, role: str, spec: str, trust_remote_code: bool
) -> None:
    """Token ids of the actor are handed to the others as they are, so these must have been trained with the same ones."""
    if other := other_part(tokenizer, load_tokenizer(spec, trust_remote_code)):
        raise DataError(
            f"the {other} of the {role} {spec} is not that of the actor {actor}; "
            f"train the {role} from this actor's SFT run, or give the actor its tokenizer"
        )


def other_part(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """What is not the same of two tokenizers, if anything."""
    digests = tokenizer_digests(theirs)
    return next((what for what, digest in tokenizer_digests(ours).items() if digests[what] != digest), None)


def own_template(spec: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Of a model that reads text: its chat template, where it has one."""
    return Template(tokenizer, "auto", stop_ids(load_generation_config(spec), tokenizer))
