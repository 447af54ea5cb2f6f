"""Language models: where they are, how they are loaded, the places in them that have a name, and their hashes.

`describe`, `light_tokenizer` and `resolve_sites` on a description run in the checks before a run and import no torch.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import LaunchConfig, ModelConfig, ModelKind
from saerl_cli.run import shards
from saerl_cli.run.files import read_json, sha256_file
from saerl_cli.run.progress import say

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

INSTEAD = "without a network, model=planted and model=local model.path=DIR work"
SNAPSHOT = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]  # never pickles, never Python files
HASH_UP_TO = 2**31
"""Bytes of weights that are hashed before a run; larger ones are compared when they are loaded."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")

# Position -> module of layer L. The hidden layer of a gated MLP is no module's output, so Llamas have no mlp_hidden.
# mlp_in is the normalised stream that the MLP reads: the input side of a transcoder.
NEOX = {
    "mlp_out": "gpt_neox.layers.{}.mlp",
    "mlp_hidden": "gpt_neox.layers.{}.mlp.act",
    "attn_out": "gpt_neox.layers.{}.attention",
    "resid_post": "gpt_neox.layers.{}",
    "mlp_in": "gpt_neox.layers.{}.post_attention_layernorm",
}
LLAMA = {
    "mlp_out": "model.layers.{}.mlp",
    "attn_out": "model.layers.{}.self_attn",
    "resid_post": "model.layers.{}",
    "mlp_in": "model.layers.{}.post_attention_layernorm",
}
LLAMA_OTHER_NORMS = {position: module for position, module in LLAMA.items() if position != "mlp_in"}
FAMILIES = (
    {"gpt_neox": NEOX}
    | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "phi3", "smollm3"), LLAMA)
    | dict.fromkeys(("gemma2", "olmo2", "stablelm"), LLAMA_OTHER_NORMS)
)


@dataclass(frozen=True)
class Loaded:
    """A frozen language model and its tokenizer."""

    model: Any
    """`PreTrainedModel`: eval mode, no gradients."""
    tokenizer: Any
    """`PreTrainedTokenizerFast`: pads on the left, has a pad token."""
    name: str
    """`planted`, a Hub id, or a folder."""
    revision: str | None
    """Commit of a Hub model."""
    sha256: str
    """Hash of the weight files."""
    context_size: int
    """Longest sequence in tokens."""
    folder: Path
    """Where the files are."""


@dataclass(frozen=True)
class Site:
    """A place in a model where activations are read and coefficients act: the output of a module."""

    name: str
    """`mlp_out.3`, or the module's path where it has no alias."""
    module: str
    """Path of the module whose output it is."""
    layer: int | None
    """Layer of an alias."""
    position: str
    """`mlp_in`, `mlp_out`, `mlp_hidden`, `attn_out`, `resid_post`, or `module`."""
    width: int
    """Dimensions of the output."""
    trivial: bool = False
    """It sees the current token alone (parallel residual, first layer): an SAE there is no evidence."""


# --- where a model is ------------------------------------------------------------------------------------------------


def locate(config: ModelConfig) -> Path:
    """Folder with config.json, safetensors weights and a tokenizer; trains or downloads what is missing.

    Raises:
        ValueError: no such folder or Hub model, no network, or files that are missing.
    """
    if config.kind is ModelKind.planted:
        from saerl_cli.planted.cache import planted_model

        return planted_model(config.planted)
    if config.kind is ModelKind.hub:
        folder = _hub_folder(config, SNAPSHOT)
        _require_files(folder, f"the Hub model {config.name}")
        return folder
    folder = Path(config.path or "")
    if not folder.is_dir():
        raise ValueError(f"no model at model.path={folder}: no such folder")
    _require_files(folder, f"the model folder {folder}")
    return folder


