"""What a person may write beneath `engine.config`: keys of DeepSpeed that change speed and memory.

What a training learns is said by the recipe and `dtype`, and how it is spread by `engine`. A key of DeepSpeed that says such
a thing once more is left out where it agrees, so that a config from elsewhere can be taken as it is, and else refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pare.orchestrator.errors import ConfigError, nearest

if TYPE_CHECKING:  # it imports torch, and the first line is to come at once
    from pare.methods.contract import TrainMethod

KEYS: dict[str, Any] = {
    "zero_optimization": dict, "torch_autocast": dict, "communication_data_type": str, "prescale_gradients": bool,
    "gradient_predivide_factor": float, "comms_logger": dict, "flops_profiler": dict, "wall_clock_breakdown": bool,
    "memory_breakdown": bool, "dump_state": bool,
}  # fmt: skip
"""Key -> type of its value."""

ZERO_KEYS: dict[str, Any] = {
    "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": int, "allgather_partitions": bool,
    "use_multi_rank_bucket_allreduce": bool, "allgather_bucket_size": int, "overlap_comm": bool, "sub_group_size": int,
    "round_robin_gradients": bool, "parameter_alignment": bool, "ignore_unused_parameters": bool,
    "memory_efficient_linear": bool, "stage3_prefetch_bucket_size": int, "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int, "stage3_max_live_parameters": int, "stage3_max_reuse_distance": int,
    "stage3_module_granularity_threshold": int, "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool, "log_trace_cache_warnings": bool, "enable_sanity_checks": bool,
    "stage": int, "offload_optimizer": dict, "offload_param": dict,
}  # fmt: skip

OFFLOAD_KEYS: dict[str, Any] = {"device": str, "pin_memory": bool, "buffer_count": int, "buffer_size": int, "max_in_cpu": int}
AUTOCAST_KEYS: dict[str, Any] = {"enabled": bool, "dtype": str, "lower_precision_safe_modules": list}

ELSEWHERE = {
    "optimizer": "it is a setting of the method. Try: recipe.STAGE.optimizer=adamw_torch",
    "scheduler": "it is a setting of the method. Try: recipe.STAGE.schedule=cosine recipe.STAGE.warmup=0.1",
    "amp": "precision is a setting of the experiment. Try: dtype=bfloat16",
    "data_types": "what is trained is float32 under every engine, and gradients are summed in it. Try: dtype=bfloat16",
    "zero_force_ds_cpu_optimizer": "the method says which optimizer it is. Try: recipe.STAGE.optimizer=adamw_torch_fused",
    "activation_checkpointing": "it is a setting of the method. Try: recipe.STAGE.gradient_checkpointing=true",
    "checkpoint": "Pare keeps checkpoints in its own store. Leave it out",
    "steps_per_print": "Pare records every step. Leave it out",
    "zero_allow_untested_optimizer": "Pare allows every optimizer. Leave it out",
}
"""Key of DeepSpeed -> why it is not for `engine.config`, and where it is said."""


def check_config(config: Mapping[str, Any], stage: int, offload: bool) -> None:
    """Refuses what can be told to be wrong before it is known what is trained."""
    for key in config.keys() & ELSEWHERE.keys():
        raise ConfigError(f"engine.config.{key}: {ELSEWHERE[key]}")
    check_keys("engine.config", config, {**KEYS, **dict.fromkeys(OF_THE_RECIPE)})
    zero = config.get("zero_optimization", {})
    check_keys("engine.config.zero_optimization", zero, ZERO_KEYS)
    if zero.get("stage", stage) not in (stage, "auto"):
        got = zero["stage"]
        instead = f"engine=deepspeed_zero{got}" if got in (1, 2, 3) else "engine=deepspeed_zero1, 2 or 3, and leave the key out"
        raise ConfigError(f"engine.config.zero_optimization.stage={got} contradicts engine.stage={stage}. Try: {instead}")
    for key in ("offload_optimizer", "offload_param"):
        if key not in zero:
            continue
        where, device = f"engine.config.zero_optimization.{key}", zero[key].get("device", "cpu")
        check_keys(where, zero[key], OFFLOAD_KEYS)
        if device == "nvme":
            raise ConfigError(f"{where}.device=nvme: what lies there would be in no checkpoint. Try: {where}.device=cpu")
        if (device == "cpu") != offload or (key == "offload_param" and stage < 3):
            raise ConfigError(
                f"{where}.device={device} contradicts engine.offload={str(offload).lower()} in stage {stage}. "
                "Try: engine=deepspeed_zero3_offload"
            )
    check_keys("engine.config.torch_autocast", config.get("torch_autocast", {}), AUTOCAST_KEYS)


def check_keys(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses a key that is not among `known`, and a value of another type; "auto" leaves a value to others."""
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"unknown setting '{where}.{key}'.{nearest(key, known)}")
        if (kind := known[key]) is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and (kind is float or float(value).is_integer()) if kind in (int, float) else isinstance(value, kind)
        if not (fits or (value == "auto" and kind is not dict)):
            raise ConfigError(f"{where}.{key} must be of type {kind.__name__}, got {value!r}")


def passes(settings: TrainMethod, ranks: int) -> int:
    """Forward passes of each rank in a step."""
    share = settings.batch_size // ranks
    return next(share // micro for micro in range(settings.micro_batch_size, 0, -1) if share % micro == 0)


OF_THE_RECIPE = {
    "train_batch_size": ("batch_size", lambda settings, ranks: settings.batch_size),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", lambda settings, ranks: settings.micro_batch_size),
    "gradient_accumulation_steps": ("micro_batch_size", passes),
    "gradient_clipping": ("max_grad_norm", lambda settings, ranks: settings.max_grad_norm),
    "fp16": None,
    "bf16": None,
}
"""Key of DeepSpeed -> the setting of the method that says it, and what it comes to; None: `dtype` says it."""


def own_config(config: Mapping[str, Any], stage: str, settings: TrainMethod, ranks: int, dtype: str) -> dict[str, Any]:
    """`engine.config` without what the recipe and `dtype` say.

    stage: name of the stage of the recipe.

    Raises:
        ConfigError: DeepSpeed's key says something else.
    """
    for key, said in OF_THE_RECIPE.items():
        got = config.get(key, "auto")
        if said is None:
            enabled = isinstance(got, Mapping) and got.get("enabled") not in (None, False, "auto")
            if enabled and (key, dtype) != ("bf16", "bfloat16"):
                raise ConfigError(
                    f"engine.config.{key}.enabled contradicts dtype={dtype}: precision is a setting of the experiment, "
                    "float32 or bfloat16. Try: dtype=bfloat16"
                )
        elif got not in ("auto", value := said[1](settings, ranks)):
            setting = f"recipe.{stage}.{said[0]}"
            hint = "the two together say how often" if key == "gradient_accumulation_steps" else f"Try: {setting}={got}"
            raise ConfigError(
                f"engine.config.{key}={got} contradicts the recipe, by which it is {value} ({setting}="
                f"{getattr(settings, said[0])}, engine.ranks={ranks}). {hint}, and leave the key out"
            )
    autocast = config.get("torch_autocast", {})
    for key, value in (("enabled", dtype != "float32"), ("dtype", dtype)):
        if autocast.get(key, value) not in (value, "auto"):
            raise ConfigError(
                f"engine.config.torch_autocast.{key}={autocast[key]} contradicts dtype={dtype}. Try: leave it out"
            )
    return {key: value for key, value in config.items() if key not in OF_THE_RECIPE}
