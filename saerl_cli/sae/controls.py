"""What an SAE's numbers are worth: the same numbers of things that can mean nothing.

real         an SAE of the same settings on the same model, trained on few tokens: what `shuffled` is held against
shuffled     the same on the model with its weights shuffled, which says nothing (Heap et al. 2025)
random       random directions, read with their transpose; as many features fire as in the SAE
wrong_layer  the SAE itself at another layer of the same position (Newhouse and Bashkansky 2023)
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saerl_cli.activations import ActivationStream, capture, text_mask
from saerl_cli.config.sae import SaeConfig
from saerl_cli.models import Site, aliases
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.loop import training
from saerl_cli.sae.metrics import first_rows
from saerl_cli.sae.train import SaeTrainer

if TYPE_CHECKING:
    from saerl_cli.sae.metrics import Place

SAMPLE_TOKENS = 4096
"""Tokens from which random directions take their centre and their thresholds."""


# --- trained controls ------------------------------------------------------------------------------------------------


@torch.no_grad()
def shuffled_model(model: Any, seed: int) -> Any:
    """A copy of a model in which the entries of every parameter, embeddings too, are permuted.

    Each parameter keeps the distribution of its entries, and with it the scale of activations; what the model learned
    is gone.
    """
    shuffled = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in shuffled.parameters():  # tied ones come once
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def trained_alike(
    model: Any,
    saes: Mapping[str, SAE],
    settings: Mapping[str, SaeConfig],
    places: Mapping[str, "Place"],
    rows: Tensor,
    special: Sequence[int],
    seed: int,
) -> dict[str, SAE]:
    """Other SAEs at the places of `saes`, trained on a model's activations.

    Args:
        model: its activations are learned from; that of the SAEs, or a shuffled one.
        saes: by any name.
        settings: by the same names, of those to be trained.
        places: by the same names.
        rows: training text as token ids, [rows, context_size].
        special: token ids to leave out.
        seed: of the order of text.
    """
    by_batch: dict[int, list[str]] = {}
    for name, config in settings.items():
        by_batch.setdefault(config.batch_size, []).append(name)
    device = model.get_input_embeddings().weight.device
    found = {}
    for batch_size, names in by_batch.items():
        sites = list({site.name: site for name in names for site in places[name]}.values())
        stream = ActivationStream(model, rows, sites, special, batch_size, max(65_536, batch_size), seed)
        trainers, ends = {}, {}
        for name in names:
            source, target = places[name]
            predicts = saes[name].transcoder
            d_out = target.width if predicts else None
            trainers[name] = SaeTrainer(source.width, settings[name], device, name=name, d_out=d_out)
            ends[name] = (source.name, target.name if predicts else None)
        for _ in training(stream, trainers, log_every=10**9, places=ends):
            pass
        found |= {name: trainer.finish() for name, trainer in trainers.items()}
    for name, sae in found.items():
        sae.site, sae.target = saes[name].site, saes[name].target
    return found


# --- untrained controls ----------------------------------------------------------------------------------------------


def random_directions(
    model: Any, saes: Mapping[str, SAE], sites: Mapping[str, Site], rows: Tensor, special: Sequence[int], seed: int
) -> dict[str, SAE]:
    """For every autoencoder one of the same width whose directions are random, centred on the mean activation.

    A topk SAE keeps its k; any other is given one threshold at which as many features fire as in the SAE. Both, and
    the mean, are taken from the training text `rows`, [rows, context_size].
    """
    rows = first_rows(rows, special, SAMPLE_TOKENS).to(model.get_input_embeddings().weight.device)
    text = text_mask(rows, special)
    captured = capture(model, list(sites.values()), rows)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, sae in saes.items():
        if not sae.transcoder:
            found[name] = random_like(sae, captured[str(sae.site)][text].float(), generator)
    return found


@torch.no_grad()
def random_like(sae: SAE, x: Tensor, generator: torch.Generator) -> SAE:
    """Random directions in the form of `sae`, for activations like x [n, d_in]."""
    random = SAE(sae.d_in, sae.d_sae, "jumprelu" if sae.k is None else "topk", sae.k).to(x.device)
    random.site = sae.site
    random.W_dec.copy_(normalize(torch.randn(sae.d_sae, sae.d_in, generator=generator), dim=-1))
    random.W_enc.copy_(random.W_dec.T)
    random.b_dec.copy_(x.mean(0))
    if random.threshold is not None:
        fires = int((sae.encode(x) != 0).sum())
        pre = random.pre_activations(x).flatten()
        # The largest that stays silent, so that exactly those above it fire.
        threshold = pre.topk(min(fires + 1, len(pre))).values[-1]
        random.threshold.fill_(max(float(threshold), 0.0))
    # Directions that overlap add up to too much. The least-squares scale makes the control as good as it can be.
    written = (random(x) - random.b_dec).double()
    scale = float((written * (x - random.b_dec)).sum() / written.square().sum().clamp_min(1e-30))
    random.W_enc.mul_(scale)
    if random.threshold is not None:
        random.threshold.mul_(scale)
    return random


def elsewhere(saes: Mapping[str, SAE], places: Mapping[str, "Place"], model: Any) -> tuple[dict[str, SAE], list[Site]]:
    """Every SAE at the layer farthest from its own, where the model has one, and the sites that they are put at."""
    moved, sites = {}, {}
    for name, sae in saes.items():
        other = farthest(places[name], model)
        if other is not None:
            moved[name] = copy.copy(sae)  # the weights are shared
            moved[name].site = other[0].name
            moved[name].target = other[1].name if sae.target is not None else None
            sites |= {site.name: site for site in other}
    return moved, list(sites.values())


def farthest(place: "Place", model: Any) -> "Place | None":
    """The same positions at the layer farthest from `place`, the later one of two; trivial sites are no candidates."""
    source, target = place
    if source.layer is None or target.layer is None:
        return None
    known = aliases(model.config)
    best = None
    for site in known.values():
        if site.position != source.position or site.layer is None or site.layer == source.layer or site.trivial:
            continue
        end = known.get(f"{target.position}.{site.layer + target.layer - source.layer}")
        if end is None or end.trivial or (site.width, end.width) != (source.width, target.width):
            continue
        if best is None or abs(site.layer - source.layer) >= abs((best[0].layer or 0) - source.layer):
            best = site, end
    return best