def describe(config: ModelConfig) -> SimpleNamespace:
    """The keys of a model's config.json as attributes, without its weights and without importing torch.

    Raises:
        ValueError: as `locate`, and a tokenizer that does not belong to the model.
    """
    if config.kind is ModelKind.planted:
        from saerl_cli.planted.cache import planted_shape

        return SimpleNamespace(**{"model_type": "gpt_neox", **planted_shape(config.planted)})
    folder = _hub_folder(config, ["*.json"]) if config.kind is ModelKind.hub else locate(config)
    try:
        description = read_json(folder / "config.json")
        model_type = description["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is missing or malformed ({error!r})") from None
    if "auto_map" in description and model_type not in FAMILIES:
        raise ValueError(f"the model in {folder} needs remote code, which is never run")
    tokenizer = light_tokenizer(folder)
    if tokenizer is not None:
        _check_agreement(tokenizer.get_vocab_size(), description.get("vocab_size"), str(folder))
    return SimpleNamespace(**description)


def light_tokenizer(folder: Path) -> "Tokenizer | None":
    """The fast tokenizer of a folder without transformers and torch; None where it has another form.

    Raises:
        ValueError: tokenizer.json is malformed.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path} is no tokenizer ({error})") from None


def light_encoder(model: ModelConfig) -> Callable[[str], list[int]] | None:
    """Find text to token ids without special tokens; None where only transformers can read the tokenizer."""
    if model.kind is ModelKind.planted:
        from saerl_cli.planted.language import VOCABULARY, split_words

        ids = {word: index for index, word in enumerate(VOCABULARY)}
        return lambda text: [ids.get(word, -1) for word in split_words(text)]
    tokenizer = light_tokenizer(locate(model))
    return None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _require_files(folder: Path, what: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what} has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise ValueError(f"{what} has no safetensors weights{' (pickled weights are never loaded)' if pickled else ''}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{what} has no tokenizer (tokenizer.json)")


def _hub_folder(config: ModelConfig, patterns: list[str]) -> Path:
    """Snapshot of a Hub model; from the local cache when the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = config.name or ""
    commit, reason = config.revision, "offline mode"
    offline = False
    try:  # one request without the long retries of a download; it also turns a branch into a commit
        commit = HfApi().model_info(name, revision=config.revision, timeout=20).sha
    except HFValidationError:
        raise ValueError(f"model.name={name} is no Hub id; write OWNER/MODEL") from None
    except GatedRepoError:
        raise ValueError(f"the Hub model {name} is gated: accept its terms and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise ValueError(f"the Hub model {name} has no revision {config.revision}") from None
    except RepositoryNotFoundError:
        raise ValueError(f"there is no model {name} on the Hub (or it is private)") from None
    except Exception as error:  # every kind of network failure, and offline mode
        offline, reason = True, type(error).__name__
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError:
        at = f" at {config.revision}" if config.revision else ""
        raise ValueError(f"cannot reach the Hub ({reason}) and {name}{at} is not in its cache; {INSTEAD}") from None


# --- loading ---------------------------------------------------------------------------------------------------------


def load_model(
    config: ModelConfig, device: "torch.device | str | None" = None, launch: LaunchConfig | None = None
) -> Loaded:
    """Load a causal language model, frozen, with its tokenizer.

    Args:
        config: which.
        device: where to put it.
        launch: of the job, whose processes may split the model (`saerl_cli.run.shards`); each reads its part alone.

    Raises:
        ValueError: what `locate` refuses, weights that do not fill the model, a tokenizer of another model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = locate(config)
    split = {} if launch is None or launch.shards == 1 else {"distributed_config": {"fsdp_size": launch.shards}}
    name = {ModelKind.planted: "planted", ModelKind.hub: config.name, ModelKind.local: str(folder)}[config.kind]
    try:
        with quiet_transformers():
            result: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype.value),
                output_loading_info=True,
                local_files_only=True,
                **split,
            )
            model, info = result
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load the model in {folder}: {_first_line(error)}") from None
    if info["missing_keys"] or info["mismatched_keys"]:
        absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"the weights in {folder} do not fill the model: {absent[0]} and {len(absent) - 1} more differ"
        )
    tokenizer = load_tokenizer(folder)
    rows = model.get_input_embeddings().num_embeddings
    _check_agreement(len(tokenizer), rows, str(folder))
    model.requires_grad_(False).eval()
    if launch is not None and split:
        shards.join(model, launch.gather_for_sampling)
    elif device is not None:
        model.to(device)
    commit = folder.name if config.kind is ModelKind.hub else None
    loaded = Loaded(model, tokenizer, str(name), commit, folder_sha256(folder), context_size(model.config), folder)
    model.generation_config.eos_token_id = eos_token_ids(loaded)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return loaded


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; pads on the left, so that prompts of several lengths end at the same place.

    Raises:
        ValueError: it cannot be read, or has neither a pad nor an eos token.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    except Exception as error:  # anything from a missing class to a parser's bare exception
        raise ValueError(f"cannot load the tokenizer in {folder}: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        # Pythia's own pad token where there is one: with pad = eos a mask by id would hide every end of text.
        pad = "<|padding|>" if "<|padding|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if pad is None:
            raise ValueError(f"the tokenizer in {folder} has neither a pad nor an eos token; set pad_token in it")
        tokenizer.pad_token = pad
        say(f"the tokenizer has no pad token; padding with {pad!r}")
    return tokenizer


def eos_token_ids(loaded: Loaded) -> list[int]:
    """Ids that end a text: the generation config's, the tokenizer's eos, and bos, with which the next text begins.

    Story models trained on a stream separated by `<s>` end a text with their bos and never write their eos.
    """
    given = loaded.model.generation_config.eos_token_id
    ids = {
        *(given if isinstance(given, list) else [given]),
        loaded.tokenizer.eos_token_id,
        loaded.tokenizer.bos_token_id,
    }
    return sorted(int(i) for i in ids if i is not None)


def separator_id(tokenizer: Any) -> int:
    """The token between packed documents: the one that the tokenizer itself puts in front of a text, else eos.

    Raises:
        ValueError: there is neither.
    """
    encoded = tokenizer("a")["input_ids"]
    if encoded and encoded[0] == tokenizer.bos_token_id:
        return int(encoded[0])
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no token that separates documents (neither a leading bos nor an eos)")
    return int(tokenizer.eos_token_id)


def context_size(config: Any) -> int:
    """Longest sequence a model accepts, in tokens; 1024 where its config does not say."""
    return int(next((value for key in CONTEXT_KEYS if (value := getattr(config, key, None))), 1024))


def _check_agreement(entries: int, rows: int | None, where: str) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for."""
    if rows is not None and entries > rows:
        raise ValueError(
            f"{where}: the tokenizer has {entries} entries but the model embeds {rows} tokens; they disagree"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports: what matters in them is checked and raised."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- sites -----------------------------------------------------------------------------------------------------------


def aliases(config: Any) -> dict[str, Site]:
    """All named sites of a model, by layer and then position; empty for an architecture without aliases."""
    modules = FAMILIES.get(config.model_type, {})
    parallel = config.model_type == "gpt_neox" and getattr(config, "use_parallel_residual", True)
    sites = {}
    for layer in range(config.num_hidden_layers if modules else 0):
        for position, module in modules.items():
            width = config.intermediate_size if position == "mlp_hidden" else config.hidden_size
            trivial = parallel and layer == 0 and position.startswith("mlp")
            name = f"{position}.{layer}"
            sites[name] = Site(name, module.format(layer), layer, position, width, trivial)
    return sites


def layer_list(model: Any) -> Any:
    """The `ModuleList` of a model's blocks; None for an architecture without aliases."""
    resid_post = FAMILIES.get(model.config.model_type, {}).get("resid_post")
    return resid_post and model.get_submodule(resid_post.removesuffix(".{}"))


def resolve_sites(names: Sequence[str], model: Any) -> list[Site]:
    """Sites for aliases, globs of aliases, and module paths, each once, in the order given.

    Args:
        names: for instance `mlp_out.3`, `mlp_out.*`, `gpt_neox.layers.1.mlp`.
        model: a model, its config, or its `describe`. A path without an alias is looked up in the module tree, which
            for a config is built without weights.

    Raises:
        ValueError: a name that the model lacks, saying which there are.
    """
    config = getattr(model, "config", model)
    known = aliases(config)
    by_module = {site.module: site for site in known.values()}
    found: dict[str, Site] = {}
    for name in names:
        if name in known or name in by_module:
            sites = [known.get(name) or by_module[name]]
        elif any(character in name for character in "*?["):
            sites = [site for site in known.values() if fnmatchcase(site.name, name)]
            if not sites:
                raise ValueError(f"no site matches {name!r}; this model has {_ranges(config)}")
        elif "." in name and name.split(".")[0] not in NEOX:
            sites = [_module_site(name, model)]
        else:
            raise ValueError(_no_site(name, config))
        found |= {site.module: site for site in sites}
    return list(found.values())


def _ranges(config: Any) -> str:
    modules, last = FAMILIES.get(config.model_type, {}), getattr(config, "num_hidden_layers", 1) - 1
    if not modules:
        return f"no aliases (architecture {config.model_type}): name modules by their path"
    return ", ".join(f"{position}.0 … {position}.{last}" if last else f"{position}.0" for position in modules)


def _no_site(name: str, config: Any) -> str:
    position, _, layer = name.partition(".")
    if position in FAMILIES.get(config.model_type, {}) and layer.isdigit():
        last = config.num_hidden_layers - 1
        return f"site {name}: layer {layer} is out of range, this model has {position}.0 … {position}.{last}"
    return f"unknown site {name!r}; this model has {_ranges(config)}, or a module's path"


def _module_site(path: str, model: Any) -> Site:
    """A site given by module path; its width is that of the module's output in a forward pass."""
    import torch

    network: Any = model if isinstance(model, torch.nn.Module) else without_weights(model)
    modules = dict(network.named_modules())
    if path not in modules:
        near = sorted(name for name in modules if name.rpartition(".")[2] == path.rpartition(".")[2])[:3]
        raise ValueError(f"the model has no module {path!r}{'; there is ' + ', '.join(near) if near else ''}")
    shapes: list[tuple[int, ...]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        shapes.append(getattr(output_tensor(output), "shape", ()))

    hook = modules[path].register_forward_hook(keep)
    try:
        with torch.no_grad():
            embedding = network.get_input_embeddings().weight  # [vocabulary, width]
            # Embeddings, not ids: some models compare ids with the pad token, which the meta device cannot.
            network(inputs_embeds=embedding.new_zeros(1, 2, embedding.shape[1]))
    finally:
        hook.remove()
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][:2] != (1, 2):
        raise ValueError(f"module {path!r} does not put out one vector a token, so it cannot be a site")
    return Site(path, path, None, "module", shapes[0][-1])


def without_weights(description: Any) -> Any:
    """The module tree of a config on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    config = description
    if not isinstance(config, PretrainedConfig):
        config = AutoConfig.for_model(**vars(description))
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config).eval()


def output_tensor(output: Any) -> "Tensor":
    """The hidden states in a module's output, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


# --- hashes ----------------------------------------------------------------------------------------------------------


def known_sha256(model: ModelConfig) -> str | None:
    """Hash of the model's weights where it can be had at once, else None: it is compared at loading then."""
    if model.kind is ModelKind.planted:
        from saerl_cli.planted.cache import planted_folder

        folder = planted_folder(model.planted)
    else:
        folder = locate(model) if model.kind is ModelKind.local else None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
    return folder_sha256(folder) if folder and 0 < size <= HASH_UP_TO else None


def folder_sha256(folder: Path) -> str:
    """Hash of a folder's safetensors weights: the hash of the files' hashes, in order of name."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def tensors_sha256(named: "Iterable[tuple[str, Tensor]]") -> str:
    """Hash of tensors in memory: names, dtypes, shapes and bytes, in order of name; equal on every device."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
