"""The frozen part computed once: which modules it is, and that nothing changes by it, to the bit."""

import pytest
import torch
from adapter_fixtures import FEATURES, VOCABULARY, WIDTH, coefficients_on, random_sae, tiny_llama, tiny_neox
from peft import IA3Config, LoraConfig, get_peft_model
from rl_fixtures import build_trainer, trained
from trl.trainer.utils import add_fused_lm_head, use_adapter

from saerl_cli.adapter.coefficients.active_features import active_features, by_sequence, from_sequences, scaled
from saerl_cli.rl.rollouts.prefix import Prefix, find_prefix, take
from saerl_cli.rl.rollouts.scoring import add_critic, add_scoring_head


@pytest.fixture(autouse=True)
def no_size_is_too_small(monkeypatch):
    monkeypatch.setattr("saerl_cli.adapter.coefficients.active_features.SMALL", 0)


MODELS = {"neox": tiny_neox, "llama": tiny_llama}
SPLICES = ("error_preserving", "reconstruct", "pre_activation")
SITES = [
    ("neox", ("mlp_out.1",)),
    ("neox", ("mlp_hidden.2",)),
    ("neox", ("attn_out.1",)),
    ("neox", ("resid_post.1",)),
    ("neox", ("mlp_out.1", "attn_out.1", "resid_post.2")),
    ("llama", ("mlp_out.2",)),
    ("llama", ("attn_out.0", "mlp_out.1")),
]


def policy_on(folder, model="neox", sites=("mlp_out.1",), splice="error_preserving", k=None, sparse=False):
    """A policy with random coefficients, fused head and value head."""
    base = MODELS[model]()
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    policy = coefficients_on(base, folder, sites, splice, k, seed=3)
    if sparse:  # so that few features are active, as in a trained SAE
        for layer in layers_of(policy):
            layer.sae.b_enc.data.sub_(8.0)
    if splice == "reconstruct":
        policy.add_adapter("ref", policy.peft_config["default"])
        policy.set_adapter("default")
    head = add_critic(base)
    add_scoring_head(base, 1.0)
    head.out.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return policy.train()


def layers_of(policy):
    return [module for module in policy.modules() if hasattr(module, "sparse_coeffs_delta")]


def prefix_of(policy) -> Prefix | None:
    ids = torch.arange(6).view(2, 3)

    def call():
        out = policy(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        return out.log_probs, out.state_values

    return find_prefix(policy, call, (2, 3))


def rollout(rows: int = 6, seq: int = 11) -> dict[str, torch.Tensor]:
    """Left-padded sequences whose last tokens are scored."""
    ids = torch.randint(2, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(seq) >= torch.arange(rows)[:, None] % 4).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def scored(policy, batch, autocast=False):
    """Log-probabilities, values, loss and the gradient of every trainable parameter."""
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = policy(**batch, fused_lm_head=True)
    loss = (out.log_probs * torch.linspace(-1, 1, out.log_probs.shape[1])).sum() + out.state_values.square().sum()
    loss.backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad and p.grad is not None]
    return [out.log_probs.detach(), out.state_values.detach(), loss.detach(), *gradients]


