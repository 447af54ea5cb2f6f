"""RLHF restricted to sparse-autoencoder feature coefficients.

What the commands call, for notebooks: `load_model`, `activation_batches`, `train_saes`, `load_sae`, `sparse_coeffs`,
`SparseCoeffConfig`, `PPOConfig`, `PPOTrainer`, `load_policy`. Each is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "load_model": "saerl_cli.models",
    "activation_batches": "saerl_cli.activations",
    "train_saes": "saerl_cli.sae.loop",
    "load_sae": "saerl_cli.sae.files",
    "open_sae": "saerl_cli.sae.files",
    "SparseCoeffConfig": "saerl_cli.adapter",
    "sparse_coeffs": "saerl_cli.adapter",
    "PPOConfig": "saerl_cli.rl.training.config",
    "PPOTrainer": "saerl_cli.rl.training.phase",
    "load_policy": "saerl_cli.rl.policy",
}
"""Name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that `import saerl_cli` stays fast."""
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
