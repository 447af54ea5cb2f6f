"""What `saerl rlhf` refuses before any work, without importing torch."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open

from saerl_cli.activations import documents
from saerl_cli.config.adapter import COEFFICIENTS, SITES, VECTORS, AdapterConfig, AdapterKind, refuse_top_k
from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.groups import DataKind, Dtype, ModelConfig, ModelKind
from saerl_cli.config.rlhf import PromptKind, RlhfConfig
from saerl_cli.data.prompts import cut_prompts, refuse_too_few
from saerl_cli.models import Site, context_size, describe, known_sha256, light_tokenizer, locate, resolve_sites
from saerl_cli.planted.cache import planted_folder
from saerl_cli.rewards.check import check_reward
from saerl_cli.rl.chosen import free_features
from saerl_cli.rl.prompts import check_answers, check_questions, refuse_few_questions
from saerl_cli.sae.files import check_sae, find_saes, provenance, read_sae_config, refuse_transcoder


def check(config: RlhfConfig) -> None:
    """Refuse a run that cannot work.

    Raises:
        ValueError: one line saying what is wrong and what to write instead.
    """
    check_reward(config.reward)
    description = describe(config.model)
    if config.adapter.kind is AdapterKind.full and config.model.dtype is not Dtype.float32:
        raise ValueError(
            f"adapter=full trains the weights, which model.dtype={config.model.dtype.value} rounds away; write"
            " model.dtype=float32 launch.mixed_precision=bf16"
        )
    check_adapter(config.adapter, config.model, description)
    check_answers(config)
    check_prompts(config, description)
    check_examples(config)


def check_adapter(adapter: AdapterConfig, model: ModelConfig, description: Any) -> None:
    """Refuse an adapter that this model has no place for.

    Raises:
        ValueError: SAEs, sites, features, layers or biases that are not there.
    """
    if adapter.kind in COEFFICIENTS and adapter.saes:
        sizes = {site: read_sae_config(path)["d_sae"] for site, path in check_saes(adapter, model, description).items()}
        check_features(adapter, sizes)
    elif adapter.kind is AdapterKind.random_dictionary:
        sites = resolve_sites(adapter.sites or [], description)
        if (adapter.k or 0) > (adapter.d_sae or 0):
            raise ValueError(f"adapter.k={adapter.k} directions cannot fire of adapter.d_sae={adapter.d_sae}; lower it")
        check_features(adapter, {site.name: adapter.d_sae or 0 for site in sites})
    elif adapter.kind in VECTORS:
        resolve_sites(adapter.sites or SITES[adapter.kind], description)
    elif (names := weight_names(model)) is not None:
        check_layers(adapter, names, description.model_type)


def check_features(adapter: AdapterConfig, sizes: Mapping[str, int]) -> None:
    """Refuse features that are not there, and more coefficients to keep than there are."""
    free = free_features(adapter, sizes)
    refuse_top_k(adapter.sparsity, sum(map(len, free.values())) if free else sum(sizes.values()))


def check_layers(adapter: AdapterConfig, names: set[str], model_type: str) -> None:
    """Refuse an adapter of layers (lora, ia3, bias_only) for which the weights called `names` have no place."""
    if adapter.kind is AdapterKind.bias_only and not any(name.endswith(".bias") for name in names):
        raise ValueError(
            f"this model ({model_type}) has no biases, so adapter=bias_only has nothing to train;"
            " adapter=steering_vector adds one vector a layer"
        )
    layers = sorted({name.split(".")[-2] for name in names if name.endswith(".weight") and name.count(".") > 1})
    for target in adapter.targets or []:
        if target not in layers:
            raise ValueError(
                f"adapter.targets: no layer of this model is called {target}; there are {', '.join(layers)}"
            )


def weight_names(model: ModelConfig) -> set[str] | None:
    """Names of a model's weights where they can be had at once; None where loading will tell."""
    folder = planted_folder(model.planted) if model.kind is ModelKind.planted else None
    if model.kind is ModelKind.local:
        folder = locate(model)
    names: set[str] = set()
    for file in folder.glob("*.safetensors") if folder else ():
        with safe_open(file, framework="numpy") as tensors:
            names.update(tensors.keys())
    return names or None


