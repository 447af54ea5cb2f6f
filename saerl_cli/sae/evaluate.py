"""What `saerl eval-sae` measures: SAEs of one model, each under the name of its folder, on the same held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saerl_cli.config import typed
from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig
from saerl_cli.config.sae import SaeConfig
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import Loaded, Site, resolve_sites
from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.run.progress import say
from saerl_cli.sae.files import CONFIG_FILE, check_sae, provenance, read_sae_config
from saerl_cli.sae.files.saelens import site_of

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

T = TypeVar("T")
PLACES = ("*", "sae/*", "*/sae/*")
"""Where SAE folders are in a folder of SAEs, a run of train-sae, a folder of such runs."""


# --- which SAEs, which model, which text -----------------------------------------------------------------------------


def list_saes(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Every SAE folder that the paths name, by the name of the folder, or as much of its path as tells them apart.

    Raises:
        ValueError: no such folder, or no SAE in one.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"no SAEs at {path}: no such folder")
        folders = [path, *sorted(child for place in PLACES for child in path.glob(place))]
        saes = [f for f in folders if (f / CONFIG_FILE).is_file() and not f.name.startswith(".")]
        if not saes:
            raise ValueError(
                f"no SAEs in {path}: expected a run directory of `saerl train-sae`, or folders with {CONFIG_FILE}"
            )
        found |= dict.fromkeys(saes)
    return named_apart(list(found))


def named_apart(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by the shortest end of their paths that differs for all; `sae` folders in it are left out."""
    parts = [[part for part in folder.absolute().parts if part != "sae"] for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    return {str(folder): folder for folder in folders}


def settings(config: EvalSaeConfig, folders: dict[str, Path]) -> tuple[ModelConfig, DataConfig]:
    """The model and the text: what the run of the first SAE records, changed by what is given.

    Raises:
        ValueError: neither records nor gives one, or what is given is no setting.
    """
    first = next(iter(folders.values()))
    recorded = {} if "kind" in config.model and "kind" in config.data else recorded_settings(first)
    return combined("model", config.model, recorded, ModelConfig), combined("data", config.data, recorded, DataConfig)


def combined(key: str, given: dict[str, Any], recorded: dict[str, Any], kind: type[T]) -> T:
    """Given settings alone where they choose a kind, else on top of the recorded ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if "kind" not in given and key not in recorded:
        raise ValueError(f"the SAEs are in no run directory that records their {key}; write {key}=…")
    parts = [given] if "kind" in given else [recorded[key], given]
    try:
        return typed(OmegaConf.merge(*map(OmegaConf.create, parts)), kind)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from None


def recorded_settings(sae: Path) -> dict[str, Any]:
    """The config of the run directory that an SAE folder is in; empty outside of one."""
    from omegaconf import OmegaConf

    settings = (Run(run).settings for run in list(sae.absolute().parents)[:2])
    return dict(OmegaConf.to_container(next(filter(None, settings), OmegaConf.create())))  # type: ignore[arg-type]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_place(folder: Path, description: Any, sha256: str | None) -> None:
    """Refuse an SAE of another model, or of a site that the model lacks."""
    config = read_sae_config(folder)
    record, site_name = provenance(config), site_of(config) or folder.name
    try:
        sites = [resolve_sites([name], description)[0] for name in (site_name, record.get("target") or site_name)]
    except ValueError as error:
        raise ValueError(f"the SAE {folder} belongs to a site that the model lacks: {error}") from None
    check_sae(folder, model_sha256=sha256, width=sites[0].width)
    if config.get("d_out", sites[1].width) != sites[1].width:
        raise ValueError(f"the transcoder {folder} has d_out={config['d_out']}, but {sites[1].name} {sites[1].width}")
    if record.get("module", sites[0].module) != sites[0].module:
        raise ValueError(
            f"the SAE {folder} was trained at {record['module']}, but {site_name} of this model is {sites[0].module}"
        )


def control_settings(config: dict[str, Any], tokens: int) -> SaeConfig | None:
    """The settings that a `cfg.json` records for an SAE's training, but with so many tokens and a start from scratch.

    None for an SAE that another tool trained.

    Raises:
        ValueError: the record cannot be read, or `tokens` is less than a batch.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    record = provenance(config)
    if "training" not in record:
        return None
    try:
        settings = typed(OmegaConf.create(dict(record["training"])), SaeConfig)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"cannot train controls for the SAE of {record.get('site')}: {line}") from None
    if tokens < settings.batch_size:
        raise ValueError(f"control_tokens={tokens} is less than one batch of {settings.batch_size} tokens; raise it")
    return replace(settings, tokens=tokens, init_from=None)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class SaeResults:
    """All that is known of some SAEs, as plain data but for the firing rates."""

    saes: dict[str, dict[str, Any]]
    """Name of the SAE's folder -> what it is and its metrics."""
    controls: dict[str, dict[str, Any]]
    """NAME/CONTROL -> the same."""
    stability: list[dict[str, Any]]
    """Every two SAEs of a site."""
    probes: dict[str, Any]
    """How well features tell labels; empty where nothing is labelled."""
    inputs: dict[str, Any]
    """The model and the SAEs by hash."""
    firing_rates: "dict[str, Tensor]" = field(default_factory=dict)
    """Share of the held-out tokens on which each feature fires, [d_sae] by name."""


