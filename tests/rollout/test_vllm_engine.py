"""The vLLM engine through TRL's own client class, against a stand-in server (vllm_stand_in.py). No GPU takes part."""

from __future__ import annotations

import inspect
import socket
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from requests.adapters import HTTPAdapter
from test_refill import PROMPTS, SEEDS, STOP, model_of
from trl.generation.vllm_client import VLLMClient
from vllm_stand_in import serving

from rlhf.errors import ConfigError, DataError, StorageError
from rlhf.models.actor_critic import ActorCritic
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.vllm_engine import VllmEngine, connected, sent


class Gpu:
    """A run on a GPU, as far as an engine asks; `waits` counts how often it waited for rank 0."""

    def __init__(self, is_main: bool = True) -> None:
        self.is_main, self.device, self.waits = is_main, torch.device("cuda"), 0

    def gathered(self, model):
        return nullcontext(model)

    def wait_for_main(self) -> None:
        self.waits += 1

    def note(self, text: str) -> None: ...


def policy_of(seed: int) -> ActorCritic:
    model = model_of("llama").float()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return ActorCritic(actor=model)


@pytest.fixture
def server():
    with serving(policy_of(1).actor) as stand_in:
        yield stand_in


def opened(server, run: Gpu | None = None) -> VllmEngine:
    run = run or Gpu()
    return VllmEngine(connected(server.url, run), run, STOP, slots=3)


def test_the_server_samples_the_weights_it_was_sent(server):
    engine, policy = opened(server), policy_of(2)
    before = engine.generate(PROMPTS, Sampling(9, temperature=0.0), SEEDS)
    engine.sync(policy, version=4)
    samples = engine.generate(PROMPTS, Sampling(9, temperature=0.0), SEEDS)
    assert samples.responses != before.responses
    assert (before.version, samples.version) == (-1, 4)
    assert samples.prompts == PROMPTS
    for prompt, response, logprobs, finished in zip(
        PROMPTS, samples.responses, samples.logprobs, samples.finished, strict=True
    ):
        right = policy.actor(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert response == right.argmax(-1).tolist()
        assert logprobs == pytest.approx(right.max(-1).values.tolist(), abs=1e-5)
        assert finished == (response[-1] in STOP)
        assert all(token not in STOP for token in response[:-1])
        assert len(response) == 9 or finished
    paths = [path for path, _ in server.calls if path != "/v1/completions"]
    told = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert paths == ["/init_weight_transfer_engine", *told]


def test_what_a_request_asks_for(server):
    sampling = Sampling(7, temperature=0.7)
    engine = opened(server)
    samples = engine.generate(PROMPTS, sampling, SEEDS)
    asked = {body["seed"]: body for path, body in server.calls if path == "/v1/completions"}
    assert set(asked) == set(SEEDS)
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        body = asked[seed]
        assert body["prompt"] == [prompt]
        assert (body["n"], body["temperature"], body["top_k"], body["top_p"], body["max_tokens"]) == (1, 0.7, 0, 1.0, 7)
        assert (body["stop_token_ids"], body["ignore_eos"], body["logprobs"]) == (sorted(STOP), True, 0)
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
        assert body["return_token_ids"]
    # A row's reply follows from its own seed: alone, and in another order, it is the same.
    again = engine.generate(PROMPTS[::-1], sampling, SEEDS[::-1])
    assert again.responses[::-1] == samples.responses
    assert engine.generate(PROMPTS[:1], sampling, SEEDS[:1]).responses == samples.responses[:1]


def test_the_names_it_uses_are_trls():
    """A stand-in for the HTTP side alone would not see TRL rename an argument that has a default."""
    generate = inspect.signature(VLLMClient.generate).parameters
    assert {"prompts", "n", "temperature", "top_k", "top_p", "max_tokens", "logprobs", "generation_kwargs"} <= set(generate)
    inspect.signature(VLLMClient).bind(base_url="")
    inspect.signature(VLLMClient.init_communicator).bind(None, device=torch.device("cuda"))
    inspect.signature(VLLMClient.update_named_params).bind(None, [], iter(()))
    inspect.signature(VLLMClient.reset_prefix_cache).bind(None)


def test_rank_0_alone_sends_and_the_others_wait(server):
    run, policy = Gpu(is_main=False), policy_of(2)
    engine = opened(server, run)
    engine.sync(policy, version=1)
    assert server.calls == []
    assert run.waits == 1
    main = Gpu()
    opened(server, main).sync(policy, version=1)
    assert main.waits == 1
    assert [path for path, _ in server.calls].count("/update_weights") == 1


def test_adapters_are_sent_merged_and_tied_weights_once(server):
    policy = policy_of(2)
    wrapped = get_peft_model(policy.actor, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    engine = opened(server)
    engine.sync(ActorCritic(actor=wrapped), version=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())
    ids = torch.tensor([PROMPTS[2]])
    assert torch.allclose(server.model(ids).logits, wrapped(input_ids=ids).logits, atol=1e-4)
    tied = model_of("llama", tie_word_embeddings=True)
    names = [name for name, _ in sent(tied)]
    assert "lm_head.weight" not in names
    assert set(names) == set(dict(tied.named_parameters()))


def test_a_server_that_says_no_or_nothing(server):
    engine = opened(server)
    server.answers["/v1/completions"] = (400, {"error": "the prompt is longer than max_model_len"})
    with pytest.raises(DataError, match=r"rollout\.server: Request failed: 400.*max_model_len"):
        engine.generate(PROMPTS, Sampling(4), SEEDS)
    told = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    server.answers["/v1/completions"] = (200, {"choices": [{"prompt_token_ids": [], "token_ids": [3], "logprobs": told}]})
    with pytest.raises(DataError, match="not one log-probability for each"):
        engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])
    engine.client.session.mount("http://", HTTPAdapter())  # TRL's would try again for a minute
    engine.client.base_url = "http://127.0.0.1:1"
    with pytest.raises(StorageError, match="it gave no answer"):
        engine.generate(PROMPTS[:1], Sampling(4), SEEDS[:1])


def test_a_server_started_otherwise(server):
    server.answers["/server_info"] = (200, {"vllm_config": {"weight_transfer_config": None}})
    with pytest.raises(ConfigError, match=r"rollout\.server http.*no weight-transfer engine"):
        connected(server.url, Gpu())
    server.answers["/server_info"] = (404, {})
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        connected(server.url, Gpu())


def test_no_server(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"rollout\.server {url}: no vLLM server answers there; start it on"):
            connected(url, Gpu())


def test_no_gpu_and_no_vllm():
    run = Gpu()
    if find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"vllm is not installed.*pip install 'rlhf\[vllm\]'"):
            connected("http://127.0.0.1:1", run)
    run.device = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"rollout\.engine: vllm takes its weights over NCCL from a GPU"):
        connected("http://127.0.0.1:1", run)
