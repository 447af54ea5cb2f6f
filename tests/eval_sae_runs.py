"""Run directories of train-sae as eval-sae finds them, made in a second."""

from dataclasses import asdict
from pathlib import Path

from conftest import TINY_PLANTED

from saerl_cli.activations import activation_batches
from saerl_cli.config.groups import DataConfig, ModelConfig, PlantedConfig
from saerl_cli.config.sae import SaeConfig
from saerl_cli.data.documents import documents
from saerl_cli.models import Loaded, load_model, resolve_sites
from saerl_cli.run.files import write_json
from saerl_cli.sae.files import save_sae
from saerl_cli.sae.loop import train_saes

MODEL = ModelConfig(planted=PlantedConfig(**TINY_PLANTED))
SETTINGS = SaeConfig(k=4, expansion=4, tokens=20_000, batch_size=256, lr=5e-3)
_loaded: list[Loaded] = []


def tiny_model() -> Loaded:
    """The tiny planted model, loaded once."""
    if not _loaded:
        _loaded.append(load_model(MODEL))
    return _loaded[0]


def make_run(folder: Path, settings: dict[str, SaeConfig], site: str = "mlp_out.1") -> Path:
    """Train SAEs of one site and save them as `saerl train-sae` does, a folder a name of `settings`."""
    loaded = tiny_model()
    (place,) = resolve_sites([site], loaded.model)
    texts = documents(DataConfig(), MODEL, "train")
    batches = activation_batches(loaded, texts, [site], 256, context_size=64, buffer_tokens=4096)
    saes = train_saes(({name: batch[site] for name in settings} for batch in batches), settings)
    for name, sae in saes.items():
        sae.site = site
        sae.metadata = {
            "saerl": {
                "site": site,
                "module": place.module,
                "model_name": "planted",
                "model_sha256": loaded.sha256,
                "training": {key: getattr(v, "value", v) for key, v in asdict(settings[name]).items()},
            }
        }
        save_sae(sae, folder / "sae" / name)
    record(folder)
    return folder


def record(folder: Path, **changes: object) -> None:
    """Write the config from which model and text are known."""
    planted = "\n".join(f"    {key}: {value}" for key, value in (TINY_PLANTED | changes).items())
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(
        f"model:\n  kind: planted\n  planted:\n{planted}\ndata:\n  kind: planted\n"
    )
    write_json(folder / "run.json", {"job": "train_sae", "status": "completed"})
