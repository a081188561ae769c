"""DeepSpeed's ZeRO: ranks divide the optimizer's state (1), gradients too (2), weights too (3).

The engine is driven by its own verbs (boundary, backward, step) and not through accelerate's wrapper, which steps inside
`backward`, before a learning rate could be set or a gradient looked at. Weights stay in float32, as everywhere here: `bf16` is
autocast, not DeepSpeed's bf16 optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import deepspeed
import torch
from accelerate.utils import convert_outputs_to_fp32
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

from rlhf.config.engines import Engine, checked_deepspeed
from rlhf.training.engines import Named, OpenOptimizer
from rlhf.training.engines.hollow import consolidate, filled_actor, hollow_copy
from rlhf.training.optimization import MOMENTS

# DeepSpeed 0.19 calls what torch 2.13 has renamed; a user can do nothing about it
warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)

# On a CPU DeepSpeed would compile this at the first start, behind a lock file that a kill leaves there: no later run, of
# whoever, would ever begin. Only inference calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

OURS = {
    "steps_per_print": float("inf"),
    "gradient_accumulation_steps": 1,  # we say ourselves which backward is the last
    "zero_allow_untested_optimizer": True,  # torch's AdamW
    "zero_force_ds_cpu_optimizer": False,  # with offload, too
}
"""What a stage decides and a DeepSpeed file does not."""


class Zero:
    optimizer: torch.optim.Optimizer

    def __init__(self, config: dict[str, Any], device: torch.device, micro_batch_size: int, bf16: bool) -> None:
        """`config` is the content of a DeepSpeed file; batch sizes in it are never read, but DeepSpeed wants one."""
        self.device, self.bf16, config = device, bf16, checked_deepspeed(config, "the DeepSpeed config")
        self.stage = config["zero_optimization"]["stage"]
        self.name = f"zero{self.stage}"
        named = Engine.of_deepspeed(self.stage, config["zero_optimization"])
        self.divided, self.offloaded = named.divided, named.offloaded
        settings = {key: value for key, value in config.items() if key != "train_batch_size"}
        self.config: dict[str, Any] = settings | OURS | {"train_micro_batch_size_per_gpu": micro_batch_size}

    def prepare(self, policy: nn.Module, open_optimizer: OpenOptimizer, max_grad_norm: float) -> nn.Module:
        self.policy, self.plain = policy, hollow_copy(policy) if self.stage == 3 else policy
        self._place(policy)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.optimizer = open_optimizer(policy)
        self.groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.model: Any = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            model_parameters=trained,  # pyright: ignore[reportArgumentType]
            config=self.config | {"gradient_clipping": max_grad_norm},
            dist_init_required=False,
        )[0]
        # As AdamW itself would at its first step; but then it is too late to tell parameters where their own state lies.
        for flat, _ in self._flat():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)} | zeros
        if self.stage < 3:
            self.model.optimizer._lazy_init_hp_params_optimizer_state()
        return self.model

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        self._place(model)
        if self.stage < 3:
            return model
        weights_only = {key: value for key, value in self.config["zero_optimization"].items() if key != "offload_optimizer"}
        return deepspeed.initialize(
            model=model, config=self.config | {"zero_optimization": weights_only}, dist_init_required=False
        )[0]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        self.model.step()
        return float(self.model.get_global_grad_norm() or 0.0)  # infinite where it was not finite, and nothing was stepped

    def gathered(self) -> AbstractContextManager[nn.Module]:
        return filled_actor(self.plain, self.policy, self.whole) if self.stage == 3 else nullcontext(self.policy)

    def whole(self, parameter: Tensor) -> Tensor:
        if self.stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        if self.stage < 3:
            parameter.copy_(whole)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole)

    def consolidate(self, keep: bool) -> None:
        if self.stage == 3:
            consolidate(self.policy, self.whole, keep)

    def optimizer_tensors(self) -> Named:
        for name, parameter in self.policy.named_parameters():
            if id(parameter) in self.groups and (step := self._state(parameter)["step"]) > 0:
                yield f"{name}.step", step.clone()  # one for the whole group
                for key in MOMENTS:
                    yield f"{name}.{key}", cast(Tensor, safe_get_full_optimizer_state(parameter, key))

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for flat, group in self._flat():
            for name in group["names"]:
                if f"{name}.step" in tensors:
                    self.optimizer.state[flat]["step"].copy_(tensors[f"{name}.step"])
        for name, parameter in self.policy.named_parameters():
            if id(parameter) in self.groups and f"{name}.step" in tensors:
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, tensors[f"{name}.{key}"].to(self.device), key)

    def held(self) -> tuple[int, int]:
        if self.stage == 3:
            parameters: list[Any] = list(self.policy.parameters())
            return sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters)
        whole = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        return sum(flat.numel() for flat, _ in self._flat()), whole

    def _flat(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """What AdamW really sees: this rank's part of a group, as one vector (stage 3: of a part of one); and that group."""
        if self.stage < 3:
            for group in self.optimizer.param_groups:
                yield group["params"][0], group
        else:
            zero = self.model.optimizer
            for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield flat, self.optimizer.param_groups[zero.sub_group_to_group_id[number]]

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """AdamW's, of a group that the parameter is in: they have all made as many steps."""
        group = self.groups[id(parameter)]
        return next(self.optimizer.state[flat] for flat, of in self._flat() if of is group)

    def _place(self, model: nn.Module) -> None:
        """On the device, in the precision asked for; in stage 3 as this rank's part of each weight, never the whole at once."""
        if self.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config, dtype=next(model.parameters()).dtype)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
        else:
            model.to(self.device)
        if self.bf16:
            # Without a cache of cast weights where they are divided: it would hold the whole model until a forward ends.
            autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.stage < 3)
            # Inside the module, as the engine turns off whatever autocast it is called under.
            model.forward = convert_outputs_to_fp32(autocast(model.forward))
