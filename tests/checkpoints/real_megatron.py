"""Run inside an environment with megatron-core 0.16.1: loads our files strictly into the real GPTModel on CPU.

    python -O real_megatron.py CHECKPOINT LAYOUT LAYERS TP RANK RENDEZVOUS OUT

With LAYERS `local` it writes the logits to OUT. With `transformer-engine` the layers are Transformer Engine's, whose wheel must
be on the path and whose kernels are not there: nothing is computed. One process is one tensor-parallel rank;
they meet at the file RENDEZVOUS (a port that was free a moment ago may be somebody else's when the second one asks for it).
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch._dynamo
from without_gpu import OnCpu, without_cuda, without_kernels

CHECKPOINT, LAYOUT, LAYERS, TP, RANK, RENDEZVOUS, OUT = sys.argv[1:8]


def main() -> None:
    without_cuda()
    if LAYERS == "transformer-engine":
        without_kernels()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig

    torch.distributed.init_process_group("gloo", init_method=f"file://{RENDEZVOUS}", rank=int(RANK), world_size=int(TP))
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
    if LAYERS == "local":
        spec = get_gpt_layer_local_spec(
            num_experts=args.num_experts, qk_layernorm=config.qk_layernorm, normalization=args.normalization
        )
    else:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=args.num_experts, moe_grouped_gemm=bool(args.num_experts), qk_layernorm=config.qk_layernorm
        )
    with OnCpu():
        model = GPTModel(
            config,
            spec,
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
        if LAYERS == "transformer-engine":
            return
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
