"""Run inside an environment with megatron-core 0.16.1: loads our files into the real GPTModel on CPU and writes its logits.

    python -O real_megatron.py CHECKPOINT LAYOUT TP RANK PORT OUT

CUDA is not there: the calls Megatron makes to it on its way are answered by stand-ins. One process is one tensor-parallel rank.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

CHECKPOINT, LAYOUT, TP, RANK, PORT, OUT = sys.argv[1:7]


def without_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: MagicMock(major=8, minor=0)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.Stream = torch.cuda.Event = MagicMock
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


class OnCpu(TorchFunctionMode):
    """Every device that is asked for is the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if "device" in options and options["device"] is not None:
            options["device"] = "cpu"
        return function(*arguments, **options)


def main() -> None:
    without_cuda()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=int(RANK), world_size=int(TP))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=int(TP))
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()
    tensor_parallel.random.get_cuda_rng_tracker().add = lambda *_: None
    torch.serialization.add_safe_globals([Namespace])
    if "megatron.core.transformer.moe.moe_utils" in sys.modules:
        sys.modules["megatron.core.transformer.moe.moe_utils"].te_general_gemm = None
    root = Path(CHECKPOINT)
    if LAYOUT == "torch":
        file = root / "release" / f"mp_rank_{int(RANK):02d}" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=True)
    else:
        content = torch.load(root / "iter_0000000" / "common.pt", weights_only=True)
    args = content["args"]
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size or args.moe_ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=bool(getattr(args, "add_bias_linear", False)),
        add_qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        qk_layernorm=bool(getattr(args, "qk_layernorm", False)),
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk or 2,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        moe_router_pre_softmax=args.moe_router_pre_softmax,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=int(TP),
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
    )
    with OnCpu():
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(
                num_experts=args.num_experts, qk_layernorm=config.qk_layernorm, normalization=args.normalization
            ),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            parallel_output=False,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_base=int(args.rotary_base or 10000),
        )
        if LAYOUT == "torch":
            model.load_state_dict(content["model"], strict=True)
        else:
            sharded = model.sharded_state_dict(prefix="")
            model.load_state_dict(dist_checkpointing.load(sharded, str(root / "iter_0000000")), strict=False)
        ids = torch.load(Path(OUT).with_name("ids.pt"), weights_only=True)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            logits = model.eval()(ids, positions, mask)
    if int(RANK) == 0:
        torch.save(logits[..., : args.vocab_size].clone(), OUT)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
