"""The job of `saerl train-sae`: one SAE a site from one stream of activations, evaluated on held-out text.

Killed at any moment and run again, it ends with the same weights to the bit: a checkpoint holds every tensor of the
trainers, and the stream is a function of (seed, step). With several processes each takes its share of every batch and
gradients are summed, so that n processes with batch B train what one process with batch B would.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from saerl_cli.activations import documents, planted_reviews, row_length
from saerl_cli.config.groups import DataKind, ModelKind, refuse_unless
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.models import Loaded, Site, context_size, describe, light_tokenizer, locate, resolve_sites
from saerl_cli.run.files import read_json, write_json, write_safetensors
from saerl_cli.run.progress import bar, say
from saerl_cli.sae.files import sae_sha256, save_sae

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from saerl_cli.run.directory import Run
    from saerl_cli.sae.autoencoder import SAE
    from saerl_cli.sae.train import SaeTrainer

TRANSFORMER_LENS_HOOKS = {
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_hidden": "blocks.{}.mlp.hook_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_post": "blocks.{}.hook_resid_post",
}


def check(config: TrainSaeConfig) -> None:
    """Refuse what cannot work, before anything is written and without loading weights."""
    description = describe(config.model)
    for site in resolve_sites(config.site.names, description):
        config.sae.width(site.width)
    row_length(config.data, context_size(description))
    refuse_unless(
        config.sae.batch_size >= config.launch.num_processes,
        f"sae.batch_size={config.sae.batch_size} is less than a token for each of launch.num_processes processes",
    )
    if config.data.kind is not DataKind.hub:
        _check_length(config)


def _check_length(config: TrainSaeConfig) -> None:
    """Refuse training text shorter than one batch, without tokenizing more of it than a batch."""
    if config.data.kind is DataKind.planted:
        lengths = (len(review.words) for review in planted_reviews(config.data, config.model, "train"))
    else:
        texts = documents(config.data, config.model, "train")
        tokenizer = light_tokenizer(locate(config.model)) if config.model.kind is ModelKind.local else None
        if tokenizer is None:  # nothing to count with yet
            return
        lengths = (len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    tokens, needed = 0, config.sae.batch_size
    for length in lengths:
        tokens += length
        if tokens >= needed:
            return
    raise ValueError(
        f"the training text holds {tokens} tokens, less than one batch of sae.batch_size={needed};"
        " lower it or give more text"
    )


def work(config: TrainSaeConfig, run: "Run", accelerator: "Accelerator") -> float:
    """Train, save and evaluate the SAEs; returns their mean FVU."""
    from saerl_cli.activations import ActivationStream, special_ids, token_rows
    from saerl_cli.models import load_model
    from saerl_cli.sae.forms.common import Processes
    from saerl_cli.sae.train import SaeTrainer

    loaded = load_model(config.model, accelerator.device)
    sites = resolve_sites(config.site.names, loaded.model)
    length = row_length(config.data, loaded.context_size)
    _announce(run, loaded, sites)
    rows = token_rows(documents(config.data, config.model, "train"), loaded.tokenizer, length)
    processes = Processes(accelerator.process_index, accelerator.num_processes, _sum_over_processes(accelerator))
    trainers = {
        site.name: SaeTrainer(site.width, config.sae, accelerator.device, processes, site.name) for site in sites
    }
    step, seconds = _resume(run, trainers)
    stream = ActivationStream(
        loaded.model,
        rows,
        sites,
        special_ids(loaded.tokenizer),
        config.sae.batch_size,
        config.activations.buffer_tokens,
        config.seed,
        step,
        accelerator.process_index,
        accelerator.num_processes,
    )
    seconds = _train(config, run, trainers, stream, step, seconds)
    saes = {name: trainer.finish() for name, trainer in trainers.items()}
    for site in sites:
        saes[site.name].metadata = _metadata(config, loaded, site, length)
    return _evaluate(config, run, accelerator, loaded, sites, trainers, saes, length, seconds)


def _announce(run: "Run", loaded: Loaded, sites: list[Site]) -> None:
    run.update(inputs={"model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256}})
    for site in sites:
        if site.trivial:
            say(
                f"warning: {site.name} sees the current token alone (parallel residual), so its SAE is trivially good"
                " and no evidence; use layers above 0"
            )


def _sum_over_processes(accelerator: "Accelerator") -> "Callable[[Tensor], Tensor]":
    if accelerator.num_processes == 1:
        return lambda tensor: tensor

    def total(tensor: "Tensor") -> "Tensor":
        return cast("Tensor", accelerator.reduce(tensor, "sum"))  # it declares any nesting of tensors

    return total


# --- training --------------------------------------------------------------------------------------------------------


def _train(
    config: TrainSaeConfig, run: "Run", trainers: "dict[str, SaeTrainer]", stream: Any, step: int, seconds: float
) -> float:
    """Train to the end; returns the seconds it took, those before an interruption included."""
    from saerl_cli.sae.loop import training

    last = max(trainer.steps for trainer in trainers.values())
    began = time.monotonic() - seconds
    with bar(last, f"SAE at {', '.join(trainers)}", step) as advance:
        for done, metrics in training(stream, trainers, config.log_every):
            note = ""
            if metrics is not None:
                named = {f"{site}/{key}": value for site, m in metrics.items() for key, value in m.items()}
                run.log(done, tokens=done * config.sae.batch_size, **named)
                note = f"FVU {sum(m['fvu'] for m in metrics.values()) / len(metrics):.3f}"
            if run.writes and (done % config.checkpoint_every == 0 or done == last):
                _save_checkpoint(run, trainers, done, time.monotonic() - began)
            advance(1, note)
    return time.monotonic() - began


def _save_checkpoint(run: "Run", trainers: "dict[str, SaeTrainer]", step: int, seconds: float) -> None:
    with run.save_checkpoint(step) as folder:
        for name, trainer in trainers.items():
            write_safetensors(folder / f"{name}.safetensors", trainer.state(), {})
        write_json(folder / "state.json", {"step": step, "seconds": seconds})
    run.keep(1)


def _resume(run: "Run", trainers: "dict[str, SaeTrainer]") -> tuple[int, float]:
    """Continue from the newest checkpoint; returns its step and the seconds spent until then."""
    from safetensors.torch import load_file

    found = run.latest_checkpoint()
    if found is None:
        run.truncate(0)
        return 0, 0.0
    step, folder = found
    for name, trainer in trainers.items():
        trainer.load_state(load_file(folder / f"{name}.safetensors"))
    run.truncate(step)
    say(f"resuming at step {step}")
    return step, float(read_json(folder / "state.json")["seconds"])


# --- results ---------------------------------------------------------------------------------------------------------


def _metadata(config: TrainSaeConfig, loaded: Loaded, site: Site, length: int) -> dict[str, Any]:
    """What is written beside the weights: SAELens's keys, and under `saerl` what our checks need."""
    hook = TRANSFORMER_LENS_HOOKS.get(site.position, site.module)
    sae = {key: getattr(value, "value", value) for key, value in asdict(config.sae).items()}
    return {
        "model_name": loaded.name,
        "hook_name": hook.format(site.layer),
        "hf_hook_name": site.module,
        "hook_head_index": None,
        "context_size": length,
        "prepend_bos": True,
        "dataset_path": config.data.path or config.data.name or config.data.kind.value,
        "saerl": {
            "site": site.name,
            "module": site.module,
            "model_name": loaded.name,
            "model_sha256": loaded.sha256,
            "revision": loaded.revision,
            "training": sae,
        },
    }


