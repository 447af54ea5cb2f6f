"""Training: folding changes nothing, dead features and only they are replaced, schedules, controllers, exact resume."""

from dataclasses import replace
from math import cos, pi, sqrt

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from saerl_cli.config.sae import (
    Architecture,
    Centre,
    Controller,
    DecoderNorm,
    EncoderDtype,
    InputScale,
    L1Unit,
    LrShape,
    Optimizer,
    Penalty,
    Resample,
    SaeConfig,
)
from saerl_cli.config.settings import suited
from saerl_cli.sae.loop import train_saes, training
from saerl_cli.sae.train import SaeTrainer

VALUES = {"expansion": 4, "k": 4, "l1": 1.0, "tokens": 64 * 40, "batch_size": 64, "resample": Resample.none}
SMALL = suited(SaeConfig, VALUES)
KINDS = {
    **{a.value: {"architecture": a} for a in Architecture},
    "relu_unit": {"architecture": Architecture.relu, "decoder_norm": DecoderNorm.unit},
    "tied": {"architecture": Architecture.relu, "decoder_norm": DecoderNorm.unit, "tied": True},
    "no b_dec": {"architecture": Architecture.relu, "centre": Centre.off},
    "auto": {
        "architecture": Architecture.relu,
        "controller": Controller.auto,
        "target_l0": 3.0,
        "control_every": 3,
        "control_band": 0.1,
    },
    "signum": {"optimizer": Optimizer.signum, "decoder_norm": DecoderNorm.unit},
    "auxk": {"architecture": Architecture.matryoshka, "auxk": 1 / 32, "dead_after_tokens": 320},
    "wakes": {"architecture": Architecture.jumprelu, "preact": 1e-3, "dead_after_tokens": 320},
    "bf16": {"encoder_dtype": EncoderDtype.bfloat16},
}


def settings(kind: str, **changes) -> SaeConfig:
    return suited(SaeConfig, VALUES | KINDS[kind] | changes)


def data(count=40, n=64, d_in=12, directions=20, seed=0, offset=3.0):
    """Sparse combinations of fixed directions with a large mean, far from unit scale."""
    g = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(directions, d_in, generator=g)
    weights = torch.rand(count, n, directions, generator=g)
    weights = weights * (torch.rand(count, n, directions, generator=g) < 0.15)
    return 7 * (weights @ dictionary) + offset


def trained(kind: str, batches, **changes) -> SaeTrainer:
    trainer = SaeTrainer(batches.shape[-1], settings(kind, **changes))
    for x in batches:
        trainer.step(x)
    return trainer


def scaled_forward(trainer: SaeTrainer, x):
    """Activations and reconstruction from the training parameters on scaled inputs, densely and by definition."""
    p, c = {name: tensor.detach() for name, tensor in trainer.p.items()}, trainer.config
    if c.optimizer is Optimizer.signum:
        p = {name: trainer.optimizer.result(tensor) for name, tensor in trainer.p.items()}
    product = (x * trainer.scale - p["b_dec"]) @ p["encoder"].T
    pre, norm = product + p["b_enc"], p["decoder"].norm(dim=-1)
    if c.architecture is Architecture.topk:
        chosen = (pre * norm).topk(c.k, dim=-1).indices
        f = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen).relu())
    elif c.architecture in (Architecture.batchtopk, Architecture.matryoshka):
        f = pre.relu() * (pre * norm >= trainer.cut)
    elif c.architecture is Architecture.jumprelu:
        f = pre * (pre > p["threshold"])
    elif c.architecture is Architecture.gated:
        f = (product * p["r_mag"].exp() + p["b_mag"]).relu() * (pre > 0)
    else:
        f = pre.relu()
    return f * norm / trainer.scale, (f @ p["decoder"] + p["b_dec"]) / trainer.scale


# --- scale and fold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bf16"])
def test_the_saved_sae_on_raw_activations_equals_training_on_scaled_ones(kind):
    trainer, x = trained(kind, data()), data(1, seed=5)[0]
    f, reconstruction = scaled_forward(trainer, x)
    sae = trainer.finish()
    assert (f > 0).sum() > 0
    assert torch.allclose(sae(x), reconstruction, atol=1e-3)
    assert torch.allclose(sae.encode(x), f, atol=1e-3)
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(48), atol=1e-6)


