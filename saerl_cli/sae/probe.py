"""Sparse probing: how well a label can be told from one, two or five features (Gurnee et al. 2023; SAEBench).

The features are those with the largest |mean on positives - mean on negatives| in the training part; on them a logistic
regression is fitted, and judged on the test part. The same is done with dimensions of the raw activations, the baseline
that features must beat, and with all dimensions at once, the most that there is to find linearly.

An example is a token with its own labels (the planted language), or a document whose activations are averaged over
its text (a labelled file). Tokens of a row depend on each other: a row is in one part only, and standard errors treat
it as one observation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.activations import FORWARD_TOKENS, capture, pack, special_ids, text_mask
from saerl_cli.config.groups import DataConfig, ModelConfig
from saerl_cli.data.text import parse
from saerl_cli.models import Loaded, Site, quiet_transformers, separator_id
from saerl_cli.planted.documents import planted_reviews

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.sae.autoencoder import SAE

TRAIN_SHARE = 0.8
"""The share of rows that probes are fitted on."""
SIZES = (1, 2, 5)
"""Features a probe."""
ALL = "all"
"""The size of a probe on every dimension."""
FEWEST = 10
"""A label with fewer positives, or negatives, in either part is left out."""

Encode = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Examples:
    """What is labelled."""

    kind: str
    """`tokens` or `documents`."""
    rows: "Tensor"
    """Token ids, [rows, length]."""
    example: "Tensor"
    """The example that each position belongs to, [rows, length]; -1 for none."""
    labels: "Tensor"
    """Which labels each example carries, bool [examples, names]."""
    names: tuple[str, ...]
    """Of the labels."""
    cluster: "Tensor"
    """The row of each example, ascending, [examples]."""

    @property
    def training(self) -> "Tensor":
        """Which examples probes are fitted on, bool [examples]: those of the first rows.

        Rows are not mixed: a document that the end of one row cuts begins the next one anew.
        """
        return self.cluster < round(TRAIN_SHARE * len(self.rows))


# --- labels ----------------------------------------------------------------------------------------------------------


def planted_labels(
    data: DataConfig, model: ModelConfig, loaded: Loaded, length: int, tokens: int
) -> tuple["Tensor", "Tensor", tuple[str, ...]]:
    """Held-out rows of the planted language and what each of their text tokens carries.

    Args:
        data: `data=planted`.
        model: the planted model's settings.
        loaded: the model.
        length: tokens a row.
        tokens: text tokens at least, or all there are.

    Returns:
        Token ids [rows, length]; bool [text tokens, attributes], in the order of `text_mask(rows)`; the attributes.
    """
    import torch

    from saerl_cli.planted.language import ATTRIBUTES
    from saerl_cli.sae.metrics import first_rows

    reviews = list(planted_reviews(data, model, "heldout"))
    with quiet_transformers():  # a review may be longer than the context; it is cut here
        encoded = loaded.tokenizer([review.text for review in reviews], add_special_tokens=False)["input_ids"]
    bit = {name: 1 << index for index, name in enumerate(ATTRIBUTES)}
    flags = [[sum(bit[name] for name in carried) for carried in review.labels] for review in reviews]
    if [len(ids) for ids in encoded] != [len(labels) for labels in flags]:
        raise RuntimeError("the planted tokenizer and labels disagree about what a word is")
    special = special_ids(loaded.tokenizer)
    rows = first_rows(pack(encoded, separator_id(loaded.tokenizer), length), special, tokens)
    carried = pack(flags, 0, length)[: len(rows)]  # packed alike, so that labels lie where their tokens lie
    masks = torch.tensor([bit[name] for name in ATTRIBUTES])
    return rows, (carried[text_mask(rows, special)][:, None] & masks) != 0, ATTRIBUTES


def planted_examples(data: DataConfig, model: ModelConfig, loaded: Loaded, length: int, tokens: int) -> Examples:
    """Every text token of `planted_labels` as an example."""
    import torch

    rows, labels, names = planted_labels(data, model, loaded, length, tokens)
    text = text_mask(rows, special_ids(loaded.tokenizer))
    example = torch.full(rows.shape, -1)
    example[text] = torch.arange(len(labels))
    return Examples("tokens", rows, example, labels, names, text.nonzero()[:, 0])


def read_labelled(path: Path | str) -> list[tuple[str, str]]:
    """Texts and labels of a jsonl file of {"text": ..., "label": ...}.

    Raises:
        ValueError: no such file, a malformed line (named), or fewer than two labels.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"probes={path} does not exist; it is a jsonl file of {{'text': ..., 'label': ...}}")
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = parse(line, f"{path} line {number}")
        text, label = (item.get("text"), item.get("label")) if isinstance(item, dict) else (None, None)
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
            raise ValueError(f'{path} line {number} is no {{"text": "...", "label": "..."}} with some text')
        found.append((text, str(label)))
    labels = {label for _, label in found}
    if len(labels) < 2:
        raise ValueError(f"{path} holds {len(labels)} labels; probing needs two or more")
    return found


