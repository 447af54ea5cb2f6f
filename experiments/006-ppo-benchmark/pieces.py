"""What the scripts of this card share: a random model, SAE and prompts in a folder, a PPO run, the clock."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saerl_cli.adapter import sparse_coeffs
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import save_sae

EXPANSION, K = 16, 32


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: `<pad>` 0, `<eos>` 1, `w2`, `w3`, ..."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", pad_token="<pad>", eos_token="<eos>")


def random_model(layers: int, width: int, vocabulary: int) -> GPTNeoXForCausalLM:
    """A Pythia of this shape with random weights, frozen."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(2, width // 64),
        intermediate_size=4 * width, vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0  # an end token is as rare as any other
    return model.requires_grad_(False).eval()


def random_sae(folder: Path, site: str, width: int, k: int | None = K) -> Path:
    """An SAE with random unit directions in both halves: topk, or a ReLU with a few active features."""
    sae = SAE(width, EXPANSION * width, "topk" if k else "standard", k)
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(sae.d_sae, width, generator=generator))
    sae.W_dec.data.copy_(directions)
    sae.W_enc.data.copy_(directions.T)
    sae.site, sae.metadata = site, {"saerl": {"site": site}}
    return save_sae(sae, folder / site)


def adapter(model: Any, folder: Path, site: str, k: int | None = K) -> Any:
    """The PEFT config with coefficients at one site."""
    if not (folder / site).is_dir():
        random_sae(folder, site, model.config.hidden_size, k)
    return sparse_coeffs(model, folder)


def prompts(count: int, length: int, vocabulary: int) -> list[str]:
    """Random words."""
    ids = torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(2)).tolist()
    return [" ".join(f"w{i}" for i in row) for row in ids]


def share_of_low(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: how many of the tokens have an even id."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def ppo(folder: Path, model: Any, site: str, texts: list[str], **settings: Any) -> Any:
    """A trainer of saerl for coefficients at one site; the settings are TRL's."""
    from datasets import Dataset

    from saerl_cli.rl.training.config import PPOConfig
    from saerl_cli.rl.training.phase import PPOTrainer

    return PPOTrainer(
        model=model,
        reward_funcs=share_of_low,
        processing_class=tokenizer(model.config.vocab_size),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        peft_config=adapter(model, folder, site),
        args=PPOConfig(
            output_dir=str(folder / "out"), save_strategy="no", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, seed=3, **settings,
        ),
    )  # fmt: skip


def clocked(owner: Any, name: str) -> list[float]:
    """CPU seconds of every call of a method, from now on."""
    method, seconds = getattr(owner, name), []

    def run(*args: Any, **kwargs: Any) -> Any:
        result, used = cpu(lambda: method(*args, **kwargs))
        seconds.append(used)
        return result

    setattr(owner, name, run)
    return seconds


def cpu(work: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def report(**numbers: Any) -> None:
    """One JSON line."""
    print("RESULT " + json.dumps(numbers), flush=True)