def test_a_gated_sae_is_the_jumprelu_it_is_saved_as_with_any_gates():
    trainer, x = trained("gated", data(3)), data(1, seed=5)[0]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("r_mag", "b_mag", "b_enc"):
            trainer.p[name].copy_(torch.randn(48, generator=g))
    f, _ = scaled_forward(trainer, x)
    assert torch.allclose(trainer.finish().encode(x), f, atol=1e-4)


@pytest.mark.parametrize(("scale", "size"), [("norm", sqrt(12)), ("rms", 1.0)])
def test_inputs_are_scaled_and_centred(scale, size):
    x = data(1)[0]
    trainer = SaeTrainer(12, replace(SMALL, lr=1e-12, scale=InputScale(scale)))
    trainer.step(x)
    scaled = x * trainer.scale
    measured = scaled.norm(dim=-1).mean() if scale == "norm" else scaled.square().sum(-1).mean().sqrt()
    assert measured == pytest.approx(size, rel=1e-5)
    assert torch.allclose(trainer.p["b_dec"], x.mean(0) * trainer.scale, atol=1e-5)


def test_inputs_can_be_left_as_they_are():
    trainer = trained("topk", data(1), scale=InputScale.none, centre=Centre.zeros, lr=1e-12)
    assert trainer.scale == 1 and trainer.p["b_dec"].abs().max() < 1e-9


def test_the_geometric_median_ignores_a_far_point():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [1e4, 1e4]])
    trainer = SaeTrainer(2, replace(SMALL, k=1, lr=1e-12, centre=Centre.median, scale=InputScale.none, batch_size=5))
    trainer.step(x)
    assert trainer.p["b_dec"].max() < 3  # the mean is 2000.8; by symmetry the median lies on the diagonal
    assert trainer.p["b_dec"][0] == pytest.approx(float(trainer.p["b_dec"][1]), rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("no b_dec", "bf16")])
def test_the_scale_of_the_data_does_not_change_what_is_learned(kind):
    small, large = trained(kind, data()).finish(), trained(kind, data() * 1024).finish()
    x = data(1, seed=3)[0]
    assert torch.allclose(small(x), large(x * 1024) / 1024, atol=1e-2)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "gated"])
def test_training_reconstructs_sparse_data(kind):
    sae = trained(kind, data(600), k=5, tokens=64 * 600, lr=5e-3, l1=0.3, l0=0.1).finish()
    x = data(4, seed=0)[2]
    fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.1


# --- what each form promises -----------------------------------------------------------------------------------------


def test_unit_norm_rows_stay_unit_and_get_no_gradient_along_themselves():
    trainer = SaeTrainer(12, settings("relu_unit"))
    for x in data(5):
        trainer.step(x)
        assert torch.allclose(trainer.p["decoder"].norm(dim=-1), torch.ones(48), atol=1e-6)
        before = trainer.p["decoder"].detach().clone()
    x = data(1)[0] * trainer.scale
    trainer.backward(trainer._batch(x, x, 64), 1.0)
    grad = trainer.p["decoder"].grad
    assert grad.abs().sum() > 0
    assert (grad * before).sum(-1).abs().max() < 1e-5


def test_renormalised_rows_keep_the_gradient_along_themselves():
    """Newhouse and Bashkansky (2023) divided by the norm after the step and did nothing else."""
    trainer = trained("relu_unit", data(5), decoder_norm=DecoderNorm.renormalised)
    assert torch.allclose(trainer.p["decoder"].norm(dim=-1), torch.ones(48), atol=1e-6)
    x = data(1)[0] * trainer.scale
    trainer.backward(trainer._batch(x, x, 64), 1.0)
    assert (trainer.p["decoder"].grad * trainer.p["decoder"]).sum(-1).abs().max() > 1e-4


def test_a_tied_encoder_is_the_decoder():
    sae = trained("tied", data()).finish()
    assert torch.allclose(sae.W_enc.T, sae.W_dec, atol=1e-6)


