"""DeepSpeed as the engine of a training: ZeRO, which spreads over the ranks what each would hold a copy of.

    stage 1   the optimizer's state         stage 2   gradients too         stage 3   weights too

The loop stays that of `pare.workers.training`, and the result too, but for the order in which numbers are summed: what is
trained is float32 in every stage, gradients travel as such, and the step divides by the tokens that were predicted.
Source: Rajbhandari et al. (2020), "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pare.methods.contract import TrainMethod
from pare.workers.ranks import Ranks
from pare.workers.task import TaskError


@dataclass(frozen=True)
class Zero:
    """One way to spread a training. `pare.orchestrator.zero_config` checks what a person writes here."""

    stage: int
    """1, 2 or 3."""

    offload: bool = False
    """Keep the optimizer's state, and in stage 3 the weights, in the memory of the host."""

    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of DeepSpeed's own config."""

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """`TrainingArguments.deepspeed`; what is "auto" follows from the other arguments."""
        shards: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            shards["offload_optimizer"] = {"device": "cpu"}
            if self.stage == 3:
                shards["offload_param"] = {"device": "cpu"}
        # DeepSpeed replaces an autocast around it by its own. Unless told otherwise it then reduces gradients in bfloat16.
        autocast = {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch."),
                    "lower_precision_safe_modules": []}  # fmt: skip
        own = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # else an offloaded 8-bit AdamW is quietly replaced by Adam
            "zero_optimization": shards,
            "torch_autocast": autocast,
        }
        return merged(own, self.config)

    def spread(self, model: nn.Module, device: torch.device) -> None:
        """Leaves this rank its part alone of every weight, if the stage is one of weights.

        One weight after another visits the device: left to itself DeepSpeed would first move all of the model there.
        """
        if self.stage < 3:
            return
        import deepspeed

        shards = self.arguments(torch.float32)["zero_optimization"]
        deepspeed.zero.Init(model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": shards})
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both dicts in one, the second's values where both have a key that holds no dicts."""
    both = {key: merged(first[key], second[key]) for key in first.keys() & second.keys() if isinstance(first[key], dict)}
    return {**first, **second, **both}


def objection(method: TrainMethod, stage: int) -> str | None:
    """Why a method cannot be trained by that stage; None where it can."""
    if method.shards == "none":
        return "it is made for one rank that holds all of the model and of the optimizer's state"
    if stage == 3 and method.shards != "zero3":
        return "it works on weights as a whole, and in stage 3 no rank has any of them whole"
    if overrides(method, "after_backward"):
        return "it works on the gradients of weights as a whole, and no rank has those"
    return None


def overrides(method: TrainMethod, hook: str) -> bool:
    """Whether the method does anything in this hook."""
    return getattr(type(method), hook) is not getattr(TrainMethod, hook)


@contextlib.contextmanager
def opened(zero: Zero | None, device: torch.device) -> Iterator[None]:
    """Makes this process one that DeepSpeed runs in, and afterwards one that plain torch runs in as well as before."""
    if zero is None:
        yield
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise TaskError(f"engine=deepspeed_zero{zero.stage} needs DeepSpeed. Try: pip install 'pare-lm[deepspeed]'")
    kept, linear = dict(os.environ), nn.functional.linear
    try:
        enter(device)
        with warnings.catch_warnings():  # of every collective operation one, in which DeepSpeed calls it by an older name
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            yield
    finally:
        leave()
        nn.functional.linear = linear  # stage 3 puts its own there, for all models
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(kept)


def enter(device: torch.device) -> None:
    """Sets up what DeepSpeed and accelerate look for in the process of a rank."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    if not torch.distributed.is_initialized():
        # It stays when the task is done: DeepSpeed keeps hold of it, and of one rank it is no hindrance to anything.
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if torch.distributed.get_world_size() == 1:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    import deepspeed
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    # An operation of inference: a compiler would build it here, and peers of a rank that is lost spin in it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":  # accelerate takes each rank for the only one where it is to find that out by itself
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED


def leave() -> None:
    """Takes back what would make DeepSpeed's of the next training, and shards of the next model that is loaded."""
    from accelerate.state import AcceleratorState
    from deepspeed.runtime import torch_autocast
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


class Shards:
    """The part of this rank in a training that has begun. Every method is called by all ranks alike."""

    def __init__(self, accelerator: Any) -> None:
        from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

        class Backward(DeepSpeedEngineWrapper):
            """Without the step, which accelerate would take before anybody has looked at the loss."""

            def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
                self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
                self.engine.backward(loss, **kwargs)

        self.engine = accelerator.deepspeed_engine_wrapped.engine
        self.zero = self.engine.optimizer
        self.stage = self.engine.zero_optimization_stage()
        accelerator.deepspeed_engine_wrapped = Backward(self.engine)

    def step(self, scale: float) -> bool:
        """Takes the optimizer's step with gradients times `scale`. False where they were not finite: then nothing has moved."""
        self.zero.loss_scale = 1 / scale  # by which it divides, also before it measures the norm
        self.engine.step()
        self.zero.loss_scale = 1.0
        return not self.zero.overflow

    def take_edits(self) -> None:
        """Takes up what was written into the weights themselves; in stage 3 nobody can write into them."""
        if self.stage < 3:
            self.zero.refresh_fp32_params()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, in stage 3, the weights, as far as this rank holds them."""
        if self.stage < 3:
            return {"optimizer": self.zero.optimizer.state_dict()}
        self.zero.checkpoint_event_prologue()
        state = self.zero.state_dict()
        self.zero.checkpoint_event_epilogue()
        return {"optimizer": state["optimizer_state_dict"], "weights": state["fp32_flat_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a `state_dict` of the same rank among as many in force. Stages 1 and 2 begin with the weights that it is of."""
        if self.stage < 3:
            self.zero.optimizer.load_state_dict(state["optimizer"])
            return
        whole = {
            "loss_scaler": self.zero.loss_scaler,
            "dynamic_loss_scale": False,
            "overflow": False,
            "optimizer_state_dict": state["optimizer"],
            "fp32_flat_groups": state["weights"],
        }
        self.zero.load_state_dict([whole] * torch.distributed.get_world_size())
        self.zero.checkpoint_event_epilogue()

    def end(self, model: nn.Module, ranks: Ranks) -> None:
        """Takes the model out of DeepSpeed's hands. After stage 3 the first rank has it whole, on the CPU, and no other has.

        One parameter at a time is whole on the ranks' devices meanwhile.
        """
        import deepspeed

        self.zero.optimizer.state.clear()
        if self.stage == 3:
            for parameter in model.parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().to("cpu", copy=True) if ranks.is_first else None
                if whole is not None:
                    parameter.data = whole
        self.engine.destroy()
