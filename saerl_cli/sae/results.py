"""What `saerl train-sae` leaves behind: SAE folders, their metrics on held-out text, summary.json."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import DataKind
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import Loaded
from saerl_cli.run import shards
from saerl_cli.run.processes import ProcessGroup
from saerl_cli.run.progress import say
from saerl_cli.sae.files import hook_name, sae_sha256, save_sae
from saerl_cli.sae.sweep import Planned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saerl_cli.run.directory import Run
    from saerl_cli.sae.autoencoder import SAE
    from saerl_cli.sae.train import SaeTrainer


def results(
    config: TrainSaeConfig,
    run: "Run",
    device: "torch.device",
    loaded: Loaded,
    plans: list[Planned],
    trainers: "dict[str, SaeTrainer]",
    seconds: float,
    group: ProcessGroup,
) -> float:
    """Save and evaluate the trained SAEs; returns their mean FVU.

    Args:
        config: the run's settings.
        run: its directory.
        device: where to evaluate.
        loaded: the language model.
        plans: what was trained.
        trainers: by name.
        seconds: that training took.
        group: the processes that share the held-out rows.
    """
    from saerl_cli.activations import special_ids, token_rows
    from saerl_cli.sae.metrics import evaluate_saes, first_rows, shared_rows

    length, special = row_length(config.data, loaded.context_size), special_ids(loaded.tokenizer)
    saes = {p.name: _finished(config, loaded, p, trainers[p.name], length).to(device) for p in plans}
    texts = documents(config.data, config.model, "heldout")
    rows = first_rows(token_rows(texts, loaded.tokenizer, length), special, config.eval_tokens)
    say(f"evaluating on {rows.numel()} held-out tokens")
    sites = list({site.name: site for p in plans for site in (p.site, p.target) if site is not None}.values())
    metrics = evaluate_saes(loaded.model, sites, saes, shared_rows(rows, group), special, group.all_reduce)
    attributes = _attributes(config, loaded, plans, saes, length) if run.writes else {}
    shards.barrier()
    summary, outputs = {}, {}
    for p in plans:
        numbers, sae, trainer = metrics[p.name], saes[p.name], trainers[p.name]
        firing_rate = numbers.pop("firing_rate")
        if run.writes:
            folder = save_sae(sae, run.path / "sae" / p.name, firing_rate)
            outputs[p.name] = {"path": f"sae/{p.name}", "sha256": sae_sha256(folder)}
        summary[p.name] = _described(p, sae, trainer, seconds) | numbers
        if p.name in attributes:
            summary[p.name]["attributes"] = attributes[p.name]
    for name, numbers in summary.items():
        say(_line(name, numbers))
    mean_fvu = sum(numbers["fvu"] for numbers in summary.values()) / len(summary)
    run.update(outputs={"sae": outputs})
    tokens = max(numbers["tokens"] for numbers in summary.values())
    run.summary({"saes": summary, "tokens": tokens, "seconds": seconds, "fvu_mean": mean_fvu})
    return mean_fvu


def _finished(config: TrainSaeConfig, loaded: Loaded, p: Planned, trainer: "SaeTrainer", length: int) -> "SAE":
    """The SAE with what is written beside its weights: SAELens's keys, and under `saerl` what our checks need."""
    sae = trainer.finish()
    sae.site, sae.target = p.site.name, p.target.name if p.target else None
    sae.metadata = {
        "model_name": loaded.name,
        "hook_name": hook_name(p.site.name),
        "hf_hook_name": p.site.module,
        "hook_head_index": None,
        "context_size": length,
        "prepend_bos": True,
        "dataset_path": config.data.path or config.data.name or config.data.kind.value,
        "saerl": {
            "site": p.site.name,
            "module": p.site.module,
            "model_name": loaded.name,
            "model_sha256": loaded.sha256,
            "revision": loaded.revision,
            "training": {key: getattr(value, "value", value) for key, value in asdict(p.config).items()},
        },
    }
    return sae


def _described(p: Planned, sae: "SAE", trainer: "SaeTrainer", seconds: float) -> dict[str, Any]:
    """What an SAE is and cost; `tokens_per_second` counts those that went through all SAEs of the run together."""
    tokens = p.config.batch_size * trainer.steps
    return {
        "site": p.site.name,
        "target": p.target.name if p.target else None,
        "module": p.site.module,
        "trivial": p.site.trivial,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "architecture": p.config.architecture.value,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "dead_fraction": float(trainer.firing.dead().double().mean()),
        "penalty_weight": trainer.weight(),
    }


def _line(name: str, numbers: dict[str, Any]) -> str:
    if not numbers["beats_mean"]:
        return (
            f"{name}: FVU {numbers['fvu']:.4f} is no better than predicting the mean activation; lower sae.lr or the"
            " sparsity penalty, or train longer"
        )
    return (
        f"{name}: FVU {numbers['fvu']:.4f}, L0 {numbers['l0']:.1f}, loss {numbers['ce_base']:.3f} ->"
        f" {numbers['ce_spliced']:.3f} spliced, {numbers['ce_zero']:.3f} ablated"
        f" ({numbers['ce_recovered']:.1%} recovered), {numbers['dead_fraction']:.1%} dead"
    )


def _attributes(
    config: TrainSaeConfig, loaded: Loaded, plans: list[Planned], saes: "dict[str, SAE]", length: int
) -> dict[str, dict[str, dict[str, float]]]:
    """In the planted language, how well each attribute has a feature of its own: SAE -> attribute -> scores.

    Empty for other text, whose tokens carry no labels.
    """
    if config.data.kind is not DataKind.planted:
        return {}
    import torch

    from saerl_cli.activations import capture, special_ids, text_mask
    from saerl_cli.sae.metrics import attribute_scores
    from saerl_cli.sae.probe import planted_labels

    rows, labels, names = planted_labels(config.data, config.model, loaded, length, config.eval_tokens)
    text = text_mask(rows, special_ids(loaded.tokenizer))
    device = loaded.model.device
    sites = list({p.site.name: p.site for p in plans}.values())
    found: dict[str, list[Tensor]] = {p.name: [] for p in plans}
    for ids, kept in zip(rows.to(device).split(64), text.to(device).split(64), strict=True):
        x = capture(loaded.model, sites, ids)
        for p in plans:
            found[p.name].append(saes[p.name].encode(x[p.site.name][kept].float()).cpu())
    return {name: attribute_scores(torch.cat(parts), labels, names) for name, parts in found.items()}