def test_more_l1_fires_fewer_features():
    fired = []
    for l1 in (0.1, 3.0):
        sae = trained("relu", data(), l1=l1, lr=5e-3).finish()
        fired.append(float((sae.encode(data(1)[0]) > 0).float().sum(-1).mean()))
    assert fired[1] < 0.7 * fired[0]


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_ten_steps_give_a_threshold_that_keeps_k_features_a_token(kind):
    """A moving average that starts at 0 gives several times k after a short run."""
    batches = torch.randn(11, 512, 32, generator=torch.Generator().manual_seed(0))
    trainer = trained(kind, batches[:10], k=8, tokens=5120, batch_size=512, expansion=8)
    l0 = (trainer.finish().encode(batches[10]) > 0).float().sum(-1).mean()
    assert l0 == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_the_controller_reaches_its_target(kind):
    """From both sides: the weight begins far too small, and far too large."""
    norm = DecoderNorm.unit if kind == "gated" else DecoderNorm.free  # free norms let a gated SAE evade its L1
    for weight in (0.05, 3.0):
        trainer = trained(
            kind, data(2000), tokens=64 * 2000, l1=weight, l0=weight, lr=3e-3, l1_warmup=0.0, decoder_norm=norm,
            controller=Controller.auto, penalty=Penalty.tanh, target_l0=4.0, control_every=10, control_band=0.2,
        )  # fmt: skip
        l0 = (trainer.finish().encode(data(1, n=1000)[0]) > 0).float().sum(-1).mean()
        assert l0 == pytest.approx(4.0, abs=1.5), weight
        assert trainer.factor < 1 if weight > 1 else trainer.factor != 1


def test_the_controller_waits_and_has_a_dead_band():
    changes = {"control_after_tokens": 64 * 20, "control_every": 5, "lr": 1e-12, "l1_warmup": 0.0}
    trainer = SaeTrainer(12, settings("auto", **changes))
    factors = []
    for x in data():
        trainer.step(x)
        factors.append(float(trainer.factor))
    assert factors[:24] == [1.0] * 24  # decisions every 5 steps, none within the first 20
    assert factors[-1] == pytest.approx(1.1**4)  # about half of all features fire: far above the target
    calm = trained("auto", data(), **(changes | {"control_band": 1000.0}))
    assert calm.factor == 1


@pytest.mark.parametrize(
    ("unit", "factor"), [("canonical", 1.0), ("mean_over_dims", 12.0), ("batch_sum", 64.0), ("fvu", None)]
)
def test_coefficients_of_other_conventions_are_converted(unit, factor):
    trainer = trained("relu", data(1), l1=0.5, l1_unit=L1Unit(unit), l1_warmup=0.0)
    x = data(1)[0] * trainer.scale
    variance = float((x - x.mean(0)).square().sum(-1).mean())
    assert trainer.weight() == pytest.approx(0.5 * (factor or variance), rel=1e-4)


def test_fused_adam_steps_like_the_plain_one():
    fused, plain = SaeTrainer(12, SMALL), SaeTrainer(12, SMALL)
    adam = torch.optim.Adam(plain.parameters(), lr=SMALL.lr, foreach=False, fused=False)
    plain.optimizer._adam, plain.optimizer.state = adam, adam.state
    for x in data(10):
        fused.step(x)
        plain.step(x)
    assert all(torch.allclose(fused.p[name], tensor, atol=1e-6) for name, tensor in plain.p.items())


def test_schedule_free_signum_by_hand():
    """One number, gradients 1, 1, -1, lr 0.1, momentum 0.5: z, the average x, and y between them."""
    from saerl_cli.sae.optimizers import ScheduleFreeSignum

    y = torch.tensor([0.0])
    optimizer = ScheduleFreeSignum([y], replace(SMALL, optimizer=Optimizer.signum, beta1=0.5))
    z, x = 0.0, 0.0
    for step, gradient in enumerate((3.0, 0.2, -7.0), start=1):
        y.grad = torch.tensor([gradient])
        optimizer.step(0.1)
        z -= 0.1 * (1 if gradient > 0 else -1)
        x += (z - x) / step
        assert y.item() == pytest.approx(0.5 * x + 0.5 * z, abs=1e-6)
        assert optimizer.result(y).item() == pytest.approx(x, abs=1e-6)


