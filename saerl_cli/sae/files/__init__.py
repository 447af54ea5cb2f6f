"""SAEs on disk, one file a format: `saelens`, which is ours too, `dictionary_learning` and `sparsify`."""

from saerl_cli.sae.files.saelens import (
    CONFIG_FILE,
    SAELENS_VERSION,
    WEIGHTS_FILE,
    check_sae,
    find_saes,
    hook_name,
    is_transcoder,
    load_sae,
    provenance,
    read_sae_config,
    sae_sha256,
    save_sae,
)

__all__ = [
    "CONFIG_FILE",
    "SAELENS_VERSION",
    "WEIGHTS_FILE",
    "check_sae",
    "find_saes",
    "hook_name",
    "is_transcoder",
    "load_sae",
    "provenance",
    "read_sae_config",
    "sae_sha256",
    "save_sae",
]
