"""A language model, SAEs and a run of every algorithm: random weights, a fraction of a second a run."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saerl_cli.adapter.coefficients.sparsity import Sparsity
from saerl_cli.config.adapter import AdapterConfig, SparsityConfig, Splice
from saerl_cli.models import Loaded
from saerl_cli.rl.adapters import peft_config
from saerl_cli.rl.training.config import DPOConfig, PPOConfig, RWRConfig, SFTConfig
from saerl_cli.rl.training.phase import PPOTrainer
from saerl_cli.rl.training.regression import RWRTrainer
from saerl_cli.rl.training.supervised import DPOTrainer, SFTTrainer
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import save_sae

WORDS = ["<pad>", "<eos>"] + [f"w{i}" for i in range(30)]
GOOD = range(2, 12)
"""Token ids that the planted reward likes."""


def word_tokenizer(**tokens) -> PreTrainedTokenizerFast:
    """One token a word; `<pad>` 0 and `<eos>` 1."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **tokens)


def shape(**more) -> GPTNeoXConfig:
    """Two layers of width 32."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 32} | more
    return GPTNeoXConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=1)


def tiny_model(folder: Path) -> GPTNeoXForCausalLM:
    """Random weights, sharpened so that features matter; saved to and loaded from `folder`."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(shape())
        model.lm_head.weight.data.mul_(8)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
    return GPTNeoXForCausalLM.from_pretrained(folder).requires_grad_(False).eval()


def tiny_sae(folder: Path, site: str = "mlp_out.1", width: int = 32, features: int = 64) -> Path:
    """A ReLU SAE with random unit directions in both halves, written unless it is there."""
    if (folder / site).is_dir():
        return folder / site
    sae = SAE(width, features)
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=torch.Generator().manual_seed(1)))
    sae.W_dec.data.copy_(directions)
    sae.W_enc.data.copy_(directions.T)
    sae.site = site
    sae.metadata = {"saerl": {"site": site}}
    return save_sae(sae, folder / site)


def good_share(completion_ids, **_) -> list[float]:
    """Share of the completion's tokens that are among `GOOD`."""
    return [sum(token in GOOD for token in ids) / max(1, len(ids)) for ids in completion_ids]


def prompts(count: int = 64) -> Dataset:
    """Distinct prompts of three words."""
    return Dataset.from_dict({"prompt": [f"w{i % 30} w{7 * i % 30} w{i * i % 29}" for i in range(count)]})


LEARNING_RATES = {"full": 1e-3, "lora": 1e-3, "bias_only": 3e-3, "steering_vector": 3e-3}
"""Of the tiny model; 5e-2 for the others."""
ROLLOUTS = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "max_completion_length": 10, "beta": 0.02}
GROUPS = {**ROLLOUTS, "num_iterations": 2, "num_generations": 4}
SUPERVISED = {"per_device_train_batch_size": 8, "phase_steps": 8}
ALGOS = {
    "ppo": (PPOTrainer, PPOConfig, {**ROLLOUTS, "num_iterations": 2}),
    "grpo": (PPOTrainer, PPOConfig, {**GROUPS, "algorithm": "grpo", "scale_rewards": "group"}),
    "rloo": (PPOTrainer, PPOConfig, {**GROUPS, "algorithm": "rloo"}),
    "sft": (SFTTrainer, SFTConfig, {**SUPERVISED, "dataset_kwargs": {"skip_prepare_dataset": True}}),
    "dpo": (DPOTrainer, DPOConfig, {**SUPERVISED, "max_length": None}),
    "rwr": (RWRTrainer, RWRConfig, {**SUPERVISED, "longest": 4, "dataset_kwargs": {"skip_prepare_dataset": True}}),
}
"""Trainer, its settings, and what a phase of 8 optimiser steps is."""


def sequences(count: int = 40) -> Dataset:
    """Rows of token ids of one length, as sft takes them."""
    rows = [[2 + (3 * i + j * j) % 30 for j in range(12)] for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def preferences(count: int = 40) -> Dataset:
    """Pairs whose chosen side has tokens among `GOOD` and whose rejected side has none, of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": [2 + i % 30, 2 + 7 * i % 30],
                "chosen_ids": [2 + (i + j) % 10 for j in range(2 + i % 3)] + [1],
                "rejected_ids": [12 + (i * j) % 18 for j in range(1 + i % 4)] + [1],
            }
            for i in range(count)
        ]
    )


def weighted(count: int = 40) -> Dataset:
    """Weighted completions of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": [2 + i % 30, 2 + 7 * i % 30],
                "completion_ids": [2 + (i * j) % 28 for j in range(1 + i % 3)] + [1],
                "weight": 0.2 + (i % 5),
            }
            for i in range(count)
        ]
    )


DATA = {"ppo": prompts, "grpo": prompts, "rloo": prompts, "sft": sequences, "dpo": preferences, "rwr": weighted}


def build_trainer(
    folder: Path,
    adapter: str = "sparse_coeffs",
    splice: str = "error_preserving",
    reward=good_share,
    sparsity: SparsityConfig | None = None,
    free: dict | None = None,
    algo: str = "ppo",
    **settings,
):
    """A run in phases of 8 optimiser steps: 16 completions in 4 minibatches, 2 epochs; or 8 rows a step."""
    extra = {name: settings.pop(name) for name in ("on_phase", "train_dataset", "frozen") if name in settings}
    model = settings.pop("model", None) or tiny_model(folder / "model")
    chosen = peft_config(*adapter_settings(folder, model, adapter, splice, sparsity))
    if chosen is None:
        model.requires_grad_(True)
    kind, config, phase = ALGOS[algo]
    if algo in ("ppo", "grpo", "rloo"):
        extra["reward_funcs"] = reward
    defaults = {
        **phase,
        "max_steps": 8 * settings.pop("phases", 3),
        "learning_rate": LEARNING_RATES.get(adapter, 5e-2),
        "save_strategy": "no",
        "seed": 3,
    }
    trainer = kind(
        model=model,
        processing_class=word_tokenizer(),
        train_dataset=extra.pop("train_dataset", None) or DATA[algo](),
        peft_config=chosen,
        args=config(
            **{"output_dir": str(folder / "out"), **defaults, **settings},
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        **extra,
    )
    if sparsity is not None or free is not None:
        trainer.sparsity = Sparsity(trainer.model, sparsity or SparsityConfig(), free)
    return trainer


def adapter_settings(folder: Path, model, kind: str, splice: str, sparsity: SparsityConfig | None = None) -> tuple:
    """What `peft_config` is given; SAEs at both MLP outputs for the control, at the second for coefficients."""
    sites = {"sparse_coeffs": ["mlp_out.1"], "random_dictionary": ["mlp_out.0", "mlp_out.1"]}.get(kind, [])
    saes = {site: tiny_sae(folder / "sae", site) for site in sites}
    loaded = Loaded(model, word_tokenizer(), "tiny", None, None, 32, folder / "model")
    given = {"saes": str(folder / "sae"), "splice": Splice(splice)} if sites else {}
    given |= {"sparsity": sparsity} if sparsity else {}
    return AdapterConfig(kind=kind, **given), loaded, saes


def trained(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in trainer.trainable()}