def _evaluate(
    config: TrainSaeConfig,
    run: "Run",
    accelerator: "Accelerator",
    loaded: Loaded,
    sites: list[Site],
    trainers: "dict[str, SaeTrainer]",
    saes: "dict[str, SAE]",
    length: int,
    seconds: float,
) -> float:
    """Held-out metrics, SAE folders, summary.json; returns the mean FVU."""
    from saerl_cli.activations import special_ids, token_rows
    from saerl_cli.sae.metrics import evaluate_saes

    special = special_ids(loaded.tokenizer)
    for sae in saes.values():
        sae.to(accelerator.device)
    heldout = documents(config.data, config.model, "heldout")
    rows = _first_rows(token_rows(heldout, loaded.tokenizer, length), special, config.eval_tokens)
    say(f"evaluating on {rows.numel()} held-out tokens")
    share = rows[accelerator.process_index :: accelerator.num_processes]
    metrics = evaluate_saes(loaded.model, sites, saes, share, special, _sum_over_processes(accelerator))
    attributes = planted_attributes(config, loaded, sites, saes, length) if run.writes else {}
    tokens = config.sae.batch_size * next(iter(trainers.values())).steps
    summary, outputs = {}, {}
    for site in sites:
        numbers, sae = metrics[site.name], saes[site.name]
        firing_rate = numbers.pop("firing_rate")
        if run.writes:
            folder = save_sae(sae, run.path / "sae" / site.name, firing_rate)
            outputs[site.name] = {"path": f"sae/{site.name}", "sha256": sae_sha256(folder)}
        silent = trainers[site.name].firing.dead()
        summary[site.name] = {
            "site": site.name,
            "module": site.module,
            "trivial": site.trivial,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "architecture": config.sae.architecture.value,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "dead_fraction": float(silent.double().mean()),
            **numbers,
            **({"attributes": attributes[site.name]} if site.name in attributes else {}),
        }
    for name, numbers in summary.items():
        say(
            f"{name}: FVU {numbers['fvu']:.4f}, L0 {numbers['l0']:.1f}, loss {numbers['ce_base']:.3f} ->"
            f" {numbers['ce_spliced']:.3f} spliced, {numbers['ce_zero']:.3f} ablated"
            f" ({numbers['ce_recovered']:.1%} recovered), {numbers['dead_fraction']:.1%} dead"
        )
    mean_fvu = sum(numbers["fvu"] for numbers in summary.values()) / len(summary)
    run.update(outputs={"sae": outputs})
    run.summary({"saes": summary, "tokens": tokens, "seconds": seconds, "fvu_mean": mean_fvu})
    return mean_fvu


