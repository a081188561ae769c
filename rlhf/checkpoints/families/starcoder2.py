"""StarCoder 2: Llama's attention with biases, LayerNorm and a plain MLP."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, LAYER, OUTSIDE, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy

FAMILY = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    architecture="Starcoder2ForCausalLM",
    tensors={
        **OUTSIDE,
        **ATTENTION,
        names.FC1: Copy(LAYER + "mlp.c_fc.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.c_proj.{leaf}"),
    },
    sizes={**{name: key for name, key in SIZES.items() if name != "head_width"}, "norm_epsilon": "norm_epsilon"},
    defaults={"tied": True, "rotary_base": 10000.0, "norm_epsilon": 1e-5},
    constants={"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    args={"normalization": "LayerNorm", "position_embedding_type": "rope", "swiglu": False, "add_bias_linear": True},
    biases={"use_bias": (names.QKV, names.PROJ, names.FC1, names.FC2)},
)