# --- dead features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [Resample.loss, Resample.random])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("auxk", "wakes", "bf16", "auto")])
def test_resampling_replaces_dead_features_and_nothing_else(kind, resample):
    trainer = SaeTrainer(12, settings(kind, resample=resample, dead_after_tokens=640, resample_every_tokens=64_000))
    batches = data(20)
    trainer.step(batches[0])
    dead = torch.tensor([3, 17, 40])
    for x in batches[1:]:
        trainer.step(x)
    trainer.firing.silent.zero_()
    trainer.firing.silent[dead] = 640
    before = {key: tensor.clone() for key, tensor in trainer.state().items()}
    x = batches[0] * trainer.scale
    batch = trainer._batch(x, x, 64)
    trainer._resample(batch, torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), None)
    after = trainer.state()
    others = torch.ones(48, dtype=torch.bool)
    others[dead] = False
    for key, tensor in after.items():
        if key in ("fires", "seen"):
            assert not tensor.any()
        elif tensor.ndim and len(tensor) == 48:
            assert torch.equal(tensor[others], before[key][others]), key
        else:
            assert torch.equal(tensor, before[key]), key
    assert not torch.equal(after["decoder"][dead], before["decoder"][dead])
    moments = [key for key in after if key.endswith(("exp_avg", "exp_avg_sq")) and "b_dec" not in key]
    assert all(not after[key][dead].any() for key in moments)
    assert len(moments) == (0 if kind == "signum" else 4 if kind == "tied" else 6 + 2 * (len(trainer.p) - 4))
    assert not after["b_enc"][dead].any() and not after["silent"][dead].any()
    alive_norm = before["decoder"][others].norm(dim=-1).mean()
    assert torch.allclose(after["decoder"][dead].norm(dim=-1), alive_norm.expand(3), atol=1e-5)
    if resample is Resample.loss:
        directions = normalize(after["decoder"][dead], dim=-1)
        assert (directions @ normalize(batch.x, dim=-1).T).max(-1).values.min() > 1 - 1e-5  # each points at an input
        if kind != "tied":
            ratio = trainer.p["encoder"][dead].norm(dim=-1) / before["encoder"][others].norm(dim=-1).mean()
            assert torch.allclose(ratio, torch.full((3,), 0.2), atol=1e-5)


def test_resampling_prefers_inputs_with_a_large_loss():
    trainer = SaeTrainer(12, replace(SMALL, dead_after_tokens=1000, resample=Resample.loss))
    x, error = data(1)[0], torch.full((64, 12), 1e-3)
    trainer.step(x)
    trainer.firing.silent[5] = 2000
    error[7] = 10.0  # its squared loss outweighs that of all others together by 10^14
    scaled = x * trainer.scale
    batch = trainer._batch(scaled, scaled, 64)
    trainer._resample(batch, error, None)
    cosine = cosine_similarity(trainer.p["decoder"][5], batch.x, dim=-1)
    assert cosine.argmax() == 7 and cosine.max() > 1 - 1e-5


def test_features_that_fire_too_rarely_are_replaced_too():
    """Nanda (2023): a firing rate below a bound since the last look, however recently the feature fired."""
    trainer = trained("topk", data(10), dead_below_rate=0.05, resample=Resample.loss, resample_every_tokens=10**9)
    trainer.firing.fires.fill_(100)
    trainer.firing.fires[7] = 31  # of 640 tokens: 4.8 %
    assert trainer.firing.rare().nonzero()[:, 0].tolist() == [7]
    assert not trainer.firing.dead().any()


def test_firing_counts_tokens():
    trainer = trained("topk", data(10), dead_after_tokens=200)
    fired = (trainer.firing.fires > 0).sum()
    assert trainer.firing.seen == 640 and 0 < fired <= 48
    assert trainer.firing.fires.sum() <= 640 * 4
    never = trainer.firing.fires == 0
    assert (trainer.firing.silent[never] == 640).all()
    assert torch.equal(trainer.firing.dead(), trainer.firing.silent >= 200)


