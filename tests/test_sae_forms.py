"""Every architecture's gradients: those of an independent plain implementation, in both layouts, on two processes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import sae_oracles as oracles
import torch
from torch.nn.functional import normalize

from saerl_cli.config.sae import Architecture, DecoderNorm, EncoderDtype, Kernel, Penalty, SaeConfig
from saerl_cli.config.settings import suited
from saerl_cli.run.processes import ONE_PROCESS
from saerl_cli.sae.architectures import parts_of
from saerl_cli.sae.architectures.common import Batch
from saerl_cli.sae.architectures.selection import largest_per_token, likely, select_in_batch
from saerl_cli.sae.layout import Dense, fitting, rows_of, where

D_IN, D_SAE, N = 6, 16, 30
BASE = {"expansion": None, "d_sae": D_SAE, "k": 4, "prefixes": [0.25, 0.5, 1.0], "l1": 0.5, "l0": 0.3, "bandwidth": 0.5}
LOSSES = {
    Architecture.relu: oracles.relu_loss,
    Architecture.topk: oracles.topk_loss,
    Architecture.batchtopk: oracles.batchtopk_loss,
    Architecture.matryoshka: oracles.matryoshka_loss,
    Architecture.jumprelu: oracles.jumprelu_loss,
    Architecture.gated: oracles.gated_loss,
}
VARIANTS = {
    **{a.value: {"architecture": a} for a in Architecture},
    "relu unit": {"architecture": Architecture.relu, "decoder_norm": DecoderNorm.unit},
    "gated unit": {"architecture": Architecture.gated, "decoder_norm": DecoderNorm.unit},
    "jumprelu unit": {"architecture": Architecture.jumprelu, "decoder_norm": DecoderNorm.unit},
    "jumprelu step": {"architecture": Architecture.jumprelu, "penalty": Penalty.step},
    "jumprelu target": {"architecture": Architecture.jumprelu, "penalty": Penalty.target, "target_l0": 5.0},
    "jumprelu quadratic": {"architecture": Architecture.jumprelu, "penalty": Penalty.quadratic, "target_l0": 5.0},
    "jumprelu threshold alone": {"architecture": Architecture.jumprelu, "ste_to_input": False},
    "jumprelu wakes": {"architecture": Architecture.jumprelu, "preact": 0.7},
    "topk auxk": {"architecture": Architecture.topk, "auxk": 0.5},
    "topk auxk of one": {"architecture": Architecture.topk, "auxk": 0.5, "auxk_latents": 1},
    "batchtopk auxk": {"architecture": Architecture.batchtopk, "auxk": 0.5},
    "matryoshka auxk": {"architecture": Architecture.matryoshka, "auxk": 0.5},
}
BY_LAYOUT = [name for name in VARIANTS if name.split()[0] in ("relu", "jumprelu", "gated")]


def settings(name: str, **changes) -> SaeConfig:
    return suited(SaeConfig, BASE | VARIANTS[name] | changes)


def problem(config: SaeConfig, d_out: int = D_IN, seed: int = 0):
    """Random parameters and data in float64, with some dead features."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {
        "encoder": normal(D_SAE, D_IN),
        "b_enc": normal(D_SAE),
        "decoder": normal(D_SAE, d_out),
        "b_dec": normal(d_out),
    }
    if config.decoder_norm is DecoderNorm.unit:
        p["decoder"] = normalize(p["decoder"], dim=-1)
    if config.architecture is Architecture.jumprelu:
        p["threshold"] = normal(D_SAE).abs()
    if config.architecture is Architecture.gated:
        p |= {"r_mag": normal(D_SAE) / 3, "b_mag": normal(D_SAE)}
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[1, 5, 9, 10]] = True
    return p, normal(N, D_IN), normal(N, d_out), dead


