"""Run with `python -O` and the pure-Python wheel of Transformer Engine 2.20 on the path: prints the names and shapes of the
state dict of its real TransformerLayer. Its compiled extension and CUDA are answered by stand-ins; nothing is computed.
"""

from __future__ import annotations

import json
import sys

from without_gpu import without_kernels

HIDDEN, MLP, HEADS, GROUPS = map(int, sys.argv[1:5])


def main() -> None:
    without_kernels()
    import transformer_engine.pytorch as engine

    layer = engine.TransformerLayer(
        HIDDEN,
        MLP,
        HEADS,
        num_gqa_groups=GROUPS,
        bias=False,
        normalization="RMSNorm",
        activation="swiglu",
        fuse_qkv_params=True,
        attn_input_format="bshd",
        self_attn_mask_type="causal",
        device="meta",
    )
    state = layer.state_dict()
    print(json.dumps({key: list(value.shape) for key, value in state.items() if not key.endswith("_extra_state")}))


if __name__ == "__main__":
    main()