def measure_saes(config: EvalSaeConfig, device: Any, group: ProcessGroup = ONE_PROCESS) -> SaeResults:
    """Load the model and its SAEs and measure them.

    Args:
        config: what to measure.
        device: where.
        group: the processes that share the held-out text. Stability and probes are left to the first of them.

    Raises:
        ValueError: what `check` could not see without loading the model.
    """
    from saerl_cli.activations import special_ids, token_rows
    from saerl_cli.models import load_model
    from saerl_cli.sae.files import load_sae, sae_sha256
    from saerl_cli.sae.metrics import evaluate_saes, first_rows, shared_rows
    from saerl_cli.sae.stability import stability

    folders = list_saes(config.paths())
    model, data = settings(config, folders)
    loaded = load_model(model, device, config.launch)
    for folder in folders.values():
        check_sae(folder, model_sha256=loaded.sha256)
    saes = {name: load_sae(folder).to(device) for name, folder in folders.items()}
    names = {site for sae in saes.values() for site in (sae.site, sae.target) if site is not None}
    sites = resolve_sites(sorted(names), loaded.model)
    length = row_length(data, loaded.context_size)
    special = special_ids(loaded.tokenizer)
    rows = token_rows(documents(data, model, "heldout"), loaded.tokenizer, length)
    rows = first_rows(rows, special, config.eval_tokens)
    say(f"measuring {len(saes)} SAEs on {rows.numel()} held-out tokens")
    own = shared_rows(rows, group)
    metrics = evaluate_saes(loaded.model, sites, saes, own, special, group.all_reduce)
    rates = {name: numbers.pop("firing_rate").float().cpu() for name, numbers in metrics.items()}
    controls = {}
    if config.controls:
        train = token_rows(documents(data, model, "train"), loaded.tokenizer, length)
        controls = measured_controls(config, loaded.model, saes, sites, train, own, special, group)
    first = group.rank == 0
    probed = probes(config, model, data, loaded, sites, saes, length) if first else {}
    shards.barrier()
    return SaeResults(
        saes={name: described(saes[name], sites) | metrics[name] for name in saes},
        controls=controls,
        stability=stability(saes, config.seed) if first else [],
        probes=probed,
        inputs={
            "model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256},
            "sae": {name: {"path": str(path), "sha256": sae_sha256(path)} for name, path in folders.items()},
        },
        firing_rates=rates,
    )


def measured_controls(
    config: EvalSaeConfig,
    model: Any,
    saes: "dict[str, SAE]",
    sites: list[Site],
    train: "Tensor",
    rows: "Tensor",
    special: Sequence[int],
    group: ProcessGroup = ONE_PROCESS,
) -> dict[str, dict[str, Any]]:
    """The metrics of `saerl_cli.sae.controls`, by NAME/CONTROL.

    Args:
        config: how many tokens, and the seed.
        model: the language model.
        saes: by name.
        sites: of the SAEs.
        train: training text as token ids, [rows, context_size].
        rows: held-out text, this process's.
        special: token ids to leave out.
        group: the processes. All make the controls, and measure the first one's.
    """
    from saerl_cli.sae import controls as make
    from saerl_cli.sae.metrics import evaluate_saes, place

    by_name = {site.name: site for site in sites}
    places = {name: place(name, sae, sites, model) for name, sae in saes.items()}
    shuffled = make.shuffled_model(model, config.seed)
    settings = {name: control_settings({"metadata": sae.metadata}, config.control_tokens) for name, sae in saes.items()}
    known = {name: recorded for name, recorded in settings.items() if recorded is not None}
    if known:
        say(f"training controls for {len(known)} SAEs, on the model and on it with shuffled weights")
    trained = (saes, known, places, train, special, config.seed)
    moved, others = make.elsewhere(saes, places, model)
    kinds = {
        "real": (model, make.trained_alike(model, *trained)),
        "shuffled": (shuffled, make.trained_alike(shuffled, *trained)),
        "random": (model, make.random_directions(model, saes, by_name, train, special, config.seed)),
        "wrong_layer": (model, moved),
    }
    there = list((by_name | {site.name: site for site in others}).values())
    found = {}
    for kind, (network, made) in kinds.items():
        for sae in made.values():
            group.broadcast_tensors(list(sae.state_dict().values()))
        numbers = evaluate_saes(network, there, made, rows, special, group.all_reduce) if made else {}
        for name in made:
            what = {"control": kind, "of": name} | described(made[name], there)
            del numbers[name]["firing_rate"]
            if kind != "random":  # which has a form of its own
                what["architecture"] = saes_architecture(saes[name])
            found[f"{name}/{kind}"] = what | numbers[name]
    return {f"{name}/{kind}": found[f"{name}/{kind}"] for name in saes for kind in kinds if f"{name}/{kind}" in found}


def probes(
    config: EvalSaeConfig,
    model: ModelConfig,
    data: DataConfig,
    loaded: Loaded,
    sites: list[Site],
    saes: "dict[str, SAE]",
    length: int,
) -> dict[str, Any]:
    """Sparse probing of a labelled file, else of the planted language; nothing for other text."""
    from saerl_cli.sae.probe import labelled_examples, planted_examples, probe

    if config.probes is not None:
        examples = labelled_examples(config.probes, loaded, length, config.seed)
    elif data.kind is DataKind.planted:
        examples = planted_examples(data, model, loaded, length, config.probe_tokens)
    else:
        return {}
    read = {sae.site for sae in saes.values()}
    return probe(loaded, [site for site in sites if site.name in read], saes, examples)


def described(sae: "SAE", sites: Sequence[Site]) -> dict[str, Any]:
    """What an SAE is, for the first columns of a table."""
    site = next(site for site in sites if site.name == sae.site)
    return {
        "site": site.name,
        "target": sae.target or site.name,
        "trivial": site.trivial,
        "architecture": saes_architecture(sae),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
    }


def saes_architecture(sae: "SAE") -> str:
    """What an SAE was trained as, where that is recorded: BatchTopK and Gated SAEs are saved as JumpReLU."""
    training = (sae.metadata.get("saerl") or {}).get("training") or {}
    return str(training.get("architecture", sae.architecture))
