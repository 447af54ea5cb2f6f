"""Every private name of another library that the package relies on, with what it must be.

A failure says which seam a new version of TRL, transformers, PEFT, torch, Hydra or submitit has moved.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "saerl_cli"
BASE_TUNER = "peft.tuners.tuners_utils:BaseTuner"

TRAINER_HOOKS = {
    "_prepare_inputs": ("trl.trainer.grpo_trainer:GRPOTrainer", "self generation_batch"),
    "_prepare_dataset": ("trl.trainer.dpo_trainer:DPOTrainer", "self dataset processing_class args dataset_name"),
    "_send_telemetry": ("trl.trainer.base_trainer:_BaseTrainer", "self"),
    "_clip_grad_norm": ("transformers:Trainer", "self model"),
    "_save_checkpoint": ("transformers:Trainer", "self model trial"),
    "_load_from_checkpoint": ("transformers:Trainer", "self resume_from_checkpoint model"),
    "_load_optimizer_and_scheduler": ("transformers:Trainer", "self checkpoint"),
    "_sync_replicated_trainable_parameters": ("transformers:Trainer", "self model"),
}
"""What our trainers override of TRL's and transformers', and its parameters."""
TUNER_HOOKS = {
    "_check_target_module_exists": (BASE_TUNER, "peft_config key"),
    "_create_and_replace": (
        BASE_TUNER,
        "self peft_config adapter_name target target_name parent current_key parameter_name",
    ),
    "_replace_module": (BASE_TUNER, "self parent child_name new_module child"),
    "_unload_and_optionally_merge": (BASE_TUNER, "self merge progressbar safe_merge adapter_names"),
    "_get_adapter_state_dict": (BASE_TUNER, None),
    "_remap_adapter_state_dict_for_load": (BASE_TUNER, None),
}
"""What our tuners override of PEFT's."""
CALLED = {
    "_calculate_rewards": (
        "trl.trainer.grpo_trainer:GRPOTrainer",
        "self inputs prompts completions completion_ids_list",
    ),
    "_supports_logits_to_keep": ("transformers.generation.utils:GenerationMixin", "self"),
    "_supports_default_dynamic_cache": ("transformers.generation.utils:GenerationMixin", ""),
    "_get_fsdp_state": ("torch.distributed.fsdp:FSDPModule", "self"),
    "_exit": ("os", "status"),
}
"""What is called."""
MENTIONED = {
    "_step": "trl.trainer.grpo_trainer:GRPOTrainer",
    "_metrics": "trl.trainer.grpo_trainer:GRPOTrainer",
    "_tokenizer": "trl.trainer.grpo_trainer:GRPOTrainer",
    "_total_train_tokens": "trl.trainer.reward_trainer:RewardTrainer",
    "_is_stateful": "transformers:PreTrainedModel",
    "_weight_conversions": "transformers:PreTrainedModel",
    "_active_adapter": "peft.tuners.tuners_utils:BaseTunerLayer",
    "_disable_adapters": "peft.tuners.tuners_utils:BaseTunerLayer",
    "_modules": "torch.nn:Module",
    "_forward_hooks": "torch.nn:Module",
    "_return_value": "hydra.core.utils:JobReturn",
    "_get_name": "torch.nn:Module",
    "_cdata": None,
    "_target_": None,
    "_pytree": None,
}
"""Attributes, and the class whose source sets them; those without one are names of a format or a module."""
OVERLOADS = ("_embedding_bag_per_sample_weights_backward",)
"""Of torch.ops.aten."""


def named(target: str):
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@pytest.mark.parametrize("name", [*TRAINER_HOOKS, *TUNER_HOOKS, *CALLED])
def test_a_method_has_the_parameters_we_rely_on(name):
    owner, parameters = (TRAINER_HOOKS | TUNER_HOOKS | CALLED)[name]
    method = getattr(named(owner), name)
    assert callable(method)
    if parameters is not None and owner != "os":
        assert list(inspect.signature(method).parameters) == parameters.split()


@pytest.mark.parametrize("name", [name for name, owner in MENTIONED.items() if owner])
def test_an_attribute_is_one_of_the_class_we_rely_on(name):
    owner = named(MENTIONED[name])
    sources = [inspect.getsource(cls) for cls in inspect.getmro(owner) if cls is not object]
    assert any(name in source for source in sources)


@pytest.mark.parametrize("name", OVERLOADS)
def test_an_operator_is_there(name):
    import torch

    assert hasattr(torch.ops.aten, name)


def test_a_fused_backward_has_the_arguments_we_pass():
    import torch

    schema = torch.ops.aten._embedding_bag_per_sample_weights_backward.default._schema
    assert [argument.name for argument in schema.arguments] == [
        "grad", "weight", "indices", "offsets", "offset2bag", "mode", "padding_idx",
    ]  # fmt: skip


def private_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names used as attributes or imported, and names that are the file's own, of those with one leading underscore."""
    used, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self" else used).add(
                node.attr
            )
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            used |= {part for part in (node.module or "").split(".")} | {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".")}
    private = [{name for name in names if name[:1] == "_" and name[:2] != "__"} for names in (used, own)]
    return private[0], private[1]


def test_the_tables_hold_every_private_name_that_is_used():
    used, own = set(), set()
    for path in PACKAGE.rglob("*.py"):
        uses, owns = private_names(ast.parse(path.read_text()))
        used, own = used | uses, own | owns
    table = {*TRAINER_HOOKS, *TUNER_HOOKS, *CALLED, *MENTIONED, *OVERLOADS}
    assert not (used - own) - table, "of another library: say in a table what they must be"
    assert not table - used - own, "no longer relied on"


def test_our_trainers_override_no_other_hook():
    from saerl_cli.rl.reward_model.trainer import RewardTrainer
    from saerl_cli.rl.training.phase import PPOTrainer
    from saerl_cli.rl.training.regression import RWRTrainer
    from saerl_cli.rl.training.supervised import DPOTrainer, SFTTrainer

    found = set()
    for trainer in (PPOTrainer, SFTTrainer, DPOTrainer, RWRTrainer, RewardTrainer):
        classes = inspect.getmro(trainer)
        ours = [cls for cls in classes if cls.__module__.startswith("saerl_cli")]
        theirs = {name for cls in classes if cls not in ours for name in vars(cls)}
        found |= {name for cls in ours for name, value in vars(cls).items() if callable(value) and name in theirs}
    hooks = {name for name in found if name.startswith("_") and not name.startswith("__")}
    assert hooks == TRAINER_HOOKS.keys() and len(hooks) <= 8
