"""SAE feature coefficients as a PEFT method, and what they are compared with.

A method is a folder as in PEFT: config.py layer.py model.py, on `tuner.py` where it acts on the outputs of modules, and
a line at the end of this file. The walk "to add an adapter" is in `saerl_cli.rl.adapters`, whose checks load no torch.

Importing this package makes our methods known to PEFT: adapters of the kinds `SPARSE_COEFFS` and `ACTIVATION_VECTOR`
then load with `PeftModel.from_pretrained` and every other door of PEFT. So do, with `AutoModelForCausalLM`, models that
`saerl export --to model` wrote.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from saerl_cli.adapter.activation_vector import config as activation_vector
from saerl_cli.adapter.activation_vector.config import VectorConfig
from saerl_cli.adapter.activation_vector.layer import VectorLayer
from saerl_cli.adapter.activation_vector.model import VectorModel
from saerl_cli.adapter.coefficients.config import PEFT_TYPE, SPLICES, SparseCoeffConfig, sparse_coeffs
from saerl_cli.adapter.coefficients.deltas import biases, delta_statistics, deltas, effects, moved, site_layers
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.adapter.coefficients.model import SparseCoeffModel
from saerl_cli.adapter.coefficients.splice import FixedSplice, splice
from saerl_cli.adapter.files import check_adapter, load_adapter, read_deltas, save_adapter
from saerl_cli.adapter.spliced import SplicedConfig

__all__ = [
    "SPLICES",
    "FixedSplice",
    "SparseCoeffConfig",
    "SparseCoeffLayer",
    "SparseCoeffModel",
    "SplicedConfig",
    "VectorConfig",
    "VectorLayer",
    "VectorModel",
    "biases",
    "check_adapter",
    "delta_statistics",
    "effects",
    "moved",
    "deltas",
    "load_adapter",
    "read_deltas",
    "save_adapter",
    "site_layers",
    "sparse_coeffs",
    "splice",
]

# PEFT's own `register_peft_method` accepts none but the names in its enum.
for _name, _config, _tuner in (
    (PEFT_TYPE, SparseCoeffConfig, SparseCoeffModel),
    (activation_vector.PEFT_TYPE, VectorConfig, VectorModel),
):
    PEFT_TYPE_TO_CONFIG_MAPPING[_name] = _config
    PEFT_TYPE_TO_TUNER_MAPPING[_name] = _tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[_name] = _tuner.prefix