def _first_rows(rows: "Tensor", special: list[int], tokens: int) -> "Tensor":
    """As many rows from the start as hold `tokens` tokens of text, or all."""
    from saerl_cli.activations import text_mask

    before = text_mask(rows, special).sum(1).cumsum(0)
    return rows[: int((before < tokens).sum()) + 1]


def planted_attributes(
    config: TrainSaeConfig, loaded: Loaded, sites: list[Site], saes: "dict[str, SAE]", length: int
) -> dict[str, dict[str, dict[str, float]]]:
    """In the embedded world, how well each attribute has a feature of its own: site -> attribute -> scores.

    Empty for other text, whose tokens carry no labels.
    """
    import torch

    from saerl_cli.activations import capture, pack, special_ids, text_mask
    from saerl_cli.models import separator_id
    from saerl_cli.sae.metrics import attribute_scores
    from saerl_cli.world.language import ATTRIBUTES

    if config.data.kind is not DataKind.planted:
        return {}
    reviews = planted_reviews(config.data, config.model, "heldout")
    encoded = loaded.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    bit = {name: 1 << index for index, name in enumerate(ATTRIBUTES)}
    flags = [[sum(bit[name] for name in carried) for carried in review.labels] for review in reviews]
    if [len(ids) for ids in encoded] != [len(labels) for labels in flags]:
        raise RuntimeError("the embedded tokenizer and labels disagree about what a word is")
    special = special_ids(loaded.tokenizer)
    rows = _first_rows(pack(encoded, separator_id(loaded.tokenizer), length), special, config.eval_tokens)
    carried = pack(flags, 0, length)[: len(rows)]  # packed alike, so that labels lie where their tokens lie
    text = text_mask(rows, special)
    device = loaded.model.device
    found = {site.name: [] for site in sites}
    for ids, kept in zip(rows.to(device).split(64), text.to(device).split(64), strict=True):
        for name, x in capture(loaded.model, sites, ids).items():
            found[name].append(saes[name].encode(x[kept].float()).cpu())
    masks = torch.tensor([bit[name] for name in ATTRIBUTES])
    labels = (carried[text][:, None] & masks) != 0  # [n, attributes]
    return {name: attribute_scores(torch.cat(parts), labels, ATTRIBUTES) for name, parts in found.items()}
