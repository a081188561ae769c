"""What TRL's `VLLMClient` talks to, without vLLM and without a GPU: the HTTP answers, and NCCL as a queue in this process.

The client is TRL's own class; only what it would import from vllm is put in its place. The server holds a model of its own,
which learns the trained weights by the calls that vLLM would get, and samples as vLLM does: by the seed of the request.
"""

from __future__ import annotations

import json
import queue
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

import torch
from trl.generation import vllm_client


class StandIn:
    """`model` is what the server was started with; `calls` are (path, JSON) as they came."""

    def __init__(self, model) -> None:
        self.model, self.calls, self.lock = model, [], Lock()
        self.sent: queue.Queue = queue.Queue()
        self.answers: dict[str, tuple[int, Any]] = {}
        """By path: an answer in place of the right one."""
        self.url = ""

    def get(self, path: str) -> Any:
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": "stand-in"}]},
            "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}},
            "/get_world_size": {"world_size": 1},
        }[path]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/update_weights":
            told = body["update_info"]
            known = self.model.state_dict()
            for name, dtype, shape in zip(told["names"], told["dtype_names"], told["shapes"], strict=True):
                tensor = self.sent.get(timeout=10)
                assert (f"torch.{dtype}", shape) == (str(tensor.dtype), list(tensor.shape))
                known[name].copy_(tensor)  # a name the model does not have is a KeyError
        return self.complete(body) if path == "/v1/completions" else {}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for prompt in body["prompt"]:
            generator, tokens, logprobs = torch.Generator().manual_seed(body["seed"]), [], []
            while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
                with self.lock:
                    logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1].float()
                told = (logits / (body["temperature"] or 1.0)).log_softmax(-1)  # processed_logprobs; greedy is at 1
                token = told.argmax() if not body["temperature"] else told.exp().multinomial(1, generator=generator)
                tokens.append(int(token))
                logprobs.append(float(told[token]))
            names = [f"token_id:{token}" for token in tokens]
            top = [{name: logprob} for name, logprob in zip(names, logprobs, strict=True)]
            told = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top}
            choices.append({"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": told})
        return {"choices": choices}


@contextmanager
def serving(model):
    """A stand-in that answers at `url`, while TRL's client takes this process for one with vLLM."""
    stand_in = StandIn(model)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, path: str, found: Any) -> None:
            status, found = stand_in.answers.get(path, (200, found))
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.answer(path, stand_in.get(path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
            stand_in.calls.append((self.path, body))
            self.answer(self.path, stand_in.post(self.path, body))

        def log_message(self, *_: object) -> None: ...

    def send(iterator, trainer_args) -> None:
        for _, tensor in iterator:
            trainer_args.group.sent.put(tensor.clone())

    def join(init_info) -> SimpleNamespace:
        assert (init_info["rank_offset"], init_info["world_size"]) == (1, 2)
        return SimpleNamespace(group=SimpleNamespace(), sent=stand_in.sent)

    in_place = {
        "is_vllm_available": lambda **_: True,
        "get_ip": lambda: "127.0.0.1",
        "NCCLWeightTransferEngine": SimpleNamespace(trainer_init=join, trainer_send_weights=send),
        "NCCLTrainerSendWeightsArgs": SimpleNamespace,
    }
    before = {name: getattr(vllm_client, name, None) for name in in_place}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        for name, value in in_place.items():
            setattr(vllm_client, name, value)
        yield stand_in
    finally:
        for name, value in before.items():
            setattr(vllm_client, name, value)
        server.shutdown()
        server.server_close()