def check_saes(adapter: AdapterConfig, model: ModelConfig, description: Any) -> dict[str, Path]:
    """The SAE folders to use, by site name, each fit for this model.

    Raises:
        ValueError: no SAEs, a site without one, or an SAE of another width, site or model.
    """
    saes = chosen_saes(adapter)
    sha256 = known_sha256(model)
    for name, folder in saes.items():
        (site,) = resolve_sites([name], description)
        config = check_sae(folder, model_sha256=sha256, width=site.width)
        refuse_transcoder(config, folder, site.name)
        check_module(site, folder, provenance(config).get("module"))
    return saes


def check_module(site: Site, folder: Path, module: str | None) -> None:
    """Refuse an SAE whose record names another module than its site is in this model."""
    if module not in (None, site.module):
        raise ValueError(f"the SAE {folder} was trained at {module}, but {site.name} of this model is {site.module}")


def chosen_saes(adapter: AdapterConfig) -> dict[str, Path]:
    """Site -> folder of the SAEs that the settings name."""
    saes = find_saes(adapter.saes or "")
    missing = [site for site in adapter.sites or [] if site not in saes]
    if missing:
        raise ValueError(f"there is no SAE of {missing[0]} in {adapter.saes}; there are {', '.join(sorted(saes))}")
    return {site: saes[site] for site in (adapter.sites or sorted(saes))}


def check_prompts(config: RlhfConfig, description: Any) -> None:
    """Refuse prompts that are too few, or too long together with their completions."""
    if config.prompts.kind is not PromptKind.documents:
        available = check_questions(config, light_encoder(config.model), context_size(description))
        if available is not None:
            refuse_few_questions(available, config.algo)
        return
    asked, context = config.prompts.tokens + config.algo.max_new_tokens, context_size(description)
    if asked > context:
        raise ValueError(
            f"prompts.tokens={config.prompts.tokens} + algo.max_new_tokens={config.algo.max_new_tokens} = {asked}"
            f" tokens exceed the model's context of {context}; lower one of them"
        )
    encode = light_encoder(config.model)
    if encode is None:
        return
    texts = first_documents(config, "train")
    needed = max(1, config.algo.prompts_per_phase)
    limit = needed if config.prompts.count is None else min(config.prompts.count, needed)
    available = len(cut_prompts(texts, encode, config.prompts.tokens, limit))
    refuse_too_few(available, config.algo, config.prompts.tokens)
    if not cut_prompts(first_documents(config, "heldout"), encode, config.prompts.tokens, 1):
        raise ValueError(f"no held-out document has more than prompts.tokens={config.prompts.tokens} tokens; lower it")


def check_examples(config: RlhfConfig) -> None:
    """Refuse preference pairs, or examples of sft, that cannot be read."""
    from saerl_cli.data.examples import labelled_documents, read_examples
    from saerl_cli.data.pairs import read_pairs

    algo = config.algo
    if algo.kind is AlgoKind.dpo:
        read_pairs(algo.pairs, config.model, "heldout")
    if algo.examples is not None:
        read_examples(algo.examples)
    if algo.attribute is not None:
        labelled_documents(config.data, config.model, algo.attribute, "heldout")


def first_documents(config: RlhfConfig, split: str) -> Iterable[str]:
    """The texts of a split; those of the planted language are written only as far as they are read."""
    if config.data.kind is DataKind.planted and config.model.kind is ModelKind.planted:
        from saerl_cli.planted.cache import planted_documents

        reviews = planted_documents(config.model.planted, split)
        return (" ".join(review.words) for review in islice(reviews, config.data.max_documents))
    return documents(config.data, config.model, split)


def light_encoder(model: ModelConfig) -> Callable[[str], list[int]] | None:
    """Text to token ids without special tokens; None where only transformers can read the tokenizer."""
    if model.kind is ModelKind.planted:
        from saerl_cli.planted.language import VOCABULARY, split_words

        ids = {word: index for index, word in enumerate(VOCABULARY)}
        return lambda text: [ids.get(word, -1) for word in split_words(text)]
    tokenizer = light_tokenizer(locate(model))
    if tokenizer is None:
        return None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
