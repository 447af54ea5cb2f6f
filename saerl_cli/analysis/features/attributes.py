"""How features match the attributes of the planted language: on what they fire, and on what they write.

Letters: `n` tokens, `C` features, `A` attributes, `V` the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from saerl_cli.sae.metrics import midrank


def truth_of(rows: Tensor, mask: Tensor, tokenizer: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Which attributes every token that counts carries, bool [n, A], and their names.

    Args:
        rows: token ids [rows, seq].
        mask: which of them count [rows, seq], n in all.
        tokenizer: of the planted language, a token a word.
    """
    from saerl_cli.planted.language import ATTRIBUTES, labels_of

    carried = [labels_of(tokenizer.convert_ids_to_tokens(row)) for row in rows.tolist()]
    truth = torch.tensor([[[name in token for name in ATTRIBUTES] for token in row] for row in carried])
    return truth[mask], ATTRIBUTES


def vocabulary_truth(tokenizer: Any) -> tuple[Tensor, tuple[str, ...], Tensor]:
    """Which tokens of the vocabulary carry each attribute of words, bool [V, A]; its names; which tokens are words."""
    from saerl_cli.planted.words import LEXICAL

    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    truth = torch.tensor([[word in LEXICAL[name] for name in LEXICAL] for word in words])
    return truth, tuple(LEXICAL), torch.tensor([i not in special for i in range(len(words))])


def f1_scores(f: Tensor, truth: Tensor) -> Tensor:
    """F1 of "the feature fires" as a detector of every attribute: f [n, C], truth bool [n, A] -> [C, A]."""
    fired, positive = (f > 0).double(), truth.double()
    hits = fired.T @ positive  # [C, A]
    return 2 * hits / (fired.sum(0)[:, None] + positive.sum(0)).clamp_min(1)


def aurocs(scores: Tensor, truth: Tensor) -> Tensor:
    """Area under the ROC curve of every score as a detector of every attribute; 1/2 where a kind is absent.

    Args:
        scores: [n, C].
        truth: bool [n, A].

    Returns:
        P(score of a positive > score of a negative) + P(equal) / 2, [C, A]: `saerl_cli.sae.metrics.auroc` for each.
    """
    ranks = torch.stack([midrank(column) for column in scores.T.contiguous()])  # [C, n], float64
    positive = truth.double()
    p = positive.sum(0)  # [A]
    pairs = p * (len(truth) - p)
    area = (ranks @ positive - p * (p + 1) / 2) / pairs.clamp_min(1)
    return torch.where(pairs > 0, area, 0.5)


def input_side(f: Tensor, truth: Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """For every feature the attribute that its firing detects best by F1, and F1 and AUROC of every attribute.

    Args:
        f: activations [n, C].
        truth: bool [n, A].
        names: of the attributes.
    """
    f1, auroc = f1_scores(f, truth), aurocs(f, truth)
    return [
        {
            "attribute": names[int(own.argmax())],
            "f1": float(own.max()),
            "auroc": float(area[int(own.argmax())]),
            "attributes": {
                name: {"f1": round(float(x), 4), "auroc": round(float(y), 4)}
                for name, x, y in zip(names, own, area, strict=True)
            },
        }
        for own, area in zip(f1, auroc, strict=True)
    ]


def output_side(effect: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """For every feature the attributes whose words its direction promotes and suppresses most.

    The AUROC is that of the logit effect as a detector of the attribute's words among all words: above 1/2 they are
    promoted, below it suppressed.

    Args:
        effect: on the logits, [C, V].
        tokenizer: of the planted language.
    """
    truth, names, words = vocabulary_truth(tokenizer)
    area = aurocs(effect[:, : len(words)].cpu().T[words], truth[words])  # [C, A]
    found = []
    for own in area.tolist():
        scores = dict(zip(names, own, strict=True))
        up, down = max(scores, key=lambda name: scores[name]), min(scores, key=lambda name: scores[name])
        found.append(
            {
                "promotes": {"attribute": up, "auroc": scores[up]},
                "suppresses": {"attribute": down, "auroc": scores[down]},
                "attributes": {name: round(score, 4) for name, score in scores.items()},
            }
        )
    return found