def test_no_resampling_while_the_learning_rate_falls():
    from saerl_cli.sae import dead

    config = replace(SMALL, resample=Resample.loss, resample_every_tokens=64, lr_decay=0.25)
    assert [dead.due(config, step) for step in range(40)] == [step < 30 for step in range(40)]


def test_auxk_revives_features_that_fire_nowhere():
    """Ten of 48 features start with a bias that silences them; the main loss alone never reaches them."""
    alive = {}
    for auxk in (0.0, 1 / 32):
        trainer = SaeTrainer(12, replace(SMALL, tokens=64 * 400, auxk=auxk, dead_after_tokens=640, lr=5e-3))
        trainer.p["b_enc"].data[:10] = -0.5
        for x in data(400):
            trainer.step(x)
        alive[auxk] = int((trainer.firing.silent[:10] < 640).sum())
    assert alive[0.0] == 0 and alive[1 / 32] >= 4


# --- transcoders and starting points ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [a.value for a in Architecture])
def test_a_transcoder_learns_a_map_and_is_folded_for_raw_activations(kind):
    x = data(400)
    y = 3 * x @ torch.randn(12, 7, generator=torch.Generator().manual_seed(9)) - 5
    trainer = SaeTrainer(12, settings(kind, tokens=64 * 400, lr=5e-3, l1=0.1, l0=0.1), d_out=7)
    for inputs, target in zip(x, y, strict=True):
        trainer.step(inputs, target)
    sae = trainer.finish()
    assert sae.transcoder and sae.W_dec.shape == (48, 7)
    error = (sae(x[3]) - y[3]).square().sum() / (y[3] - y[3].mean(0)).square().sum()
    assert error < 0.2
    p = trainer.p
    pre = (x[3] * trainer.scale - trainer.offset) @ p["encoder"].T + p["b_enc"]
    if kind == "relu":
        expected = (pre.relu() @ p["decoder"] + p["b_dec"]) / trainer.target_scale
        assert torch.allclose(sae(x[3]), expected, atol=1e-3)


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated"])
def test_training_continues_from_a_saved_sae(kind, transcoder):
    """After a step of no size, what comes out is what went in."""
    x = data(40)
    y = x @ torch.randn(12, 7, generator=torch.Generator().manual_seed(9)) if transcoder else [None] * 40
    d_out = 7 if transcoder else None
    first = SaeTrainer(12, settings(kind), d_out=d_out)
    for inputs, target in zip(x, y, strict=True):
        first.step(inputs, target)
    saved = first.finish()
    second = SaeTrainer(12, settings(kind, lr=1e-12), d_out=d_out, start=saved)
    second.step(x[5] * 0.5, None if y[5] is None else y[5])
    again = second.finish()
    assert torch.allclose(again.encode(x[7]), saved.encode(x[7]), atol=2e-4)
    assert torch.allclose(again(x[7]), saved(x[7]), atol=2e-3)


def test_a_starting_point_of_another_shape_is_refused():
    saved = trained("topk", data(3)).finish()
    with pytest.raises(ValueError, match="sae.init_from has d_in, d_sae, d_out"):
        SaeTrainer(12, replace(SMALL, expansion=8), start=saved)


# --- loop ------------------------------------------------------------------------------------------------------------


