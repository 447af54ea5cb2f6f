"""The oracles themselves: values and gradients computed by hand, and by other libraries where the formula is theirs."""

import pytest
import torch
from sae_fixtures import ask_peers
from sae_oracles import LOSS, Settings, gradients
from safetensors.torch import load_file, save_file
from torch import tensor

C = torch.zeros(1)


def one_feature(decoder=2.0, **more):
    """d_in = d_out = d_sae = 1: z = x - 0.5, x_hat = decoder f + 0.5."""
    params = {"encoder": [[1.0]], "b_enc": [0.0], "decoder": [[decoder]], "b_dec": [0.5]} | more
    return {name: tensor(value) for name, value in params.items()}


def run(architecture, params, x, settings, y=None):
    x = tensor(x)[:, None] if not isinstance(x[0], list) else tensor(x)
    y = x if y is None else tensor(y)[:, None]
    (loss, f, x_hat), grads = gradients(architecture, params, x, y, settings)
    return float(loss), f, x_hat, grads


# --- relu ------------------------------------------------------------------------------------------------------------


def test_relu_with_free_norms():
    # z = 1.5, -0.5; x_hat = 3.5, 0.5; errors 1.5, 0.5; L1 = (1.5 x 2 + 0) / 2
    loss, f, x_hat, grads = run("relu", one_feature(), [2.0, 0.0], Settings(l1=0.5))
    assert f[:, 0].tolist() == [1.5, 0]
    assert x_hat[:, 0].tolist() == [3.5, 0.5]
    assert loss == pytest.approx((1.5**2 + 0.5**2) / 2 + 0.5 * 1.5)
    assert grads["b_enc"].item() == pytest.approx(1.5 * 2 + 0.5 * 2 / 2)
    assert grads["decoder"].item() == pytest.approx(1.5 * 1.5 + 0.5 * 1.5 / 2)


def test_relu_with_unit_norms_has_no_gradient_along_a_row():
    loss, _, _, grads = run("relu", one_feature(1.0), [3.0, 0.0], Settings(l1=0.5, decoder_norm="unit"))
    assert loss == pytest.approx(0.5**2 / 2 + 0.5 * 2.5 / 2)
    assert grads["decoder"].item() == 0
    params = {
        "encoder": tensor([[1.0, 0]]),
        "b_enc": tensor([0.0]),
        "decoder": tensor([[1.0, 0]]),
        "b_dec": C.repeat(2),
    }
    _, _, _, grads = run("relu", params, [[2.0, 3.0]], Settings(l1=0.5, decoder_norm="unit"))
    assert grads["decoder"].tolist() == [[0, 2 * 2 * -3.0]]  # f = 2, error (0, -3)


def test_renormalised_decoder_keeps_the_gradient_along_a_row_and_weighs_nothing():
    loss = run("relu", one_feature(1.0), [3.0], Settings(l1=0.5, decoder_norm="renormalised"))[0]
    assert loss == pytest.approx(0.5 * 2.5)
    _, _, _, grads = run("relu", one_feature(1.0, b_enc=[1.0]), [3.0], Settings(l1=0.5, decoder_norm="renormalised"))
    assert grads["decoder"].item() == pytest.approx(2 * 3.5 * 1.0)  # f = 3.5, error 1


def test_tied_gradient_is_the_sum_of_both():
    tied = {name: value for name, value in one_feature(2.0).items() if name != "encoder"}
    s = Settings(decoder_norm="renormalised", l1=0.5)
    untied = tied | {"encoder": tied["decoder"]}
    _, _, _, one = run("relu", tied, [2.0, 0.0], s)
    _, _, _, two = run("relu", untied, [2.0, 0.0], s)
    torch.testing.assert_close(one["decoder"], two["encoder"] + two["decoder"])


def test_transcoder_centres_by_a_constant_and_predicts_the_target():
    s = Settings(l1=0.5, centre=tensor([1.0]))
    loss, f, x_hat, grads = run("relu", one_feature(), [2.0, 0.0], s, y=[1.0, 1.0])
    assert f[:, 0].tolist() == [1, 0]
    assert x_hat[:, 0].tolist() == [2.5, 0.5]
    assert loss == pytest.approx((1.5**2 + 0.5**2) / 2 + 0.5 * 1)
    assert grads["b_dec"].item() == pytest.approx(1.5 - 0.5)  # of the reconstruction alone: b_dec is not in z


