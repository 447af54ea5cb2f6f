"""The formulas of the splices, on numbers computed by hand and against plain loops."""

import pytest
import torch
from adapter_fixtures import random_sae
from torch import nn

from saerl_cli.adapter.coefficients.splice import FixedSplice, fixed_splice, splice
from saerl_cli.adapter.tuner import on_activation
from saerl_cli.sae.autoencoder import SAE

KINDS = ("error_preserving", "reconstruct", "pre_activation")
ARCHITECTURES = {"standard": None, "topk": 4}


def small_sae(k: int | None = None) -> SAE:
    sae = SAE(2, 3, "topk" if k else "standard", k)
    sae.W_enc.data = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    sae.b_enc.data = torch.tensor([0.0, 0, -2])
    sae.W_dec.data = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])
    sae.b_dec.data = torch.tensor([1.0, 0])
    return sae


# pre of (3, 2) is (2, 2, 2), of (0, 0) it is (-1, 0, -3).
BY_HAND = {
    "error_preserving": [[3 + 1, 2 - 2], [0, 0]],
    "reconstruct": [[1 + 3 + 1, 0 + 1], [1, 0]],
    "pre_activation": [[3 + 1 - 1, 2 - 1 - 1], [0, 1]],  # f' = (3, 1, 0), then (0, 1, 0)
}


@pytest.mark.parametrize("kind", KINDS)
def test_relu_by_hand(kind: str):
    h = torch.tensor([[3.0, 2], [0, 0]])
    delta, shift = torch.tensor([0.5, -1, 0]), torch.tensor([0.0, 1, -3])
    assert splice(small_sae(), h, kind, delta, shift).tolist() == BY_HAND[kind]


def test_topk_by_hand():
    h = torch.tensor([[3.0, 1]])  # pre is (2, 1, 1): feature 0 is chosen
    delta = torch.tensor([-0.9, 1.5, 0])
    assert splice(small_sae(1), h, "error_preserving", delta).tolist() == [[pytest.approx(3 - 1.8), 1]]
    assert splice(small_sae(1), h, "reconstruct", delta).tolist() == [[pytest.approx(1 + 0.2), 0]]
    # (0.2, 2.5, 1): now feature 1 is chosen, so feature 0 goes
    assert splice(small_sae(1), h, "pre_activation", delta, torch.zeros(3)).tolist() == [[3 - 2, 1 + 2.5]]