def expected(config: SaeConfig, p, x, y, dead, centre=None):
    """Loss, activations, reconstruction and gradients by autograd."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
    s = oracles.Settings(
        decoder_norm=config.decoder_norm.value, centre=centre, k=config.k, prefixes=tuple(config.prefixes),
        l1=config.l1, l0=config.l0, penalty=config.penalty.value, tanh_scale=config.tanh_scale,
        target_l0=config.target_l0 or 1.0, bandwidth=config.bandwidth, ste_to_input=config.ste_to_input,
        preact=config.preact, auxk=config.auxk, auxk_latents=config.auxk_latents, dead=dead,
    )  # fmt: skip
    loss, f, x_hat = LOSSES[config.architecture](leaves, x, y, s)
    loss.backward()
    return f.detach(), x_hat.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def weight(config: SaeConfig) -> float:
    return config.l0 if config.architecture is Architecture.jumprelu else config.l1


def computed(config: SaeConfig, p, x, y, dead, centre=None, group=ONE_PROCESS, tokens=N):
    origin = p["b_dec"] if centre is None else centre
    batch = Batch(x - origin, y, tokens, dead, group)
    outcome = parts_of(config.architecture).loss(p, batch, config, weight(config))
    if centre is None:
        outcome.gradients["b_dec"] = outcome.gradients["b_dec"] - outcome.into_encoder @ p["encoder"]
    return outcome


def assert_same(gradients, wanted):
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-10), name


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_the_published_loss(name, seed):
    config = settings(name)
    p, x, _, dead = problem(config, seed=seed)
    f, x_hat, gradients = expected(config, p, x, x, dead)
    outcome = computed(config, p, x, x, dead)
    assert torch.allclose(outcome.error, x_hat - x, atol=1e-10)
    assert torch.equal(outcome.fires, (f > 0).sum(0))
    assert_same(outcome.gradients, gradients)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_transcoder_has_the_same_loss_with_another_target(name):
    config = settings(name)
    p, x, y, dead = problem(config, d_out=5)
    centre = torch.randn(D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, x_hat, gradients = expected(config, p, x, y, dead, centre)
    outcome = computed(config, p, x, y, dead, centre)
    assert torch.allclose(outcome.error, x_hat - y, atol=1e-10)
    assert_same(outcome.gradients, gradients)


@pytest.mark.parametrize("name", BY_LAYOUT)
def test_sparse_and_dense_layouts_agree(name):
    config = settings(name)
    p, x, _, dead = problem(config)
    sparse, dense = (
        computed(replace(config, kernel=kernel), p, x, x, dead) for kernel in (Kernel.sparse, Kernel.dense)
    )
    assert_same(sparse.gradients, dense.gradients)
    assert torch.equal(sparse.fires, dense.fires)
    assert torch.allclose(sparse.penalty, dense.penalty)


def test_the_faster_layout_is_chosen_by_how_much_fires():
    few = torch.zeros(10, 20, dtype=torch.bool)
    few[3, 4] = True
    assert not isinstance(fitting(few, "auto"), Dense)
    assert isinstance(fitting(~few, "auto"), Dense)


def test_operations_of_the_layouts_by_hand():
    """Two tokens, three features; pairs (0, 2), (1, 0), (1, 2)."""
    mask = torch.tensor([[False, False, True], [True, False, True]])
    values = torch.tensor([[0.0, 0.0, 2.0], [3.0, 0.0, 5.0]])
    decoder = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    layout = where(mask)
    v = layout.take(values)
    assert v.tolist() == [2.0, 3.0, 5.0]
    assert layout.at(torch.tensor([7.0, 8.0, 9.0])).tolist() == [9.0, 7.0, 9.0]
    assert layout.decode(v, decoder).tolist() == [[6.0, 60.0], [18.0, 180.0]]
    assert layout.dot(rows, decoder).tolist() == [3.0, 10.0, 30.0]
    assert layout.by_feature(v, rows).tolist() == [[0.0, 3.0], [0.0, 0.0], [2.0, 5.0]]
    assert layout.sum(v).tolist() == [3.0, 0.0, 7.0]
    assert layout.count(v > 2).tolist() == [1, 0, 1]


def test_tokens_without_any_feature_reconstruct_as_nothing():
    layout = where(torch.zeros(3, 4, dtype=torch.bool))
    assert layout.decode(torch.zeros(0), torch.ones(4, 2)).tolist() == [[0.0, 0.0]] * 3
    assert layout.by_feature(torch.zeros(0), torch.ones(3, 2)).tolist() == [[0.0, 0.0]] * 4


@pytest.mark.parametrize("name", VARIANTS)
def test_a_process_without_tokens_contributes_zero_gradient(name):
    config = settings(name)
    p, x, y, dead = problem(config)
    outcome = computed(config, p, x[:0], x[:0], dead if config.preact else ~dead & dead)
    assert all(gradient.shape == p[name].shape for name, gradient in outcome.gradients.items())
    assert not any(gradient.any() for gradient in outcome.gradients.values())


def in_two(x, y, config, p, dead):
    """The outcomes of two processes that hold a part of the batch each.

    What one process contributes to a sum is recorded in a first round, and in the second the other one gets it; sums
    that depend on sums need as many rounds as there are sums.
    """
    parts = [(x[:11], y[:11]), (x[11:], y[11:])]
    said: list[list] = [[], []]
    for _ in range(8):
        before, said, outcomes = said, [[], []], []
        for rank, (a, b) in enumerate(parts):

            def total(tensor, rank=rank, said=said, before=before):
                place = len(said[rank])
                said[rank].append(tensor)
                other = before[1 - rank]
                return tensor + other[place] if place < len(other) else tensor

            group = SimpleNamespace(rank=rank, world_size=2, all_reduce=total)
            outcomes.append(computed(config, p, a, b, dead, group=group))
    return outcomes


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_compute_what_one_does(name):
    config = settings(name)
    p, x, _, dead = problem(config)
    whole = computed(config, p, x, x, dead)
    first, second = in_two(x, x, config, p, dead)
    assert_same({key: g + second.gradients[key] for key, g in first.gradients.items()}, whole.gradients)
    assert torch.equal(first.fires + second.fires, whole.fires)
    assert torch.allclose(first.penalty + second.penalty, whole.penalty)


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [50, 700])
@pytest.mark.parametrize("shift", [0.0, -3.5])
def test_batchtopk_keeps_the_largest_of_the_batch(n, shift):
    """Also where the guess from a sample is too high (a few tokens hold most of what is large), or too little fires."""
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(n, 40, generator=g) + shift
    scores[1::7] += 4
    wanted = 3 * n
    layout, cut = select_in_batch(scores, wanted, ONE_PROCESS)
    positive = scores[scores > 0].sort(descending=True).values[:wanted]
    assert torch.equal(layout.take(scores).sort(descending=True).values, positive)
    assert cut == positive[-1]


def test_a_guess_that_leaves_too_few_is_given_up():
    scores = torch.full((512, 4), 0.1)
    scores[::2] = 5.0  # the sample sees only these
    layout, found = likely(scores, 1500)
    assert len(found) == scores.numel() == len(layout.feature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "sample is large", "sample is small", "ties", "empty"])
def test_the_largest_of_every_token_are_found(case, dtype):
    """Whatever the sample of features suggests: no bound is trusted."""
    scores = torch.randn(0 if case == "empty" else 200, 512, generator=torch.Generator().manual_seed(0))
    scores[:, :32] += {"sample is large": 5.0, "sample is small": -5.0}.get(case, 0.0)
    scores = scores.round() if case == "ties" else scores
    scores = scores.to(dtype)
    found, expected = largest_per_token(scores, 16), scores.topk(16, dim=-1).values
    assert torch.equal(scores.gather(1, found).sort(-1, descending=True).values, expected)
    assert all(len(row.unique()) == 16 for row in found)


def test_features_chosen_with_value_zero_have_not_fired():
    config = settings("topk")
    p, x, _, dead = problem(config)
    p["b_enc"].fill_(-100.0)
    outcome = computed(config, p, x, x, dead)
    assert not outcome.fires.any()


def test_the_auxiliary_loss_reaches_encoder_rows_that_never_fire():
    config = settings("topk auxk", auxk_latents=4)
    p, x, _, dead = problem(config)
    p["b_enc"][dead] = -50.0
    without = computed(settings("topk"), p, x, x, dead).gradients["encoder"]
    assert not without[dead].any()
    assert (computed(config, p, x, x, dead).gradients["encoder"][dead].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("latents", [1, 4])
def test_behind_a_relu_the_auxiliary_loss_reaches_only_what_is_positive(latents):
    """With one latent of four the sparse layout is used, with four the dense one."""
    config = settings("topk auxk", auxk_latents=latents, auxk_relu=True)
    p, x, _, _ = problem(config)
    dead = torch.arange(D_SAE) >= 4  # 12 dead features: one of them is few, four are many
    p["b_enc"][dead] = -50.0
    p["b_enc"][7] = 50.0
    gradients = computed(config, p, x, x, dead).gradients["encoder"]
    without = computed(settings("topk"), p, x, x, dead).gradients["encoder"]
    changed = ((gradients - without).norm(dim=-1) > 1e-9).nonzero()[:, 0].tolist()
    assert changed == [7]


def test_half_of_the_window_below_the_threshold_counts_as_much_as_the_half_above():
    """z = theta - 0.1 and theta + 0.1 in a window of 0.5: both give d L0 / d theta = -1 / 0.5."""
    config = settings("jumprelu step", ste_to_input=False)
    p = {"encoder": torch.ones(1, 1), "b_enc": torch.zeros(1), "decoder": torch.zeros(1, 1), "b_dec": torch.zeros(1)}
    p["threshold"] = torch.ones(1)
    for z in (0.9, 1.1):
        batch = Batch(torch.tensor([[z]]), torch.tensor([[z]]), 1, torch.zeros(1, dtype=torch.bool))
        gradient = parts_of(Architecture.jumprelu).loss(p, batch, config, 1.0).gradients["threshold"]
        assert gradient.item() == pytest.approx(-1 / 0.5)


def test_bfloat16_only_rounds_the_encoder():
    config = settings("topk")
    p, x, _, dead = problem(config)
    p, x = {name: tensor.float() for name, tensor in p.items()}, x.float()
    full = computed(config, p, x, x, dead)
    rounded = computed(replace(config, encoder_dtype=EncoderDtype.bfloat16), p, x, x, dead)
    assert all(gradient.dtype is torch.float32 for gradient in rounded.gradients.values())
    assert not torch.equal(full.error, rounded.error)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(full.gradients["encoder"].flatten(), rounded.gradients["encoder"].flatten(), dim=0) > 0.99


def test_indices_of_k_features_make_a_layout():
    layout = rows_of(torch.tensor([[2, 0], [1, 2]]), 3)
    assert layout.token.tolist() == [0, 0, 1, 1] and layout.starts.tolist() == [0, 2]
