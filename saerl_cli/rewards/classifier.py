"""A sequence-classification model as a score of completions, read on token ids."""

import copy
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from saerl_cli.models import quiet_transformers

FOREIGN = 0.1
"""Share of the policy's tokens that a reward model with another tokenizer may not know."""


class Classifier:
    """Scores prompt + completion with a reward model.

    The completion keeps its end token. Where the reward model's tokenizer is the policy's, token ids are passed on as
    they are; otherwise the text of prompt and completion is encoded by the reward model's tokenizer, and its end token
    takes the place of the policy's.

    Args:
        path: folder or Hub id of a …ForSequenceClassification model with one label (its logit is the score) or two
            (the difference of the logits, positive minus negative).
        tokenizer: of the policy.
        device: where it runs.
        batch_size: completions in one forward pass.
        revision: Hub revision.

    Raises:
        ValueError: score head missing from the weights, no padding token, padding equal to the end token, or another
            tokenizer that cannot represent what the policy writes.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
        revision: str | None = None,
    ):
        self.policy_tokenizer, self.device, self.batch_size = tokenizer, torch.device(device), batch_size
        self.tokenizer, self.model = load_classifier(path, revision)
        self.model.to(self.device)
        self.same_tokenizer = self.tokenizer.get_vocab() == tokenizer.get_vocab()
        if not self.same_tokenizer:
            refuse_foreign(path, self.tokenizer, tokenizer)
        policy: Any = tokenizer
        self.ends = {policy.eos_token_id, policy.bos_token_id} - {None}  # some models end with what begins a text
        config = self.model.config.get_text_config()
        self.longest = getattr(config, "max_position_embeddings", None)

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        """The score of every completion."""
        rows = [self.encode(*row) for row in zip(prompts, completions, completion_ids, strict=True)]
        return score_rows(self.model, rows, self.tokenizer.pad_token_id, self.batch_size)

    def encode(self, prompt: str, completion: str, completion_ids: list[int]) -> list[int]:
        """Token ids of prompt + completion for the reward model; the prompt is cut from the left to fit its context."""
        if self.same_tokenizer:
            ids = self.policy_tokenizer(prompt)["input_ids"] + completion_ids
        else:
            ids = self.tokenizer(prompt + completion)["input_ids"]
            ended = bool(completion_ids) and completion_ids[-1] in self.ends
            if ended and self.tokenizer.eos_token_id is not None:
                ids = [*ids, self.tokenizer.eos_token_id]
        return ids[-self.longest :] if self.longest else ids


def score_rows(model: Any, rows: list[list[int]], pad: Any, batch_size: int) -> list[float]:
    """The scores of token ids by a model with one label or two, `batch_size` rows at a time."""
    return [s for i in range(0, len(rows), batch_size) for s in score_batch(model, rows[i : i + batch_size], pad)]


@torch.inference_mode()
def score_batch(model: Any, rows: list[list[int]], pad: int) -> list[float]:
    """The scores of token ids, padded on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)  # [n, T]
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float()
    return (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()


def refuse_foreign(path: str, tokenizer: Any, policy: Any) -> None:
    """Refuse a reward model whose tokenizer cannot represent what the policy writes.

    Tokens of the policy, some 4,096 evenly spread over its vocabulary, are decoded and encoded again; a share of
    `FOREIGN` of them, such as broken bytes, may be lost.
    """
    unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    ids = [i for i in sorted(policy.get_vocab().values()) if i not in policy.all_special_ids]
    ids = ids[:: max(1, len(ids) // 4096)]
    texts = [text for text in policy.batch_decode([[i] for i in ids]) if text.strip()]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lost = [text for text, row in zip(texts, encoded, strict=True) if not row or not unknown.isdisjoint(row)]
    if len(lost) > FOREIGN * len(texts):
        raise ValueError(
            f"the reward model {path} has another tokenizer, to which {len(lost)} of {len(texts)} tokens of the policy"
            f" are unknown, for instance {lost[0]!r}; take a reward model of the policy's language"
        )


def load_classifier(path: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and frozen model; `ValueError` when it cannot serve as a reward (see `Classifier`)."""
    try:
        with quiet_transformers():  # its warning about a new head is our refusal
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, revision=revision, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the reward model {path}: {' '.join(str(error).split())}") from None
    new = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if new:
        raise ValueError(f"the reward model {path} lacks {new[0]}: its score head would be newly initialised")
    if model.config.num_labels not in (1, 2):
        raise ValueError(f"the reward model {path} has {model.config.num_labels} labels; one or two are understood")
    reads_last_token = not getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "score")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the reward model {path} has no padding token; add pad_token to its tokenizer_config.json")
    if reads_last_token and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"the reward model {path} pads with its end token, so the score would be read before the end; "
            "give its tokenizer another pad_token"
        )
    model.config = copy.deepcopy(model.config)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval().requires_grad_(False)