# --- topk, batchtopk, matryoshka -------------------------------------------------------------------------------------


def features(encoder, b_enc, decoder, b_dec=0.0, **more):
    """Several features of one dimension."""
    params = {
        "encoder": tensor(encoder)[:, None],
        "b_enc": tensor(b_enc),
        "decoder": tensor(decoder)[:, None],
        "b_dec": tensor([b_dec]),
    }
    return params | {name: tensor(value) for name, value in more.items()}


@pytest.mark.parametrize(("norm", "code"), [("free", [0, 0.8]), ("unit", [1.0, 0])])
def test_topk_selects_by_decoder_norm_where_it_is_free(norm, code):
    _, f, x_hat, _ = run("topk", features([0.0, 0.0], [1.0, 0.8], [1.0, 2.0]), [3.0], Settings(k=1, decoder_norm=norm))
    assert f[0].tolist() == pytest.approx(code)
    assert x_hat.item() == pytest.approx(code[0] + 2 * code[1])


def test_topk_drops_negative_choices():
    _, f, _, _ = run("topk", features([0.0, 0.0], [-1.0, 0.5], [1.0, 1.0]), [3.0], Settings(k=2))
    assert f[0].tolist() == [0, 0.5]


def auxk_case(**more):
    """Errors 1, -2; variances 4 and 1.5^2; dead features 2 and 1 guess -3 and -1, both with negative codes."""
    params = features([0.5, -1.0, 0.0], [1.0, -2.5, -3.0], [0.5, 2.0, 1.0])
    s = Settings(k=1, auxk=9 / 32, auxk_latents=1, dead=tensor([False, True, True]), **more)
    return params, s


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_auxk_by_hand(architecture):
    params, s = auxk_case(prefixes=(1.0,))
    loss, f, _, grads = run(architecture, params, [2.0, -2.0], s)
    assert f.tolist() == [[2, 0, 0], [0, 0, 0]]
    assert loss == pytest.approx((1 + 4) / 2 + 9 / 32 * 4 / 2.25 * (16 + 1) / 2)
    # 9/32 x 4/2.25 = 1/2; d/d(code) = (guess - error) W, halved; none reaches what is alive
    assert grads["b_enc"].tolist() == pytest.approx([-1 * 0.5, 0.5 * 1 * 2, 0.5 * -4 * 1])


def test_auxk_is_nothing_without_dead_features_and_limited_by_them():
    params, s = auxk_case()
    s.dead = tensor([False, False, False])
    assert run("topk", params, [2.0, -2.0], s)[0] == pytest.approx(2.5)
    s.dead, s.auxk_latents = tensor([False, True, True]), 5
    # both dead features: guesses -9 - 3 = -12 and -1 - 3 = -4
    assert run("topk", params, [2.0, -2.0], s)[0] == pytest.approx(2.5 + 0.5 * (13**2 + 2**2) / 2)


def test_batchtopk_shares_the_budget_of_the_batch():
    # z = x + (0, 1): 5, 6 and -1, 0.5 -> with k = 1 the two largest belong to the first token
    params = features([1.0, 1.0], [0.0, 1.0], [1.0, 1.0])
    _, f, _, _ = run("batchtopk", params, [5.0, -0.5], Settings(k=1))
    assert f.tolist() == [[5, 6], [0, 0]]
    params["decoder"] = tensor([[0.01], [1.0]])  # 0.05, 6 and 0, 0.5
    _, f, _, _ = run("batchtopk", params, [5.0, -0.5], Settings(k=1))
    assert f.tolist() == [[0, 6], [0, 0.5]]


def test_matryoshka_sums_its_prefixes():
    params = features([0.0, 0.0], [1.0, 2.0], [1.0, 1.0])
    s = Settings(k=2, prefixes=(0.5, 1.0))
    loss, f, x_hat, grads = run("matryoshka", params, [4.0], s)
    assert f.tolist() == [[1, 2]]
    assert x_hat.item() == 3
    assert loss == pytest.approx((4 - 1) ** 2 + (4 - 3) ** 2)
    assert grads["b_enc"].tolist() == pytest.approx([-2 * 3 - 2 * 1, -2 * 1])