def labelled_examples(path: Path | str, loaded: Loaded, length: int, seed: int) -> Examples:
    """The documents of a labelled file in random order, a row each, cut at `length` tokens."""
    import torch

    labelled = read_labelled(path)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed)).tolist()
    names = tuple(sorted({label for _, label in labelled}))
    with quiet_transformers():
        encoded = loaded.tokenizer([labelled[i][0] for i in order], add_special_tokens=False)["input_ids"]
    separator = separator_id(loaded.tokenizer)
    cut = [[separator, *ids[: length - 1]] for ids in encoded]  # a separator first, as in training
    width = max(map(len, cut))
    rows = torch.tensor([ids + [separator] * (width - len(ids)) for ids in cut])
    text = text_mask(rows, special_ids(loaded.tokenizer))
    example = torch.where(text, torch.arange(len(rows))[:, None], -1)
    labels = torch.tensor([[labelled[i][1] == name for name in names] for i in order])
    return Examples("documents", rows, example, labels, names, torch.arange(len(rows)))


# --- probing ---------------------------------------------------------------------------------------------------------


def probe(loaded: Loaded, sites: Sequence[Site], saes: Mapping[str, "SAE"], examples: Examples) -> dict[str, Any]:
    """Probes on every SAE, and on the raw activations of every site.

    Args:
        loaded: the language model.
        sites: of the SAEs.
        saes: by any name; `sae.site` says where.
        examples: what to tell.

    Returns:
        `labels` {name: {positive, majority}} (the accuracy of always guessing the more frequent); `left_out`; and in
        `saes` and `activations` for each SAE and site {label: {size: {features, accuracy, accuracy_se, auroc,
        auroc_se}}} with size 1, 2, 5 or `all`, and `mean` {size: {accuracy, auroc}} over the labels.
    """
    training, labels = examples.training, examples.labels
    counts = [side.sum(0) for part in (training, ~training) for side in (labels[part], ~labels[part])]
    enough = [all(int(count[i]) >= FEWEST for count in counts) for i in range(len(examples.names))]
    names = [name for name, kept in zip(examples.names, enough, strict=True) if kept]
    left_out = [name for name, kept in zip(examples.names, enough, strict=True) if not kept]
    result: dict[str, Any] = {
        "kind": examples.kind,
        "examples": {"train": int(training.sum()), "test": int((~training).sum())},
        "left_out": left_out,
        "labels": {},
        "saes": {},
        "activations": {},
    }
    if not names:
        return result
    truth = labels[:, enough]  # [examples, names]
    share = truth[~training].double().mean(0).tolist()
    result["labels"] = {name: {"positive": p, "majority": max(p, 1 - p)} for name, p in zip(names, share, strict=True)}
    encoders: dict[str, tuple[str, Encode]] = {name: (str(sae.site), sae.encode) for name, sae in saes.items()}
    raw: dict[str, tuple[str, Encode]] = {site.name: (site.name, lambda x: x) for site in sites}
    for group, chosen, whole in (("saes", encoders, False), ("activations", raw, True)):
        difference = class_difference(loaded, sites, chosen, examples, truth)
        best = {name: d.abs().topk(min(max(SIZES), d.shape[1]), dim=1).indices for name, d in difference.items()}
        columns = {name: best[name].unique() if not whole else None for name in best}
        for name, features in pooled_features(loaded, sites, chosen, examples, columns).items():
            result[group][name] = judged(features, columns[name], best[name], examples, truth, names)
    return result