def plain_splice(sae: SAE, h: torch.Tensor, kind: str, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The formulas, one token and one feature at a time."""

    def active(pre: list[float]) -> list[float]:
        kept = sorted(range(len(pre)), key=lambda i: -pre[i])[: sae.k] if sae.k else range(len(pre))
        return [max(0.0, value) if i in set(kept) else 0.0 for i, value in enumerate(pre)]

    rows = []
    for x in h:
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).tolist()
        f = active(pre)
        moved = active([(1 + float(delta[i])) * value + float(shift[i]) for i, value in enumerate(pre)])
        row = sae.b_dec.clone() if kind == "reconstruct" else x.clone()
        for i, direction in enumerate(sae.W_dec):
            if kind == "error_preserving":
                row += float(delta[i]) * f[i] * direction
            elif kind == "reconstruct":
                row += (1 + float(delta[i])) * f[i] * direction
            else:
                row += (moved[i] - f[i]) * direction
        rows.append(row)
    return torch.stack(rows)


def case(k: int | None, dtype: torch.dtype = torch.float64):
    sae = random_sae(6, 20, k).to(dtype)
    generator = torch.Generator().manual_seed(2)
    h, delta, shift = (torch.randn(n, generator=generator, dtype=dtype) for n in ((5, 6), 20, 20))
    return sae, h, delta, shift


@pytest.mark.parametrize("k", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_splice_is_the_formula(kind: str, k: int | None):
    sae, h, delta, shift = case(k)
    assert torch.allclose(splice(sae, h, kind, delta, shift), plain_splice(sae, h, kind, delta, shift))


@pytest.mark.parametrize("k", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str, k: int | None):
    sae, *inputs = case(k)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    used = inputs if kind == "pre_activation" else inputs[:2]
    assert torch.autograd.gradcheck(lambda h, delta, shift=None: splice(sae, h, kind, delta, shift), used)
    assert all(not parameter.requires_grad for parameter in sae.parameters())


@pytest.mark.parametrize("k", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untouched_coefficients_are_the_base_model_to_the_bit(k: int | None, dtype: torch.dtype):
    sae = random_sae(k=k)
    h = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    zero = torch.zeros(40)
    assert torch.equal(splice(sae, h, "error_preserving", zero), h)
    assert torch.equal(splice(sae, h, "pre_activation", zero, zero), h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(splice(sae, h, "pre_activation", zero, zero), h)


@pytest.mark.parametrize("k", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_reconstruct_untouched_is_the_reconstruction(k: int | None):
    sae, h, delta, _ = case(k)
    assert torch.allclose(splice(sae, h, "reconstruct", 0 * delta), sae(h))


@pytest.mark.parametrize("kind", KINDS)
def test_jumprelu_features_are_scaled_where_they_exceed_their_threshold(kind: str):
    _, h, delta, shift = case(None)
    sae = SAE(6, 20, "jumprelu").double()
    sae.load_state_dict(case(None)[0].state_dict() | {"threshold": torch.linspace(0.1, 0.8, 20).double()})
    pre = (h - sae.b_dec) @ sae.W_enc + sae.b_enc
    moved = (1 + delta) * pre + shift
    f, f_moved = (z * (z > sae.threshold) for z in (pre, moved))
    expected = {
        "error_preserving": h + (delta * f) @ sae.W_dec,
        "reconstruct": ((1 + delta) * f) @ sae.W_dec + sae.b_dec,
        "pre_activation": h + (f_moved - f) @ sae.W_dec,
    }
    assert torch.allclose(splice(sae, h, kind, delta, shift), expected[kind])
    fixed = fixed_splice(nn.Identity(), sae, kind, delta * (torch.arange(20) < 5), shift * (torch.arange(20) < 5))
    chosen = [splice(sae, h, kind, delta * (torch.arange(20) < 5), shift * (torch.arange(20) < 5)), fixed(h)]
    assert torch.allclose(*chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_precision_stream_is_spliced_in_float32(kind: str):
    sae, h, delta, shift = case(4, torch.float32)
    low = h.bfloat16()
    exact = splice(sae, low.float(), kind, delta, shift)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(splice(sae, low, kind, delta, shift), exact.bfloat16())


def operations(tensor: torch.Tensor) -> set[str]:
    """Names of the backward operations that lead to a tensor."""
    names, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [previous for previous, _ in node.next_functions]
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_same_every_time_on_two_threads(kind: str):
    sae = random_sae(16, 64, k=8)
    h = torch.randn(8192, 16, generator=torch.Generator().manual_seed(1))
    delta, shift = torch.zeros(64, requires_grad=True), torch.zeros(64, requires_grad=True)

    def gradient() -> torch.Tensor:
        delta.grad = None
        splice(sae, h, kind, delta, shift).pow(2).sum().backward()
        return delta.grad

    # The backwards of x[indices] and take() add up by atomics, in the order in which threads happen to arrive.
    assert not operations(splice(sae, h, kind, delta, shift)) & {"IndexBackward0", "TakeBackward0"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(6))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("k", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_splice_is_the_splice(kind: str, k: int | None):
    sae, h, delta, shift = case(k)
    delta[::2], shift[::3] = 0, 0
    fixed = fixed_splice(nn.Identity(), sae, kind, delta, shift if kind == "pre_activation" else None)
    assert isinstance(fixed, FixedSplice)
    assert torch.allclose(fixed(h), splice(sae, h, kind, delta, shift), rtol=0, atol=1e-12)
    whole = k is not None or kind == "reconstruct"
    expected = 20 if whole else 10 if kind == "error_preserving" else int(((delta != 0) | (shift != 0)).sum())
    assert fixed.sae.d_sae == expected
    assert not any(parameter.requires_grad for parameter in fixed.parameters())


def test_nothing_is_left_of_a_splice_that_changes_nothing():
    base = nn.Identity()
    assert fixed_splice(base, random_sae(), "error_preserving", torch.zeros(40), None) is base
    assert fixed_splice(base, random_sae(), "pre_activation", torch.zeros(40), torch.zeros(40)) is base


def test_tuples_keep_their_other_items():
    h, rest = torch.ones(2), object()
    changed = on_activation((h, rest), lambda x: x + 1)
    assert changed[0].tolist() == [2, 2]
    assert changed[1] is rest
    assert on_activation(h, lambda x: x + 1).tolist() == [2, 2]