def test_learning_rate_and_l1_follow_their_schedules():
    config = settings("relu", lr=1.0, lr_warmup=0.25, lr_decay=0.5, l1=2.0, l1_warmup=0.5)
    trainer = SaeTrainer(12, config)
    in_steps = SaeTrainer(12, replace(config, lr_warmup=10, lr_decay=20, l1_warmup=20))
    rates, weights = [], []
    for step in range(40):
        trainer.step_number = in_steps.step_number = step
        rates.append(trainer.learning_rate())
        weights.append(trainer.weight())
        assert (in_steps.learning_rate(), in_steps.weight()) == pytest.approx((rates[-1], weights[-1]))
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:21] == pytest.approx([1.0] * 11)
    assert rates[-1] == pytest.approx(1 / 20)
    assert weights[0] == pytest.approx(0.1) and weights[19:] == pytest.approx([2.0] * 21)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_does_not_change_training(kind):
    config = settings(kind, resample=Resample.loss, resample_every_tokens=640)
    often, never = SaeTrainer(12, config), SaeTrainer(12, config)
    for _ in training(data(), {"a": often}, log_every=1):
        pass
    for x in data():
        never.step(x)
    assert all(torch.equal(a, never.state()[key]) for key, a in often.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_trainer_continues_to_the_bit(kind):
    changes = {"resample": Resample.loss, "resample_every_tokens": 320, "lr": 1e-2}
    config = settings(kind, **({"dead_after_tokens": 320} | changes))
    batches = data()
    whole, first = SaeTrainer(12, config), SaeTrainer(12, config)
    for x in batches:
        whole.step(x)
    for x in batches[:13]:
        first.step(x)
    second = SaeTrainer(12, config)
    second.load_state({key: tensor.clone() for key, tensor in first.state().items()})
    for x in batches[13:]:
        second.step(x)
    assert set(whole.state()) == set(second.state())
    assert all(torch.equal(tensor, second.state()[key]) for key, tensor in whole.state().items())
    assert all(
        torch.equal(a, b) for a, b in zip(whole.finish().parameters(), second.finish().parameters(), strict=True)
    )


def test_a_cosine_learning_rate_meets_the_linear_one_at_its_ends_and_middle():
    linear = SaeTrainer(12, replace(SMALL, lr=1.0, lr_warmup=0.5, lr_decay=0.5))
    cosine = SaeTrainer(12, replace(linear.config, lr_shape=LrShape.cosine))
    for step, expected in ((9, 0.5), (19, 1.0), (4, (1 - cos(pi / 4)) / 2)):
        linear.step_number = cosine.step_number = step
        assert cosine.learning_rate() == pytest.approx(expected)
        assert linear.learning_rate() == pytest.approx((step + 1) / 20)


def test_without_clipping_gradients_keep_their_length():
    lengths = []
    for limit in (None, 1e-3):
        trainer = trained("topk", data(2), max_grad_norm=limit)
        lengths.append(sum(float(p.grad.square().sum()) for p in trainer.parameters()) ** 0.5)
    assert lengths[1] == pytest.approx(1e-3, rel=1e-3) and lengths[0] > 1e-2


def test_several_saes_in_one_pass_equal_each_alone():
    configs = [SMALL, replace(SMALL, k=2, seed=3), settings("relu"), settings("jumprelu", tokens=64 * 20)]
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


def test_trainers_read_the_places_they_are_given():
    batches = [{"in": x, "out": x[:, :7]} for x in data()]
    trainers = {"s": SaeTrainer(12, SMALL), "t": SaeTrainer(12, SMALL, d_out=7)}
    for _ in training(batches, trainers, places={"s": ("in", None), "t": ("in", "out")}):
        pass
    alone = trained("topk", data())
    assert torch.equal(trainers["s"].p["decoder"], alone.p["decoder"])
    assert trainers["t"].finish()(batches[0]["in"]).shape == (64, 7)


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="ended after 7 of 40 batches"):
        train_saes(data(7), [SMALL])
    with pytest.raises(ValueError, match="no activations"):
        train_saes([], [SMALL])


@pytest.mark.parametrize("kind", KINDS)
def test_activations_that_are_not_finite_name_the_step(kind):
    trainer = SaeTrainer(12, settings(kind))
    trainer.name = "mlp_out.3"
    batches = data()
    batches[2, 5, 1] = float("nan")
    with pytest.raises(ValueError, match="step 3: activations at mlp_out.3 are NaN or infinite"):
        for x in batches:
            trainer.step(x)


def test_a_batch_of_nothing_but_outliers_stops_the_run():
    trainer = trained("topk", data(2))
    with pytest.raises(ValueError, match="step 3: no activation is left of the batch"):
        trainer.step(torch.empty(0, 12))


def test_a_gradient_that_is_not_finite_names_the_step():
    trainer = trained("topk", data(2))
    trainer.p["decoder"].data[3] = float("inf")
    with pytest.raises(ValueError, match="step 3: the gradient of the SAE at SAE is nan; lower sae.lr"):
        trainer.step(data(1)[0])