def tokens(
    loaded: Loaded, sites: Sequence[Site], encoders: Mapping[str, tuple[str, Encode]], examples: Examples
) -> Iterator[tuple[str, "Tensor", "Tensor"]]:
    """Encoder, example of each token [n] and its features [n, width], in parts."""
    import torch

    device = loaded.model.get_input_embeddings().weight.device
    at_once = max(1, FORWARD_TOKENS // examples.rows.shape[1])
    parts = zip(examples.rows.split(at_once), examples.example.split(at_once), strict=True)
    for ids, example in parts:
        inside = (example >= 0).to(device)
        captured = capture(loaded.model, sites, ids.to(device))
        for name, (site, encode) in encoders.items():
            with torch.no_grad():
                yield name, example.to(device)[inside], encode(captured[site][inside].float())


def class_difference(
    loaded: Loaded,
    sites: Sequence[Site],
    encoders: Mapping[str, tuple[str, Encode]],
    examples: Examples,
    truth: "Tensor",
) -> dict[str, "Tensor"]:
    """Mean feature on positives minus mean on negatives in the training part, by encoder, [labels, width]."""
    import torch

    device = loaded.model.get_input_embeddings().weight.device
    length = torch.bincount(examples.example[examples.example >= 0], minlength=len(truth))
    positive, negative = truth & examples.training[:, None], ~truth & examples.training[:, None]
    signed = positive / positive.sum(0) - negative / negative.sum(0)  # [examples, labels]
    weights = (signed / length.clamp_min(1)[:, None]).to(device)  # a document is the mean of its tokens
    total: dict[str, Tensor] = {}
    for name, example, features in tokens(loaded, sites, encoders, examples):
        part = weights[example].T @ features
        total[name] = total[name] + part if name in total else part
    return total


def pooled_features(
    loaded: Loaded,
    sites: Sequence[Site],
    encoders: Mapping[str, tuple[str, Encode]],
    examples: Examples,
    columns: Mapping[str, "Tensor | None"],
) -> dict[str, "Tensor"]:
    """Chosen features of every example, averaged over its tokens: by encoder, float64 [examples, columns], CPU."""
    import torch

    found: dict[str, Tensor] = {}
    for name, example, features in tokens(loaded, sites, encoders, examples):
        chosen = columns[name]
        kept = (features if chosen is None else features[:, chosen]).double().cpu()
        if name not in found:
            found[name] = kept.new_zeros(len(examples.labels), kept.shape[1])
        found[name].index_add_(0, example.cpu(), kept)
    length = torch.bincount(examples.example[examples.example >= 0], minlength=len(examples.labels))
    return {name: total / length.clamp_min(1)[:, None] for name, total in found.items()}


def judged(
    features: "Tensor",
    columns: "Tensor | None",
    best: "Tensor",
    examples: Examples,
    truth: "Tensor",
    names: Sequence[str],
) -> dict[str, Any]:
    """Fit a probe of every size for every label and judge it on the test part.

    Args:
        features: [examples, columns].
        columns: which features the columns are, ascending; None where they are all.
        best: the features of each label, best first, [labels, 5].
        examples: what is labelled.
        truth: bool [examples, labels].
        names: of the labels.
    """
    import torch

    training, cluster = examples.training, examples.cluster[~examples.training]
    place = (best if columns is None else torch.searchsorted(columns, best)).cpu()
    scaled = (features - features[training].mean(0)) / features[training].std(0).clamp_min(1e-12)
    logits = {}
    for size in SIZES:
        own = scaled[:, place[:, :size]].transpose(0, 1)  # [labels, examples, size]
        weight, bias = newton(own[:, training], truth[training].T)
        logits[str(size)] = torch.einsum("ank,ak->na", own[:, ~training], weight) + bias
    if columns is None:
        weight, bias = lbfgs(scaled[training], truth[training])
        logits[ALL] = scaled[~training] @ weight.T + bias  # [test, labels]
    result: dict[str, Any] = {
        name: {
            size: ({} if size == ALL else {"features": best[index, : int(size)].tolist()})
            | judge(logit[:, index], truth[~training, index], cluster)
            for size, logit in logits.items()
        }
        for index, name in enumerate(names)
    }
    mean = {
        size: {key: sum(result[name][size][key] for name in names) / len(names) for key in ("accuracy", "auroc")}
        for size in logits
    }
    return result | {"mean": mean}


# --- logistic regression ---------------------------------------------------------------------------------------------


def newton(x: "Tensor", truth: "Tensor", l2: float = 1.0, steps: int = 100) -> tuple["Tensor", "Tensor"]:
    """Minimise sum log loss + l2 / 2 |w|^2 for every label on columns of its own: few of them, many labels.

    Args:
        x: standardised, float64 [labels, n, columns].
        truth: bool [labels, n].
        l2: weight of the penalty; the bias is free.
        steps: at most.

    Returns:
        Weights [labels, columns] and biases [labels].
    """
    import torch
    from torch.nn.functional import softplus

    y = truth.double()
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    penalty = x.new_full((x.shape[-1],), l2)
    penalty[-1] = 0
    weight = x.new_zeros(len(x), x.shape[-1])

    def logits(weight: "Tensor") -> "Tensor":
        return (x @ weight[..., None])[..., 0]  # [labels, n]

    def loss(weight: "Tensor") -> "Tensor":
        z = logits(weight)
        return (softplus(z) - y * z).sum(-1) + (penalty * weight.square()).sum(-1) / 2

    for _ in range(steps):
        p = logits(weight).sigmoid()
        gradient = ((p - y)[:, None] @ x)[:, 0] + penalty * weight
        hessian = (x * (p * (1 - p))[..., None]).transpose(1, 2) @ x + torch.diag(penalty + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        before, length = loss(weight), x.new_ones(len(x), 1)
        while bool((worse := loss(weight - length * step) > before + 1e-9 * before.abs()).any()):
            length[worse] /= 2
        weight = weight - length * step
        if float((length * step).abs().max()) < 1e-9:
            break
    return weight[:, :-1], weight[:, -1]


def lbfgs(x: "Tensor", truth: "Tensor", l2: float = 1.0, steps: int = 300) -> tuple["Tensor", "Tensor"]:
    """What `newton` minimises, by L-BFGS: many columns, which all labels share.

    Args:
        x: standardised, float64 [n, columns].
        truth: bool [n, labels].
        l2: weight of the penalty; the bias is free.
        steps: at most.

    Returns:
        Weights [labels, columns] and biases [labels].
    """
    import torch
    from torch.nn.functional import softplus

    y = truth.double()
    weight, bias = x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> "Tensor":
        logits = x @ weight.T + bias
        error = (logits.sigmoid() - y) / len(x)  # [n, labels]
        weight.grad, bias.grad = error.T @ x + weight * (l2 / len(x)), error.sum(0)
        return ((softplus(logits) - y * logits).sum() + l2 / 2 * weight.square().sum()) / len(x)

    optimizer.step(loss)  # type: ignore[arg-type]
    return weight, bias


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(logit: "Tensor", truth: "Tensor", cluster: "Tensor") -> dict[str, float]:
    """Accuracy and area under the ROC curve with standard errors over clusters; all arguments [n]."""
    import torch

    from saerl_cli.sae.jackknife import by_row, jackknife
    from saerl_cli.sae.metrics import auroc

    row = torch.unique(cluster, return_inverse=True)[1]
    right = ((logit > 0) == truth).double()
    sums = by_row({"n": torch.ones_like(right), "right": right}, row, int(row.max()) + 1)
    accuracy = jackknife(sums, lambda s: {"accuracy": s["right"] / s["n"].clamp_min(1)})
    return accuracy | {"auroc": auroc(logit, truth), "auroc_se": auroc_error(logit, truth, row)}


def auroc_error(score: "Tensor", positive: "Tensor", cluster: "Tensor") -> float:
    """Standard error of `auroc` where examples of a cluster depend on each other (Obuchowski 1997).

    Args:
        score: [n].
        positive: bool [n], with both kinds present.
        cluster: [n], counted from 0.
    """
    import torch

    from saerl_cli.sae.metrics import midrank

    p, q = float(positive.sum()), float((~positive).sum())
    own = torch.empty_like(score, dtype=torch.float64)
    for side in (positive, ~positive):
        own[side] = midrank(score[side])
    above = midrank(score) - own  # how many of the other kind lie below, ties counted half
    chance = torch.where(positive, above / q, 1 - above / p)  # that a pair with this example is in order
    centred = (chance - chance[positive].mean()) / torch.where(positive, p, q)
    clusters = int(cluster.max()) + 1
    sums = centred.new_zeros(clusters).index_add_(0, cluster, centred)
    return float((sums.square().sum() * clusters / max(clusters - 1, 1)).sqrt())