def equal(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def recorded_of(policy, prefix, batch, autocast=False):
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        prefix.record() as recorded,
    ):
        policy(**batch, fused_lm_head=True)
    return recorded


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("k", [None, 4], ids=["relu", "topk"])
@pytest.mark.parametrize("splice", SPLICES)
@pytest.mark.parametrize(("model", "sites"), SITES, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_the_cache_gives_the_plain_pass_to_the_bit(tmp_path, model, sites, splice, k, autocast):
    policy = policy_on(tmp_path, model, sites, splice, k, sparse=k is None)
    prefix = prefix_of(policy)
    assert prefix is not None
    batch = rollout()
    for rows in torch.arange(6).split(2):
        part = take(batch, rows)
        recorded = recorded_of(policy, prefix, part, autocast)
        plain = scored(policy, part, autocast)
        with prefix.replay(recorded):
            cached = scored(policy, part, autocast)
        assert equal(plain, cached)
        assert sum(g.abs().sum() for g in plain[3:]) > 0
    lowest_is_encoded_once = splice != "pre_activation"
    assert any(name.endswith("/values") for name in recorded) == lowest_is_encoded_once


@pytest.mark.parametrize("splice", ["error_preserving", "reconstruct"])
def test_the_reference_uses_what_the_policy_recorded(tmp_path, splice):
    policy = policy_on(tmp_path, splice=splice, k=4)
    prefix, batch = prefix_of(policy), rollout()
    recorded = recorded_of(policy, prefix, batch)
    with torch.no_grad(), use_adapter(policy, "ref" if splice == "reconstruct" else None):
        plain = policy(**batch, fused_lm_head=True).log_probs
        with prefix.replay(recorded):
            assert torch.equal(policy(**batch, fused_lm_head=True).log_probs, plain)
    with torch.no_grad():
        assert not torch.equal(policy(**batch, fused_lm_head=True).log_probs, plain)


def test_nothing_below_the_splice_runs_again(tmp_path):
    policy = policy_on(tmp_path, "neox", ("mlp_out.1",), k=4)
    prefix, batch = prefix_of(policy), rollout()
    recorded = recorded_of(policy, prefix, batch)
    layers = policy.base_model.model.gpt_neox.layers
    below = [*layers[0].modules(), *layers[1].attention.modules(), *layers[1].mlp.base_layer.modules()]
    ran = []
    weighty = [m for m in below if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_hook(lambda *_: ran.append(1)) for m in weighty]
    encoder = layers[1].mlp.sae
    encoder.pre_activations = lambda x: pytest.fail("encoded again")
    with prefix.replay(recorded):
        scored(policy, batch)
    assert len(weighty) == 8 and not ran
    del encoder.pre_activations
    scored(policy, batch)
    assert len(ran) == 8
    for handle in handles:
        handle.remove()
    assert all("forward" not in vars(module) for module in prefix.modules.values()), "nothing stays patched"


@pytest.mark.parametrize("splice", SPLICES)
def test_recomputed_activations_come_from_the_cache_too(tmp_path, splice):
    policy = policy_on(tmp_path, "neox", ("attn_out.1", "mlp_out.2"), splice, k=4)
    prefix, batch = prefix_of(policy), rollout()
    plain = scored(policy, batch)
    recorded = recorded_of(policy, prefix, batch)
    policy.base_model.model.activation_checkpointing_enable()
    with prefix.replay(recorded):
        assert equal(scored(policy, batch), plain)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_other_adapters_have_a_frozen_part_as_well(kind):
    base = tiny_neox()
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    configs = {
        "lora": LoraConfig(target_modules=["dense_4h_to_h"], layers_to_transform=[1], layers_pattern="layers"),
        "ia3": IA3Config(target_modules=r".*\.2\.mlp\.dense_4h_to_h", feedforward_modules=r".*dense_4h_to_h"),
    }
    policy = get_peft_model(base, configs[kind]).train()
    add_critic(base).out.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    add_scoring_head(base, 1.0)
    for name, p in policy.named_parameters():
        if "lora_B" in name or "ia3" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(2))
    prefix, batch = prefix_of(policy), rollout()
    assert prefix is not None and any(name.endswith("layers.0") for name in prefix.modules)
    plain = scored(policy, batch)
    with prefix.replay(recorded_of(policy, prefix, batch)):
        assert equal(scored(policy, batch), plain)


def test_without_anything_frozen_there_is_no_cache():
    base = tiny_neox()
    add_fused_lm_head(base)
    add_critic(base)
    add_scoring_head(base, 1.0)
    assert prefix_of(base.requires_grad_(True)) is None


def test_a_model_that_draws_random_numbers_is_refused(tmp_path):
    policy = policy_on(tmp_path)
    policy.base_model.model.gpt_neox.layers[2].post_mlp_dropout.p = 0.5
    assert prefix_of(policy) is None, "what is above the frozen part is not the same twice"


# --- codes ------------------------------------------------------------------------------------------------------------


def few_active(k=None):
    sae = random_sae(k=k)
    sae.b_enc.data.sub_(3.0)
    return sae


