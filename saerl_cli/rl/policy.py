"""A policy together with the reference it is measured against, and how to load one from a finished run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.trainer.utils import use_adapter

from saerl_cli.config.adapter import Splice
from saerl_cli.config.groups import Dtype, LaunchConfig, ModelConfig, ModelKind
from saerl_cli.models import Loaded, eos_token_ids, load_model
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.rl.rollouts.sampling import reset_generation_config
from saerl_cli.rl.runs import policy_folder, run_config
from saerl_cli.run import shards
from saerl_cli.run.files import read_json


@dataclass
class Policy:
    """A trained model, its reference and its tokenizer."""

    model: Any
    """With the adapter, where there is one."""
    tokenizer: Any
    eos_token_ids: list[int]
    """Every id that ends a completion."""
    context_size: int
    """Longest sequence in tokens."""
    reference_model: Any = None
    """Of adapter=full: the untouched model. None: the reference is the model with its adapter off, or `ref` on."""

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The model to call as the reference."""
        with reference_of(self.model, self.reference_model) as model:
            yield model


@contextmanager
def reference_of(model: Any, frozen: Any = None) -> Iterator[Any]:
    """The reference of a policy: its frozen copy, or itself with the adapter `ref` on or with its adapter off."""
    if frozen is not None:
        yield frozen
        return
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield model


def load_policy(run_path: Path | str, device: Any = None, launch: LaunchConfig | None = None) -> Policy:
    """The policy of a finished run of `saerl rlhf`, in eval mode, all parameters frozen.

    Args:
        run_path: the run directory.
        device: where to put it.
        launch: of the job, whose processes may split its weights.

    Raises:
        ValueError: unfinished run, or a base model or SAE that is not the one the policy was trained with.
    """
    config = run_config(run_path)
    folder = policy_folder(run_path, config)
    loaded = load_model(config.model, device, launch)
    trained_on = read_json(Path(run_path) / "run.json").get("inputs", {}).get("model", {}).get("sha256")
    if trained_on not in (None, loaded.sha256):
        raise ValueError(
            f"{run_path} was trained on other weights (sha256 {trained_on[:12]}) than {loaded.name} has now"
            f" ({loaded.sha256[:12]})"
        )
    if adapter_of(config.adapter).whole_model:
        return full_policy(loaded, folder, device, launch)
    return adapter_policy(loaded, folder, config.adapter.splice)


def full_policy(loaded: Loaded, folder: Path, device: Any, launch: LaunchConfig | None) -> Policy:
    """The model of `folder` with the loaded one as its reference."""
    dtype = Dtype(str(loaded.model.dtype).removeprefix("torch."))
    config = ModelConfig(kind=ModelKind.local, path=str(folder), dtype=dtype)
    model = load_model(config, device or loaded.model.device, launch).model
    return plain(Policy(model, loaded.tokenizer, eos_token_ids(loaded), loaded.context_size, loaded.model))


def adapter_policy(loaded: Loaded, folder: Path, splice: Splice) -> Policy:
    """The loaded model with the adapter of `folder`, of any method."""
    from saerl_cli.adapter import load_adapter

    eos = eos_token_ids(loaded)
    model = load_adapter(loaded.model, folder)
    if not shards.is_split(loaded.model):  # whose adapters are where its parts are
        model.to(loaded.model.device)
    if splice is Splice.reconstruct:
        model.add_adapter("ref", model.peft_config["default"])
        model.set_adapter("default")
    return plain(Policy(model.eval().requires_grad_(False), loaded.tokenizer, eos, loaded.context_size))


def plain(policy: Policy) -> Policy:
    """The policy with plain sampling: temperature alone, no filters that came with the model."""
    for model in (policy.model, policy.reference_model):
        if model is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            reset_generation_config(base, policy.eos_token_ids, policy.tokenizer.pad_token_id)
    return policy