# --- jumprelu --------------------------------------------------------------------------------------------------------


def jump(x, s, theta=0.5, decoder=2.0):
    """One feature with z = x (b_dec = 0), its decoder row of length `decoder`."""
    return run("jumprelu", one_feature(decoder, b_dec=[0.0], threshold=[theta]), x, s)


@pytest.mark.parametrize("to_input", [False, True])
def test_jumprelu_gradients_by_hand(to_input):
    # theta 0.5, window 1 wide: 0.25 and 0.75 are inside, 2 is not; x_hat = 0, 1.5, 4; errors -0.25, 0.75, 2
    s = Settings(l0=0.3, bandwidth=1.0, ste_to_input=to_input)
    loss, f, _, grads = jump([0.25, 0.75, 2.0], s)
    assert f[:, 0].tolist() == [0, 0.75, 2]
    assert loss == pytest.approx((0.25**2 + 0.75**2 + 4) / 3 + 0.3 * 2 / 3)
    to_f = [2 * e * 2 / 3 for e in (-0.25, 0.75, 2.0)]  # d loss / d f through the reconstruction
    kernel = -(0.5 * (to_f[0] + to_f[1]) + 2 * 0.3 / 3)
    assert grads["threshold"].item() == pytest.approx(kernel)
    assert grads["b_enc"].item() == pytest.approx(to_f[1] + to_f[2] - (kernel if to_input else 0))


def test_threshold_gradient_is_equal_below_and_above_it():
    s = Settings(l0=1.0, bandwidth=1.0)
    below, above = jump([0.25], s, decoder=0.0), jump([0.75], s, decoder=0.0)
    assert below[3]["threshold"].item() == above[3]["threshold"].item() == pytest.approx(-1.0)
    assert jump([1.01], s, decoder=0.0)[3]["threshold"].item() == 0


@pytest.mark.parametrize(
    ("penalty", "value"),
    [
        ("step", 0.3 * (0 + 2) / 2),
        ("tanh", 0.3 * (torch.tanh(tensor(4 * 1 * 0.5)) + torch.tanh(tensor(4 * 2 * 0.25))).item() / 2),
        ("target", 0.3 * (1 / 4 - 1) ** 2),
        ("quadratic", 0.3 * ((0 / 4 - 1) ** 2 + (2 / 4 - 1) ** 2) / 2),
    ],
)
def test_penalties_by_hand(penalty, value):
    # the first token fires nothing, the second both features, with f = 1, 2
    params = features([1.0, 2.0], [0.0, 0.0], [0.5, -0.25], threshold=[0.1, 0.1])
    s = Settings(l0=0.3, penalty=penalty, target_l0=4.0, bandwidth=0.1)
    loss, f, x_hat, _ = run("jumprelu", params, [0.0, 1.0], s)
    assert f.tolist() == [[0, 0], [1, 2]]
    assert loss - float((x_hat - tensor([[0.0], [1.0]])).square().mean()) == pytest.approx(value)


def test_target_and_quadratic_differ_in_what_they_pull():
    # L0 = 0 and 2 around a target of 1: the batch is on target, no token is
    params = features([1.0, 1.0], [0.0, 0.0], [0.0, 0.0], threshold=[0.1, 0.1])
    s = Settings(l0=1.0, penalty="target", target_l0=1.0, bandwidth=0.1)
    assert run("jumprelu", params, [0.09, 1.0], s)[3]["threshold"].tolist() == [0, 0]
    s.penalty = "quadratic"
    # the first token is inside the window: half of 2 (0 - 1) x (-1 / 0.1)
    assert run("jumprelu", params, [0.09, 1.0], s)[3]["threshold"].tolist() == pytest.approx([10, 10])


def test_preact_pulls_dead_features_only():
    params = features([1.0, 1.0], [-2.0, -3.0], [0.5, 2.0], threshold=[0.1, 0.2])
    s = Settings(l0=0.0, preact=0.01, dead=tensor([False, True]))
    loss, _, _, grads = run("jumprelu", params, [1.0, 0.0], s)
    # z of the dead one: -2, -3 -> (2.2 + 3.2) / 2 x norm 2
    assert loss == pytest.approx(1 / 2 + 0.01 * 2 * (2.2 + 3.2) / 2)
    assert grads["b_enc"].tolist() == pytest.approx([0, -0.01 * 2])
    assert grads["threshold"].tolist() == pytest.approx([0, 0.01 * 2])
    assert grads["decoder"][:, 0].tolist() == pytest.approx([0, 0.01 * (2.2 + 3.2) / 2])


