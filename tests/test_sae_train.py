"""Training: the sparse step equals the dense one, folding changes nothing, dead features and only they are replaced."""

from dataclasses import replace

import pytest
import torch

from saerl_cli.config.sae import Architecture, DecoderNorm, Resample, SaeConfig
from saerl_cli.sae import sparse
from saerl_cli.sae.train import PARAMETERS, SaeTrainer, train_saes, training

SMALL = SaeConfig(expansion=4, k=4, tokens=64 * 40, batch_size=64, resample=Resample.none)
ARCHITECTURES = [Architecture.topk, Architecture.relu]


def data(count=40, n=64, d_in=12, directions=20, seed=0, offset=3.0):
    """Sparse combinations of fixed directions with a large mean, far from unit scale."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(directions, d_in, generator=g)
    weights = torch.rand(count, n, directions, generator=g)
    weights = weights * (torch.rand(count, n, directions, generator=g) < 0.15)
    return 7 * (weights @ dictionary) + offset


def parameters(d_in=6, d_sae=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, d_sae, d_in, generator=g)
    return [encoder, torch.randn(d_sae, generator=g), decoder, torch.randn(d_in, generator=g)]


# --- the sparse step -------------------------------------------------------------------------------------------------


def dense_topk(x, encoder, b_enc, decoder, b_dec, k):
    """The same autoencoder with dense matrices and autograd."""
    pre = (x - b_dec) @ encoder.T + b_enc
    chosen = (pre * decoder.norm(dim=-1)).topk(k, dim=-1).indices
    f = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())
    return f, f @ decoder + b_dec


@pytest.mark.parametrize(("n", "k"), [(30, 3), (1, 1), (5, 16)])
def test_sparse_forward_and_gradients_equal_dense_autograd(n, k):
    p = [tensor.double().requires_grad_() for tensor in parameters()]
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f, expected = dense_topk(x, *p, k=k)
    ((expected - x).square().sum() / 50).backward()
    with torch.no_grad():
        values, indices = sparse.select(x, *p, k=k)
        reconstruction = sparse.reconstruct(values, indices, p[2], p[3])
        grads = sparse.gradients(x, values, indices, reconstruction - x, p[0], p[2], p[3], total=50)
    assert torch.allclose(torch.zeros_like(f).scatter(1, indices, values), f, atol=1e-12)
    assert torch.allclose(reconstruction, expected, atol=1e-12)
    for name, parameter, grad in zip(PARAMETERS, p, grads, strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-12), name


def test_a_process_without_tokens_contributes_zero_gradient():
    p = parameters()
    x = torch.empty(0, 6)
    values, indices = sparse.select(x, *p, k=3)
    error = sparse.reconstruct(values, indices, p[2], p[3]) - x
    grads = sparse.gradients(x, values, indices, error, p[0], p[2], p[3], total=10)
    assert all(grad.shape == parameter.shape and not grad.any() for grad, parameter in zip(grads, p, strict=True))


def test_fused_adam_steps_like_the_plain_one():
    batches = data(10)
    fused, plain = SaeTrainer(12, SMALL), SaeTrainer(12, SMALL)
    plain.optimizer = torch.optim.Adam(plain.parameters(), lr=SMALL.lr, foreach=False, fused=False)
    for x in batches:
        fused.step(x)
        plain.step(x)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_l1_weighs_activations_by_free_decoder_norms():
    """d_in = 1, one feature, x = 2, f = 3, |D| = 2, l1 = 5: loss (3 * 2 - 2)^2 + 5 * 3 * 2, gradients by hand."""
    config = SaeConfig(
        architecture=Architecture.relu, expansion=1, l1=5.0, l1_warmup=0, tokens=10, batch_size=1,
        max_grad_norm=1e9,
    )  # fmt: skip
    trainer = SaeTrainer(1, config)
    with torch.no_grad():
        for parameter, value in zip(trainer.parameters(), (1.5, 0.0, 2.0, 0.0), strict=True):
            parameter.fill_(value)
    trainer._backward(torch.tensor([[2.0]]), 1)
    d_f = 2 * 4 * 2 + 5 * 2  # of the error, of the L1
    assert trainer.decoder.grad.item() == pytest.approx(2 * 4 * 3 + 5 * 3)
    assert trainer.encoder.grad.item() == pytest.approx(d_f * 2)
    assert trainer.b_enc.grad.item() == pytest.approx(d_f)
    assert trainer.b_dec.grad.item() == pytest.approx(2 * 4 - d_f * 1.5)


def test_unit_norm_rows_stay_unit_and_get_no_gradient_along_themselves():
    trainer = SaeTrainer(12, replace(SMALL, architecture=Architecture.relu, decoder_norm=DecoderNorm.unit))
    for x in data(5):
        trainer.step(x)
        assert torch.allclose(trainer.decoder.norm(dim=-1), torch.ones(48), atol=1e-6)
        before = trainer.decoder / trainer.decoder.norm(dim=-1, keepdim=True)
    trainer._backward(data(1)[0] * trainer.scale, 64)
    assert trainer.decoder.grad.abs().sum() > 0
    assert (trainer.decoder.grad * before).sum(-1).abs().max() < 1e-5


def test_more_l1_fires_fewer_features():
    x = data(40)
    fired = []
    for l1 in (0.1, 3.0):
        config = replace(SMALL, architecture=Architecture.relu, l1=l1, lr=5e-3)
        sae = train_saes(x, [config])[0]
        fired.append(float((sae.encode(x[0]) > 0).float().sum(-1).mean()))
    assert fired[1] < 0.7 * fired[0]


# --- scale and fold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_saved_sae_on_raw_activations_equals_training_on_scaled_ones(architecture):
    trainer = SaeTrainer(12, replace(SMALL, architecture=architecture))
    for x in data():
        trainer.step(x)
    sae, x = trainer.finish(), data(1, seed=5)[0]
    scaled = x * trainer.scale
    if architecture is Architecture.topk:
        f, reconstruction = dense_topk(scaled, *trainer.parameters(), k=4)
    else:
        f = ((scaled - trainer.b_dec) @ trainer.encoder.T + trainer.b_enc).relu()
        reconstruction = f @ trainer.decoder + trainer.b_dec
    assert (f > 0).sum() > 0
    assert torch.allclose(sae(x), reconstruction / trainer.scale, atol=1e-4)
    assert torch.allclose(sae.encode(x), f * trainer.decoder.norm(dim=-1) / trainer.scale, atol=1e-4)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(48), atol=1e-6)


def test_inputs_are_scaled_to_mean_norm_sqrt_d_in_and_centred():
    x = data(1)[0]
    trainer = SaeTrainer(12, replace(SMALL, lr=1e-12))
    trainer.step(x)
    assert (x * trainer.scale).norm(dim=-1).mean() == pytest.approx(12**0.5, rel=1e-5)
    assert torch.allclose(trainer.b_dec, x.mean(0) * trainer.scale, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scale_of_the_data_does_not_change_what_is_learned(architecture):
    config = replace(SMALL, architecture=architecture)
    small, large = train_saes(data(), [config])[0], train_saes(data() * 1024, [config])[0]
    x = data(1, seed=3)[0]
    assert torch.allclose(small(x), large(x * 1024) / 1024, atol=1e-4)


def test_training_reconstructs_sparse_data():
    config = replace(SMALL, k=5, tokens=64 * 600, lr=5e-3)
    sae = train_saes(data(600), [config])[0]
    x = data(4, seed=0)[2]
    fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.1


# --- dead features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resampling_replaces_dead_features_and_nothing_else(architecture):
    config = replace(
        SMALL, architecture=architecture, resample=Resample.loss, dead_after_tokens=640, resample_every_tokens=640 * 100
    )
    trainer = SaeTrainer(12, config)
    batches = data(20)
    trainer.step(batches[0])
    dead = torch.tensor([3, 17, 40])
    with torch.no_grad():
        trainer.b_enc[dead] = -1e4
    for x in batches[1:]:
        trainer.step(x)
    assert (trainer.silent >= 640).nonzero()[:, 0].tolist() == dead.tolist()
    before = {key: tensor.clone() for key, tensor in trainer.state().items()}
    x = batches[0] * trainer.scale
    trainer._resample(x, torch.randn(64, 12), None)
    after = trainer.state()
    others = torch.ones(48, dtype=torch.bool)
    others[dead] = False
    for key, tensor in after.items():
        if tensor.ndim and len(tensor) == 48:
            assert torch.equal(tensor[others], before[key][others]), key
        else:
            assert torch.equal(tensor, before[key]), key
    moments = [key for key in after if key.endswith(("exp_avg", "exp_avg_sq")) and "b_dec" not in key]
    assert len(moments) == 6 and all(not after[key][dead].any() for key in moments)
    assert not after["b_enc"][dead].any() and not after["silent"][dead].any()
    directions = after["decoder"][dead] / after["decoder"][dead].norm(dim=-1, keepdim=True)
    inputs = torch.nn.functional.normalize(x - trainer.b_dec, dim=-1)
    assert (directions @ inputs.T).max(-1).values.min() > 1 - 1e-5  # each points at an input
    alive_norm = before["decoder"][others].norm(dim=-1).mean()
    assert torch.allclose(after["decoder"][dead].norm(dim=-1), alive_norm.expand(3), atol=1e-5)
    ratio = after["encoder"][dead].norm(dim=-1) / before["encoder"][others].norm(dim=-1).mean()
    assert torch.allclose(ratio, torch.full((3,), 0.2), atol=1e-5)


def test_resampling_prefers_inputs_with_a_large_loss():
    trainer = SaeTrainer(12, replace(SMALL, dead_after_tokens=1000))
    x, error = data(1)[0], torch.full((64, 12), 1e-3)
    trainer.step(x)
    trainer.silent[5] = 2000
    error[7] = 10.0  # its squared loss outweighs that of all others together by 10^14
    trainer._resample(x, error, None)
    cosine = torch.nn.functional.cosine_similarity(trainer.decoder[5], x - trainer.b_dec, dim=-1)
    assert cosine.argmax() == 7 and cosine.max() > 1 - 1e-5


def test_features_that_are_chosen_with_value_zero_have_not_fired():
    trainer = SaeTrainer(12, SMALL)
    trainer.step(data(1)[0])
    with torch.no_grad():
        trainer.b_enc.fill_(-100.0)
    _, fired, active, _ = trainer._backward(data(1)[0] * trainer.scale, 64)
    assert not fired.any() and active == 0


def test_no_resampling_while_the_learning_rate_falls():
    config = replace(SMALL, resample=Resample.loss, resample_every_tokens=64, lr_decay=0.25)
    trainer = SaeTrainer(12, config)
    due = []
    for step in range(trainer.steps):
        trainer.step_number = step
        due.append(trainer._resampling_due())
    assert due == [step < 30 for step in range(40)]


# --- loop ------------------------------------------------------------------------------------------------------------


def test_learning_rate_and_l1_follow_their_schedules():
    config = replace(SMALL, lr=1.0, lr_warmup=0.25, lr_decay=0.5, l1=2.0, l1_warmup=0.5)
    trainer = SaeTrainer(12, config)
    rates, weights = [], []
    for step in range(40):
        trainer.step_number = step
        rates.append(trainer._learning_rate())
        weights.append(trainer._l1())
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:21] == pytest.approx([1.0] * 11)
    assert rates[-1] == pytest.approx(1 / 20)
    assert weights[0] == pytest.approx(0.1) and weights[19:] == pytest.approx([2.0] * 21)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_measuring_does_not_change_training(architecture):
    config = replace(SMALL, architecture=architecture, resample=Resample.loss, resample_every_tokens=640)
    often, never = SaeTrainer(12, config), SaeTrainer(12, config)
    for _ in training(data(), {"a": often}, log_every=1):
        pass
    for x in data():
        never.step(x)
    assert all(torch.equal(a, never.state()[key]) for key, a in often.state().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_restored_trainer_continues_to_the_bit(architecture):
    config = replace(SMALL, architecture=architecture, resample=Resample.loss, resample_every_tokens=320,
                     dead_after_tokens=320, lr=1e-2)  # fmt: skip
    batches = data()
    whole, first = SaeTrainer(12, config), SaeTrainer(12, config)
    for x in batches:
        whole.step(x)
    for x in batches[:13]:
        first.step(x)
    second = SaeTrainer(12, replace(config, seed=config.seed))
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for x in batches[13:]:
        second.step(x)
    assert set(whole.state()) == set(second.state())
    assert all(torch.equal(tensor, second.state()[key]) for key, tensor in whole.state().items())


def test_several_saes_in_one_pass_equal_each_alone():
    configs = [SMALL, replace(SMALL, k=2, seed=3), replace(SMALL, architecture=Architecture.relu)]
    together = train_saes(iter(data()), configs)
    for sae, config in zip(together, configs, strict=True):
        alone = train_saes(data(), [config])[0]
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), alone.parameters(), strict=True))


def test_sites_are_trained_by_name():
    batches = ({"a": x, "b": x[:, :5]} for x in data())
    saes = train_saes(batches, {"a": SMALL, "b": SMALL})
    assert {name: (sae.site, sae.d_in, sae.d_sae) for name, sae in saes.items()} == {
        "a": ("a", 12, 48),
        "b": ("b", 5, 20),
    }


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="ended after 7 of 40 batches"):
        train_saes(data(7), [SMALL])
    with pytest.raises(ValueError, match="no activations"):
        train_saes([], [SMALL])


def test_a_gradient_that_is_not_finite_names_the_step():
    trainer = SaeTrainer(12, SMALL, name="mlp_out.3")
    batches = data()
    batches[2, 5, 1] = float("inf")
    with pytest.raises(ValueError, match="step 2: the gradient of the SAE at mlp_out.3 is nan"):
        for x in batches:
            trainer.step(x)
