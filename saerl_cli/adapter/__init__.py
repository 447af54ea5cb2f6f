"""SAE feature coefficients as a PEFT method.

Importing this package makes the method known to PEFT: adapters of the kind `SPARSE_COEFFS` then load with
`PeftModel.from_pretrained` and every other door of PEFT.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from saerl_cli.adapter.coefficients import biases, delta_statistics, deltas, site_layers
from saerl_cli.adapter.config import PEFT_TYPE, SPLICES, SparseCoeffConfig, sparse_coeffs
from saerl_cli.adapter.files import check_adapter, load_adapter, read_deltas, save_adapter
from saerl_cli.adapter.layer import FixedSplice, SparseCoeffLayer, splice
from saerl_cli.adapter.model import SparseCoeffModel

__all__ = [
    "SPLICES",
    "FixedSplice",
    "SparseCoeffConfig",
    "SparseCoeffLayer",
    "SparseCoeffModel",
    "biases",
    "check_adapter",
    "delta_statistics",
    "deltas",
    "load_adapter",
    "read_deltas",
    "save_adapter",
    "site_layers",
    "sparse_coeffs",
    "splice",
]

# PEFT's own `register_peft_method` accepts none but the names in its enum.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SparseCoeffConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SparseCoeffModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SparseCoeffModel.prefix