# --- gated -----------------------------------------------------------------------------------------------------------


def test_gated_by_hand():
    # x_c = 1.5, -0.5; gate = x_c, magnitude = 2 x_c + 1 -> f = 4, 0; x_hat = 8.5, 0.5; by the gate: 3.5, 0.5
    params = one_feature(2.0, r_mag=[torch.tensor(2.0).log().item()], b_mag=[1.0])
    loss, f, x_hat, grads = run("gated", params, [2.0, 0.0], Settings(l1=0.5))
    assert f[:, 0].tolist() == pytest.approx([4, 0])
    assert x_hat[:, 0].tolist() == pytest.approx([8.5, 0.5])
    assert loss == pytest.approx((6.5**2 + 0.5**2) / 2 + 0.5 * 1.5 * 2 / 2 + (1.5**2 + 0.5**2) / 2)
    # means over two tokens; main loss 2 x 6.5, gate's 2 x 1.5, L1 0.5 x 2
    assert grads["b_mag"].item() == pytest.approx(6.5 * 2)
    assert grads["b_enc"].item() == pytest.approx(1.5 * 2 + 0.5 * 2 / 2)
    assert grads["r_mag"].item() == pytest.approx(6.5 * 2 * 3)
    assert grads["decoder"].item() == pytest.approx(6.5 * 4 + 0.5 * 1.5 / 2)  # nothing through the gate's decoding
    # b_dec: main x_hat (both tokens), and through z of the first one alone
    assert grads["b_dec"].item() == pytest.approx(6.5 + 0.5 - 6.5 * 2 * 2 - 1.5 * 2 - 0.5 * 2 / 2)


