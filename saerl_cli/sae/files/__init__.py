"""SAEs on disk, one file a format: `saelens`, which is ours too, `dictionary_learning` and `sparsify`.

`open_sae` reads any of them, and SAELens's releases by name.
"""

from saerl_cli.sae.files.saelens import (
    CONFIG_FILE,
    HOOKS,
    SAELENS_VERSION,
    WEIGHTS_FILE,
    check_sae,
    find_saes,
    hook_name,
    is_transcoder,
    load_sae,
    provenance,
    read_sae_config,
    refuse_transcoder,
    sae_sha256,
    save_sae,
)
from saerl_cli.sae.files.source import FORMATS, check_source, find_sources, open_sae

__all__ = [
    "CONFIG_FILE",
    "FORMATS",
    "HOOKS",
    "SAELENS_VERSION",
    "WEIGHTS_FILE",
    "check_sae",
    "check_source",
    "find_saes",
    "find_sources",
    "hook_name",
    "is_transcoder",
    "load_sae",
    "open_sae",
    "provenance",
    "read_sae_config",
    "refuse_transcoder",
    "sae_sha256",
    "save_sae",
]