@pytest.mark.parametrize("k", [None, 4], ids=["relu", "topk"])
def test_codes_of_shuffled_sequences_are_the_codes_of_their_tokens(k):
    sae = few_active(k)
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    rows = by_sequence(active_features(sae, x.flatten(0, 1)), 4)
    order = torch.tensor([2, 0, 3])
    got = from_sequences({name: tensor[order] for name, tensor in rows.items()}, FEATURES)
    want = active_features(sae, x[order].flatten(0, 1))
    assert torch.equal(got.values, want.values)
    for name in ("token", "feature", "starts"):
        assert torch.equal(getattr(got.pairs, name), getattr(want.pairs, name)), name


@pytest.mark.parametrize("k", [None, 4], ids=["relu", "topk"])
def test_sparse_decoding_has_the_values_and_gradients_of_the_dense_formula(k):
    sae = few_active(k).double()
    x = torch.randn(30, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    scale = torch.randn(FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert 0 < len(active_features(sae, x.detach()).values) < 30 * FEATURES / 8
    dense = (scale * sae.encode(x)) @ sae.W_dec
    sparse = scaled(sae, x, scale)
    assert "ScaledDecoding" in sparse.grad_fn.name()
    torch.testing.assert_close(sparse, dense)
    weights = torch.randn(30, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    want = torch.autograd.grad((dense * weights).sum(), (x, scale))
    got = torch.autograd.grad((sparse * weights).sum(), (x, scale))
    torch.testing.assert_close(got, want)


def test_where_many_features_are_active_or_few_are_there_nothing_is_kept(monkeypatch):
    assert active_features(random_sae(), torch.ones(3, WIDTH)) is None
    assert active_features(few_active(), torch.ones(3, WIDTH)) is not None
    monkeypatch.setattr("saerl_cli.adapter.coefficients.active_features.SMALL", 3 * FEATURES * WIDTH + 1)
    assert active_features(few_active(), torch.ones(3, WIDTH)) is None


# --- whole runs -------------------------------------------------------------------------------------------------------

TIMES = {"seconds", "tokens_per_second", "samples_per_second"}


def run(folder, **settings):
    rows = []
    trainer = build_trainer(folder, on_phase=rows.append, phases=2, **settings)
    trainer.train()
    return trainer, trained(trainer), [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"splice": "reconstruct"},
        {"splice": "pre_activation"},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "num_iterations": 1, "per_device_train_batch_size": 16, "max_steps": 2},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_run_with_the_cache_is_the_run_without_it(tmp_path, settings):
    with_cache, parameters, rows = run(tmp_path, **settings)
    without, want, rows_want = run(tmp_path, prefix_cache=False, **settings)
    assert with_cache.prefix is not None and without.prefix is None
    assert all(batch.frozen for batch in with_cache.micro_batches) and not without.micro_batches[0].frozen
    assert rows == rows_want and rows[-1]["kl_k3"] > 0
    assert all(torch.equal(parameters[name], tensor) for name, tensor in want.items())


def test_unconstrained_training_has_no_cache(tmp_path):
    trainer, _, _ = run(tmp_path, adapter="full", max_steps=8)
    assert trainer.prefix_sought and trainer.prefix is None


def test_rows_are_scored_in_the_micro_batches_they_are_learned_in(tmp_path):
    seen = []
    trainer = build_trainer(tmp_path, phases=1, num_iterations=1, steps_per_generation=4, max_steps=4)
    score = trainer.model.forward

    def forward(*args, **kwargs):
        if kwargs.get("fused_lm_head"):  # not the exact KL of some rows
            seen.append(kwargs["input_ids"])
        return score(*args, **kwargs)

    trainer.model.forward = forward
    trainer.train()
    passes = [ids for ids in seen if ids.shape == seen[-1].shape]  # of policy, reference, update
    assert len(passes) == 12
    for policy, reference, update in zip(passes[:4], passes[4:8], passes[8:], strict=True):
        assert torch.equal(policy, reference) and torch.equal(policy, update)
    assert trainer.rollout_statistics["kl"] == 0


def test_a_phase_leaves_nothing_replayed(tmp_path):
    trainer, _, _ = run(tmp_path, max_steps=8)
    assert all("forward" not in vars(module) for module in trainer.prefix.modules.values())