def test_a_shut_gate_gives_nothing_whatever_the_magnitude():
    params = one_feature(1.0, r_mag=[0.0], b_mag=[5.0])
    assert run("gated", params, [0.0], Settings())[1].item() == 0


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(LOSS.keys() - {"gated"}))
@pytest.mark.parametrize("transcoder", [False, True])
def test_gradient_is_that_of_the_loss_in_b_dec(architecture, transcoder):
    """Finite differences agree; not for gated, whose frozen decoder has none."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    params = {"encoder": draw(12, 5), "b_enc": draw(12), "decoder": draw(12, 5), "b_dec": draw(5)}
    params |= {"threshold": draw(12).abs(), "r_mag": draw(12), "b_mag": draw(12)}
    x, y = draw(6, 5), draw(6, 5)
    s = Settings(ste_to_input=False, centre=draw(5) if transcoder else None)
    y = y if transcoder else x
    _, grads = gradients(architecture, params, x, y, s)
    step = 1e-6 * torch.eye(5, dtype=torch.float64)[0]
    up, down = (LOSS[architecture](params | {"b_dec": params["b_dec"] + sign * step}, x, y, s)[0] for sign in (1, -1))
    assert float(up - down) / 2e-6 == pytest.approx(float(grads["b_dec"][0]), rel=1e-5, abs=1e-6)


# --- other libraries -------------------------------------------------------------------------------------------------


SAELENS = {"W_enc": "encoder", "W_dec": "decoder", "b_gate": "b_enc"}
DL = {"encoder.weight": "encoder", "encoder.bias": "b_enc", "decoder.weight": "decoder", "bias": "b_dec"}
DL |= {"gate_bias": "b_enc", "mag_bias": "b_mag", "decoder_bias": "b_dec"} | SAELENS
SHARED = {"k": 4, "prefixes": (0.25, 0.5, 1.0), "auxk": 0.7, "l1": 0.5, "l0": 0.3, "preact": 0.2}
PEERS = {
    "saelens-relu": ("relu", {}),
    "saelens-topk": ("topk", {"auxk_unit": "plain"}),
    "saelens-batchtopk": ("batchtopk", {"auxk_unit": "plain"}),
    "saelens-matryoshka": ("matryoshka", {"auxk_unit": "plain"}),
    "saelens-gated": ("gated", {}),
    # its quadratic penalty is c mean (2 / L0*) (L0 - L0*)^2, of which ours is 1 / (2 L0*)
    **{
        f"saelens-jumprelu-{penalty}-{to_input}": (
            "jumprelu",
            {"penalty": penalty, "ste_to_input": to_input, "l0": 0.3 * (2 * 5.0 if penalty == "quadratic" else 1)},
        )
        for penalty in ("step", "tanh", "quadratic")
        for to_input in (False, True)
    },
    "dl-relu": ("relu", {"decoder_norm": "renormalised"}),
    "dl-topk": ("topk", {"decoder_norm": "renormalised", "auxk_unit": "residual"}),
    "dl-batchtopk": ("batchtopk", {"decoder_norm": "renormalised", "auxk_unit": "residual"}),
    # 3 levels, weighted by 1 / 3 and averaged: 1 / 9 of the sum, so that AuxK weighs 9 times as much against it
    "dl-matryoshka": ("matryoshka", {"decoder_norm": "renormalised", "auxk_unit": "residual", "auxk": 0.7 * 9}),
    "dl-gated": ("gated", {"decoder_norm": "renormalised"}),
    "dl-jumprelu": (
        "jumprelu",
        {"decoder_norm": "renormalised", "penalty": "target", "ste_to_input": False, "preact": 0.0},
    ),
}
DIFFERENT = {
    "saelens-gated": {"decoder", "b_dec"},  # it does not freeze the decoder (decoderesearch/SAELens#539)
    "dl-jumprelu": {"threshold"},  # the kernel of its L0 sees f and not the pre-activation
}


@pytest.fixture(scope="module")
def drawn():
    """Parameters and data; the last 5 of 24 features are dead, and fire a little too little to be chosen."""
    g = torch.Generator().manual_seed(5)
    draw = lambda *size: torch.randn(*size, generator=g)
    t = {"encoder": draw(24, 8), "b_enc": draw(24) * 0.3, "decoder": draw(24, 8), "b_dec": draw(8) * 0.3}
    t |= {"threshold": 0.2 + torch.rand(24, generator=g), "r_mag": draw(24) * 0.3, "b_mag": draw(24) * 0.3}
    t |= {"x": draw(64, 8) * 2, "dead": torch.zeros(24)}
    t["dead"][-5:] = 1
    t["encoder"][-5:] *= 1e-4
    t["b_enc"][-5:] = tensor([0.001, 0.002, 0.003, 0.004, 0.005])
    return t


@pytest.fixture(scope="module")
def answers(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    save_file({name: value.contiguous() for name, value in drawn.items()}, folder / "in.safetensors")
    ask_peers("losses", str(folder / "in.safetensors"), str(folder / "out.safetensors"))
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("peer", PEERS)
def test_losses_and_gradients_are_those_of_other_libraries(peer, drawn, answers):
    architecture, more = PEERS[peer]
    s = Settings(**(SHARED | {"target_l0": 5.0, "bandwidth": 0.5, "dead": drawn["dead"].bool()} | more))
    params = {name: value for name, value in drawn.items() if name not in ("x", "dead")}
    if peer.startswith("dl-"):
        params["decoder"] = params["decoder"] / params["decoder"].norm(dim=1, keepdim=True)
    names = DL if peer.startswith("dl-") else SAELENS
    if peer == "dl-jumprelu":
        s.centre = torch.zeros(8)  # it does not subtract b_dec
    (loss, *_), grads = gradients(architecture, params, drawn["x"], drawn["x"], s)
    share = 1 / 9 if peer == "dl-matryoshka" else 1.0
    theirs = {name.removeprefix(f"{peer}."): value for name, value in answers.items() if name.startswith(f"{peer}.")}
    torch.testing.assert_close(theirs.pop("loss"), loss * share, rtol=1e-5, atol=1e-6)
    assert theirs
    for name, grad in theirs.items():
        ours = names.get(name, name)
        same = torch.allclose(grad, grads[ours] * share, rtol=1e-4, atol=1e-5)
        assert same == (ours not in DIFFERENT.get(peer, ())), ours
