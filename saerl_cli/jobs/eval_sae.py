"""`saerl eval-sae`: SAEs of one model on the same held-out text, against controls and each other.

summary.json   {saes: {name: metrics}, controls: {name/control: metrics}, stability: [...], probes: {...}}
firing_rates.safetensors    share of tokens on which each feature fires, [d_sae] by name
table.csv, figures/, report.html    as `saerl_cli.report.saes` draws them
"""

import time
from typing import Any

from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.groups import DataKind
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import context_size, describe, known_sha256
from saerl_cli.run.directory import Run
from saerl_cli.run.files import write_safetensors
from saerl_cli.run.processes import process_group
from saerl_cli.run.progress import say
from saerl_cli.sae.evaluate import check_place, control_settings, list_saes, settings
from saerl_cli.sae.files import read_sae_config


def check(config: EvalSaeConfig) -> None:
    """Refuse what cannot work, before anything is written and without loading weights.

    Raises:
        ValueError: one line saying what is wrong.
    """
    folders = list_saes(config.paths())
    model, data = settings(config, folders)
    description = describe(model)
    row_length(data, context_size(description))
    sha256 = known_sha256(model)
    for folder in folders.values():
        check_place(folder, description, sha256)
    if config.probes is not None:
        from saerl_cli.sae.probe import read_labelled

        read_labelled(config.probes)
    if config.controls:
        for folder in folders.values():
            control_settings(read_sae_config(folder), config.control_tokens)
    if data.kind is not DataKind.hub:
        documents(data, model, "heldout")


def work(config: EvalSaeConfig, run: Run, accelerator: Any) -> float:
    """Measure, print the table, write the numbers, the figures and the page; returns the mean FVU of the SAEs."""
    from saerl_cli.report.saes import print_tables, warnings, write_results
    from saerl_cli.sae.evaluate import measure_saes

    start = time.monotonic()
    found = measure_saes(config, accelerator.device, process_group())
    mean_fvu = sum(metrics["fvu"] for metrics in found.saes.values()) / len(found.saes)
    if not run.writes:
        return mean_fvu
    run.update(inputs=found.inputs)
    print_tables(found)
    for line in warnings(found.saes, found.controls):
        say(line)
    write_results(found, run.path, config)
    write_safetensors(run.path / "firing_rates.safetensors", found.firing_rates)
    parts = {key: getattr(found, key) for key in ("saes", "controls", "stability", "probes")}
    run.summary({"fvu_mean": mean_fvu, "seconds": round(time.monotonic() - start, 1), **parts})
    return mean_fvu
