"""Our settings as those of a trainer."""

from pathlib import Path
from typing import Any

import torch

from saerl_cli.config.algo import AlgoKind, Schedule
from saerl_cli.config.groups import Precision
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.rl.training.config import DPOConfig, PhaseConfig, PPOConfig, RWRConfig, SFTConfig


def training_arguments(config: RlhfConfig, path: Path, weights: list[float]) -> PhaseConfig:
    """The arguments of the algorithm's trainer; `weights` are those of the reward's parts."""
    algo, shared = config.algo, shared_arguments(config, path)
    if algo.kind is AlgoKind.sft:
        return SFTConfig(**shared, **supervised_arguments(config), dataset_kwargs={"skip_prepare_dataset": True})
    if algo.kind is AlgoKind.dpo:
        return DPOConfig(**shared, **supervised_arguments(config), beta=algo.kl_coef, max_length=None)
    if algo.kind is AlgoKind.rwr:
        tempered = {"temperature": algo.temperature, "longest": algo.max_new_tokens}
        return RWRConfig(
            **shared, **supervised_arguments(config), **tempered, dataset_kwargs={"skip_prepare_dataset": True}
        )
    rollouts = shared | rollout_arguments(config, weights)
    return PPOConfig(
        **rollouts,
        algorithm=algo.kind.value,
        num_generations=algo.group_size,
        scale_rewards="group" if algo.kind is AlgoKind.grpo and algo.scale_rewards else "none",
        gamma=algo.gamma,
        lam=algo.lam,
        cliprange_value=algo.cliprange_value,
        vf_coef=algo.vf_coef,
        value_learning_rate=algo.value_lr,
        whiten_advantages=algo.whiten_advantages,
        critic=algo.critic.value,
        critic_warmup=algo.critic_warmup,
        entropy_coef=algo.entropy_coef,
        stop_epochs_kl=algo.stop_epochs_kl,
    )


def shared_arguments(config: RlhfConfig, path: Path) -> dict[str, Any]:
    """What every trainer takes."""
    algo, launch, on_cpu = config.algo, config.launch, config.launch.cpu or not torch.cuda.is_available()
    micro_batch = algo.micro_batch or config.rows_of_a_step
    steps = algo.phases * algo.steps_per_phase
    return {
        "output_dir": str(path / "checkpoints"),
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every * algo.steps_per_phase,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": config.rows_of_a_step // micro_batch,
        "learning_rate": config.adapter.lr,
        "weight_decay": config.adapter.weight_decay,
        "max_grad_norm": algo.max_grad_norm,
        "lr_scheduler_type": scheduler(algo.schedule, algo.warmup),
        "activation_checkpointing": algo.activation_checkpointing,
        "warmup_steps": round(algo.warmup * steps),
        "seed": config.seed,
        "bf16": launch.mixed_precision is Precision.bf16,
        "fp16": launch.mixed_precision is Precision.fp16,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and launch.num_processes > 1 else None,
        "dataloader_pin_memory": not on_cpu,
        "disable_tqdm": True,
        **(split_arguments(config) if launch.shards > 1 else {}),
    }


def split_arguments(config: RlhfConfig) -> dict[str, Any]:
    """Of a model that is split over processes: a frozen copy, where there is one, is too.

    The Trainer refuses to save its own optimiser state then; ours is saved all the same (`exact`).
    """
    copied = adapter_of(config.adapter).whole_model
    init = {"model_init_kwargs": {"distributed_config": {"fsdp_size": config.launch.shards}}} if copied else {}
    return {"save_only_model": True, **init}


def scheduler(schedule: Schedule, warmup: float) -> str:
    """The name of a schedule in transformers."""
    if schedule is Schedule.linear:
        return "linear"
    return "constant_with_warmup" if warmup else "constant"


def rollout_arguments(config: RlhfConfig, weights: list[float]) -> dict[str, Any]:
    """What trainers that write completions take beside."""
    algo = config.algo
    micro_batch = algo.micro_batch or config.rows_of_a_step
    return {
        "steps_per_generation": algo.minibatches * config.rows_of_a_step // micro_batch,
        "num_iterations": algo.epochs,
        "max_completion_length": algo.max_new_tokens,
        "temperature": algo.temperature,
        "beta": algo.kl_coef,
        "kl_target": algo.kl_target,
        "kl_gain": algo.kl_gain,
        "epsilon": algo.cliprange,
        "prefix_cache": algo.prefix_cache,
        "missing_eos_penalty": algo.missing_eos_penalty,
        "reward_weights": weights,
    }


def supervised_arguments(config: RlhfConfig) -> dict[str, Any]:
    """What trainers on given sequences take beside."""
    return {"phase_steps": config.algo.steps}
