"""A vLLM server as rollout engine, through TRL's client: one request a reply, weights over NCCL after each update.

The server is started by hand, on GPUs of its own (docs/rollouts.md). Every rank asks it for its own replies; rank 0 alone sends
weights. Left out: a vLLM inside the training process, and adapters sent as adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from requests import RequestException
from torch import Tensor, nn

from rlhf.errors import ConfigError, DataError, StorageError
from rlhf.models.save import plain_weights
from rlhf.rollout.engines import Run, Samples
from rlhf.rollout.sampling import Sampling

Answer = TypeVar("Answer")

START = (
    "start it on other GPUs than the run's, by the command in docs/rollouts.md, wait until it is up, and run the same command "
    "again; or set rollout.engine to `native`"
)


def connected(server: str, run: Run) -> Any:
    """TRL's client of the server, on rank 0 ready to send weights.

    Raises:
        ConfigError: vLLM or a GPU is missing here, no server answers, or it was started otherwise than it must be.
    """
    if run.device.type != "cuda":
        raise ConfigError(
            f"rollout.engine: vllm takes its weights over NCCL from a GPU, and this run is on {run.device.type}; use `native`"
        )
    from trl.generation.vllm_client import VLLMClient

    try:
        client = VLLMClient(base_url=server)
        if run.is_main:
            client.init_communicator(device=run.device)
    except ImportError as error:
        raise ConfigError(f"rollout.engine: vllm is not installed ({error}); pip install 'rlhf[vllm]'") from error
    except (ConnectionError, RequestException) as error:
        raise ConfigError(f"rollout.server {server}: no vLLM server answers there; {START}") from error
    except RuntimeError as error:  # the server was started without what sending weights takes
        raise ConfigError(f"rollout.server {server}: {error}") from error
    return client


class VllmEngine:
    """`client` is TRL's `VLLMClient`, or what has its `generate`, `update_named_params` and `reset_prefix_cache`."""

    def __init__(self, client: Any, run: Run, stop_ids: Sequence[int], slots: int) -> None:
        """`slots`: replies that this rank asks for at a time."""
        self.client, self.run, self.stop_ids, self.slots = client, run, sorted(stop_ids), slots
        self.version = -1

    def sync(self, weights: nn.Module, version: int) -> None:
        """The server has these weights when any rank returns; what it kept of prompts is of the old ones, and goes."""
        with self.run.gathered(weights) as policy:
            if self.run.is_main:
                plain = dict(sent(policy.actor))
                metadata = [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in plain.items()]
                self._asked(lambda: self.client.update_named_params(metadata, iter(plain.items())))
                self._asked(self.client.reset_prefix_cache)
        self.run.wait_for_main()
        self.version = version

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples:
        def reply(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
            answer = self._asked(
                lambda: self.client.generate(
                    [prompt],
                    n=1,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    logprobs=0,
                    # Of all stop tokens ours are the ones that count, not those of the model the server was started with.
                    generation_kwargs={"seed": seed, "stop_token_ids": self.stop_ids, "ignore_eos": True},
                )
            )
            return self._read(answer)

        with ThreadPoolExecutor(max_workers=self.slots) as asking:
            replies = list(asking.map(reply, prompts, row_seeds))
        responses = [tokens for tokens, _ in replies]
        finished = [response[-1] in self.stop_ids for response in responses]
        return Samples(list(prompts), responses, [logprobs for _, logprobs in replies], finished, self.version)

    def _read(self, answer: dict[str, Any]) -> tuple[list[int], list[float]]:
        tokens = answer["completion_ids"][0]
        if not tokens or answer["logprobs"] is None or len(answer["logprobs"][0]) != len(tokens):
            raise DataError("rollout.server: an answer has no tokens, or not one log-probability for each; is it vLLM's own?")
        told = zip(tokens, answer["logprob_token_ids"][0], answer["logprobs"][0], strict=True)
        found = [dict(zip(ids, values, strict=True))[token] for token, ids, values in told]
        if None in found:
            raise DataError(
                f"rollout.server: the log-probability of token {tokens[found.index(None)]} is NaN; are its weights?"
            )
        return tokens, found

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except RequestException as error:
            raise StorageError(f"rollout.server: it gave no answer ({type(error).__name__}); {START}") from error
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise DataError(f"rollout.server: {error}") from error  # how TRL tells any status but 200, with what was said


def sent(actor: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The actor's weights by the names of its Hugging Face model, adapters merged; tied ones once."""
    known: set[int] = set()
    for name, weight in plain_weights(actor).items():
        if weight.data_ptr() not in known:
            known.add(weight.data_ptr())
            yield name, weight
