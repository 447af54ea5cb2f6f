"""Coefficients as a PEFT method: everything PEFT and TRL do with an adapter."""

import copy

import pytest
import torch
from adapter_fixtures import (
    FEATURES,
    HIDDEN,
    coefficients_on,
    random_sae,
    randomise,
    sae_folder,
    tiny_llama,
    tiny_neox,
    tokens,
)
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from saerl_cli.adapter import (
    FixedSplice,
    SparseCoeffConfig,
    SparseCoeffLayer,
    biases,
    delta_statistics,
    deltas,
    save_adapter,
    site_layers,
    sparse_coeffs,
    splice,
)
from saerl_cli.sae.files import load_sae

EXACT = ("error_preserving", "pre_activation")
KINDS = (*EXACT, "reconstruct")
STACK = ("mlp_out.0", "mlp_hidden.1", "mlp_out.1", "attn_out.1", "resid_post.1", "mlp_out.2")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- what is trained -------------------------------------------------------------------------------------------------


def test_coefficients_are_all_that_is_trained(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1", "mlp_out.2"))
    names = [f"base_model.model.gpt_neox.layers.{layer}.mlp.sparse_coeffs_delta.default.weight" for layer in (1, 2)]
    assert list(trainable(policy)) == names
    assert all(p.shape == (FEATURES,) and not p.any() for p in trainable(policy).values())
    assert policy.get_nb_trainable_parameters()[0] == 2 * FEATURES
    policy.train()
    randomise(policy)
    policy(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(policy).values())
    assert [name for name, p in policy.named_parameters() if p.grad is not None] == names


def test_wrapping_draws_no_random_numbers(tmp_path):
    folder = sae_folder(tmp_path, "mlp_out.1")
    model = tiny_neox()
    before = torch.get_rng_state()
    get_peft_model(model, sparse_coeffs(model, {"mlp_out.1": folder}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bias_of_pre_activation_is_trained_too(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, splice="pre_activation", seed=1)
    kinds = [name.split(".")[-3] for name in trainable(policy)]
    assert kinds == ["sparse_coeffs_delta", "sparse_coeffs_bias"]
    policy(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(policy).values())


@pytest.mark.parametrize("k", [None, 5], ids=["standard", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_lower_sites_through_higher_ones(tmp_path, kind, k):
    """Against a model in which hooks do the same, with dense sums and nothing of ours but the SAE's weights."""
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1", "resid_post.1", "mlp_out.2"), kind, k, seed=2)
    policy(tokens(), labels=tokens()).loss.backward()
    plain, leaves = tiny_neox(), {}
    for site, layer in site_layers(policy).items():
        delta = deltas(policy)[site].requires_grad_()
        shift = biases(policy)[site].requires_grad_() if kind == "pre_activation" else torch.zeros(FEATURES)
        leaves[site], sae = delta, layer.sae

        def hook(module, args, output, sae=sae, delta=delta, shift=shift):
            pre = (output - sae.b_dec) @ sae.W_enc + sae.b_enc
            f = sae.activate(pre)
            if kind == "reconstruct":
                return ((1 + delta) * f) @ sae.W_dec + sae.b_dec
            changed = sae.activate((1 + delta) * pre + shift) if kind == "pre_activation" else (1 + delta) * f
            return output + (changed - f) @ sae.W_dec

        plain.get_submodule(layer.path).register_forward_hook(hook)
    plain(tokens(), labels=tokens()).loss.backward()
    assert torch.allclose(logits(plain), logits(policy), atol=1e-4)
    for site, layer in site_layers(policy).items():
        assert torch.allclose(layer.sparse_coeffs_delta["default"].weight.grad, leaves[site].grad, atol=1e-5, rtol=1e-4)


# --- on, off, gone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("k", [None, 5], ids=["standard", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_untouched_off_and_unloaded_are_the_base_model_to_the_bit(tmp_path, make, kind, k):
    want = logits(make())
    sites = [site for site in STACK if make is tiny_neox or not site.startswith("mlp_hidden")]
    policy = coefficients_on(make(), tmp_path, sites, kind, k)
    assert set(site_layers(policy)) == set(sites)
    assert torch.equal(logits(policy), want) == (kind in EXACT)
    randomise(policy)
    assert (logits(policy) - want).abs().max() > 1e-2
    with policy.disable_adapter():
        assert torch.equal(logits(policy), want)
    assert all(p.requires_grad for name, p in policy.named_parameters() if "sparse_coeffs_" in name)
    base = policy.unload()
    assert torch.equal(logits(base), want)
    assert not any(isinstance(module, BaseTunerLayer | FixedSplice) for module in base.modules())
    assert {name for name, _ in base.named_parameters()} == {name for name, _ in make().named_parameters()}


@pytest.mark.parametrize("k", [None, 5], ids=["standard", "topk"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_fixes_the_splices_in_place(tmp_path, kind, k):
    policy = coefficients_on(tiny_neox(), tmp_path, STACK, kind, k, seed=1)
    want = logits(policy)
    merged = policy.merge_and_unload(safe_merge=True)
    assert torch.allclose(logits(merged), want, rtol=0, atol=2e-5)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    splices = [module for module in merged.modules() if isinstance(module, FixedSplice)]
    assert len(splices) == len(STACK)
    compact = k is None and kind != "reconstruct"
    assert all((s.sae.d_sae < FEATURES) == compact for s in splices)
    generated = merged.generate(input_ids=tokens(), max_new_tokens=4, do_sample=False)
    assert generated.shape == (3, 11)


def test_a_merged_model_takes_new_coefficients(tmp_path):
    first = coefficients_on(tiny_neox(), tmp_path / "a", seed=1).merge_and_unload()
    fixed = logits(first)
    second = coefficients_on(first, tmp_path / "b")
    assert torch.equal(logits(second), fixed)
    randomise(second)
    want = logits(second)
    assert not torch.equal(want, fixed)
    assert torch.allclose(logits(second.merge_and_unload()), want, rtol=0, atol=1e-5)


def test_merging_into_weights_is_refused(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, seed=1)
    with pytest.raises(NotImplementedError, match="no vLLM; merge_and_unload"):
        policy.merge_adapter()


def test_an_infinite_coefficient_is_not_fixed_in_place(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path)
    policy.base_model.model.gpt_neox.layers[1].mlp.sparse_coeffs_delta["default"].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"coefficients of mlp_out\.1 are NaN or infinite"):
        policy.merge_and_unload(safe_merge=True)


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trl_copies_the_policy_into_its_reference(tmp_path, kind):
    """The lines of GRPOTrainer: the adapter `ref` gets each parameter whose name holds `.default.`."""
    policy = coefficients_on(tiny_neox(), tmp_path, STACK, kind, seed=1)
    before = set(trainable(policy))
    policy.add_adapter("ref", policy.peft_config["default"])
    assert set(trainable(policy)) == before
    want, copied = logits(policy), 0
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied == len(STACK) * (2 if kind == "pre_activation" else 1)
    policy.set_adapter("ref")
    assert torch.equal(logits(policy), want)
    randomise(policy, seed=9)
    assert torch.equal(logits(policy), want)
    policy.set_adapter("default")
    assert not torch.equal(logits(policy), want)


def test_a_fresh_reference_of_reconstruct_is_the_untouched_splice(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, splice="reconstruct")
    untouched = logits(policy)
    policy.add_adapter("ref", policy.peft_config["default"])
    randomise(policy)
    policy.set_adapter("ref")
    assert torch.equal(logits(policy), untouched)


def test_active_adapters_multiply(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, seed=1)
    policy.add_adapter("other", policy.peft_config["default"])
    randomise(policy, seed=2, adapter="other")
    one, two = deltas(policy)["mlp_out.1"], deltas(policy, "other")["mlp_out.1"]
    policy.base_model.set_adapter(["default", "other"])
    both = logits(policy)
    policy.base_model.set_adapter(["other", "default"])
    assert torch.allclose(logits(policy), both, atol=1e-6)
    single = coefficients_on(tiny_neox(), tmp_path)
    next(iter(trainable(single).values())).data.copy_((1 + one) * (1 + two) - 1)
    assert torch.allclose(logits(single), both, atol=1e-5)
    merged = policy.merge_and_unload(adapter_names=["default", "other"])
    assert torch.allclose(logits(merged), both, atol=1e-5)


def test_biases_of_active_adapters_add_up(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, splice="pre_activation", seed=1)
    policy.add_adapter("other", policy.peft_config["default"])
    randomise(policy, seed=2, adapter="other")
    (layer,) = site_layers(policy).values()
    delta, shift = layer.total(["default", "other"])
    assert torch.equal(shift, biases(policy)["mlp_out.1"] + biases(policy, "other")["mlp_out.1"])
    one, two = deltas(policy)["mlp_out.1"], deltas(policy, "other")["mlp_out.1"]
    assert torch.allclose(delta, (1 + one) * (1 + two) - 1, atol=1e-6)


def test_adapters_may_have_different_sites(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1",), seed=1)
    first, base = logits(policy), logits(tiny_neox())
    folders = {site: sae_folder(tmp_path, site) for site in ("resid_post.1", "mlp_out.1", "mlp_hidden.1", "mlp_out.2")}
    policy.add_adapter("wide", sparse_coeffs(tiny_neox(), folders))
    assert torch.equal(logits(policy), first)
    randomise(policy, seed=7, adapter="wide")
    assert torch.equal(logits(policy), first)
    policy.set_adapter("wide")
    alone = get_peft_model(tiny_neox(), sparse_coeffs(tiny_neox(), folders)).eval()
    for site, layer in site_layers(alone).items():
        layer.sparse_coeffs_delta["default"].weight.data.copy_(deltas(policy, "wide")[site])
    assert torch.equal(logits(policy), logits(alone))
    assert torch.equal(logits(copy.deepcopy(policy).unload()), base)
    policy.set_adapter("default")
    policy.delete_adapter("wide")
    assert torch.equal(logits(policy), first)


def test_sites_inside_a_site_that_was_wrapped_earlier(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("resid_post.1",))
    folders = {site: sae_folder(tmp_path, site) for site in ("resid_post.1", "mlp_out.1", "mlp_hidden.1")}
    policy.add_adapter("inner", sparse_coeffs(tiny_neox(), folders))
    assert set(deltas(policy, "inner")) == set(folders)
    randomise(policy, adapter="inner")
    policy.set_adapter("inner")
    alone = get_peft_model(tiny_neox(), sparse_coeffs(tiny_neox(), folders)).eval()
    for site, layer in site_layers(alone).items():
        layer.sparse_coeffs_delta["default"].weight.data.copy_(deltas(policy, "inner")[site])
    assert torch.equal(logits(policy), logits(alone))


def test_one_site_has_one_sae_and_one_splice(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path / "a")
    other = sae_folder(tmp_path / "b", "mlp_out.1", seed=1)
    with pytest.raises(ValueError, match=r"mlp_out\.1 already carries an adapter on another SAE"):
        policy.add_adapter("other", sparse_coeffs(tiny_neox(), {"mlp_out.1": other}))
    same = sparse_coeffs(tiny_neox(), {"mlp_out.1": tmp_path / "a" / "mlp_out.1"}, "reconstruct")
    with pytest.raises(ValueError, match="already carries an adapter with splice error_preserving, not reconstruct"):
        policy.add_adapter("other", same)
    assert list(policy.peft_config) == ["default"]


# --- sites, targets, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("site", ["mlp_out.1", "attn_out.1", "resid_post.1", "mlp_hidden.1"])
def test_a_site_is_the_output_of_its_module(tmp_path, make, site):
    if make is tiny_llama and site == "mlp_hidden.1":
        pytest.skip("the hidden layer of a gated MLP is no module's output")
    policy = coefficients_on(make(), tmp_path, (site,), seed=1)
    ((name, layer),) = site_layers(policy).items()
    assert name == site
    seen = {}
    layer.base_layer.register_forward_hook(lambda _, __, output: seen.update(h=output))
    layer.register_forward_hook(lambda _, __, output: seen.update(spliced=output))
    logits(policy)
    first = lambda output: output[0] if isinstance(output, tuple) else output
    if isinstance(seen["h"], tuple):
        assert seen["h"][1:] == seen["spliced"][1:]
    sae = load_sae(tmp_path / site)
    want = splice(sae, first(seen["h"]), "error_preserving", deltas(policy)[site])
    assert torch.equal(first(seen["spliced"]), want)
    assert first(seen["h"]).shape[-1] == sae.d_in == (HIDDEN if site == "mlp_hidden.1" else 16)


def saes_of(folder, sites):
    model = tiny_neox()
    return sparse_coeffs(model, {site: sae_folder(folder, site) for site in sites}).saes


@pytest.mark.parametrize(
    ("target", "exclude", "sites"),
    [
        (r"gpt_neox\.layers\.[12]\.mlp", None, {"mlp_out.1", "mlp_out.2"}),
        (["mlp"], None, {"mlp_out.0", "mlp_out.1", "mlp_out.2"}),
        (["mlp"], ["gpt_neox.layers.0.mlp"], {"mlp_out.1", "mlp_out.2"}),
        (["layers.2.mlp"], None, {"mlp_out.2"}),
        (None, None, {"mlp_out.0", "mlp_out.1", "mlp_out.2"}),
    ],
)
def test_targets_by_list_and_regular_expression(tmp_path, target, exclude, sites):
    saes = saes_of(tmp_path, ("mlp_out.0", "mlp_out.1", "mlp_out.2"))
    policy = get_peft_model(
        tiny_neox(), SparseCoeffConfig(target_modules=target, exclude_modules=exclude, saes=saes, task_type="CAUSAL_LM")
    )
    assert set(site_layers(policy)) == sites
    config = policy.peft_config["default"]
    assert set(config.sites.values()) == sites
    assert set(config.saes) == set(config.sites) == set(config.sae_sha256)


def test_many_sites_whose_names_peft_condenses(tmp_path):
    model = tiny_neox()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 24
    model = type(model)(config).eval()
    want = logits(model)
    policy = coefficients_on(model, tmp_path, [f"mlp_out.{layer}" for layer in range(22)])
    assert len(site_layers(policy)) == 22
    assert torch.equal(logits(policy), want)


def test_injection_without_a_peft_model(tmp_path):
    want = logits(tiny_neox())
    model = inject_adapter_in_model(SparseCoeffConfig(saes=saes_of(tmp_path, STACK)), tiny_neox())
    assert isinstance(model.gpt_neox.layers[1].mlp, SparseCoeffLayer)
    assert torch.equal(logits(model), want)
    assert len(trainable(model)) == len(STACK)


def test_a_model_that_is_no_transformer(tmp_path):
    sae = sae_folder(tmp_path, "middle")
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    policy = get_peft_model(model, SparseCoeffConfig(saes={"0": str(sae)}))
    assert policy(torch.zeros(1, 16)).shape == (1, 2)
    narrow = get_peft_model(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2)), SparseCoeffConfig(saes={"0": str(sae)}))
    with pytest.raises(ValueError, match="0 has width 4, but its SAE has d_in=16"):
        narrow(torch.zeros(1, 16))


def test_a_bfloat16_base_keeps_float32_coefficients(tmp_path):
    want = logits(tiny_neox(torch.bfloat16))
    policy = coefficients_on(tiny_neox(torch.bfloat16), tmp_path, STACK)
    assert {p.dtype for name, p in policy.named_parameters() if "sparse_coeffs_" in name} == {torch.float32}
    assert {p.dtype for layer in site_layers(policy).values() for p in layer.sae.parameters()} == {torch.float32}
    assert torch.equal(logits(policy), want)
    randomise(policy)
    config = sparse_coeffs(tiny_neox(), {"mlp_out.1": tmp_path / "mlp_out.1"})
    as_made = get_peft_model(
        tiny_neox(torch.bfloat16), config, autocast_adapter_dtype=False
    )  # as TRL does under ZeRO-3
    assert {p.dtype for p in trainable(as_made).values()} == {torch.float32}
    changed = logits(policy)
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, want)
    policy(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in trainable(policy).values())
    save_adapter(policy, tmp_path / "adapter")
    back = PeftModel.from_pretrained(tiny_neox(torch.bfloat16), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(back), changed)


def test_wrapped_layers_lend_their_attributes(tmp_path):
    policy = coefficients_on(tiny_llama(), tmp_path, ("resid_post.1", "mlp_out.1"))
    layer = policy.base_model.model.model.layers[1]
    assert isinstance(layer, SparseCoeffLayer)
    assert layer.self_attn.layer_idx == 1
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


# --- generation and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("k", [None, 5], ids=["standard", "topk"])
def test_generation_with_and_without_cache_agrees(tmp_path, make, k):
    policy = coefficients_on(make(), tmp_path, ("resid_post.0", "attn_out.1", "mlp_out.2"), k=k, seed=1)
    prompts, mask = tokens(), torch.ones_like(tokens())
    prompts[0, :3], mask[0, :3] = 0, 0  # left padding
    given = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached, plain = (policy.generate(**given, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    with policy.disable_adapter():
        assert torch.equal(policy.generate(**given), make().generate(**given))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        policy = coefficients_on(tiny_neox(), tmp_path, ("resid_post.1", "mlp_out.2"), seed=1).train()
        if checkpointing:
            policy.activation_checkpointing_enable({"use_reentrant": False})
        policy(tokens(), labels=tokens()).loss.backward()
        gradients.append(torch.cat([p.grad for p in trainable(policy).values()]))
    assert torch.equal(*gradients)


def test_training_moves_the_coefficients_and_nothing_else(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1", "mlp_out.2"), k=5)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    fired = {site: torch.zeros(FEATURES, dtype=torch.bool) for site in site_layers(policy)}
    for site, layer in site_layers(policy).items():

        def note(module, args, output, seen=fired[site], sae=layer.sae):
            seen.logical_or_((sae.encode(output.detach()) > 0).flatten(0, 1).any(0))

        layer.base_layer.register_forward_hook(note)
    optimiser = torch.optim.AdamW(trainable(policy).values(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = policy(tokens(), labels=tokens()).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
    assert all(torch.equal(delta != 0, fired[site]) for site, delta in deltas(policy).items())
    assert not all(seen.all() for seen in fired.values())  # those that never fire stay untouched


# --- reading coefficients --------------------------------------------------------------------------------------------


def test_deltas_are_copies_by_site(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.2", "mlp_out.1"), seed=1)
    found = deltas(policy)
    assert list(found) == ["mlp_out.1", "mlp_out.2"]
    weight = site_layers(policy)["mlp_out.2"].sparse_coeffs_delta["default"].weight
    assert torch.equal(found["mlp_out.2"], weight)
    found["mlp_out.2"].zero_()
    assert weight.any()
    assert biases(policy) == {}
    assert deltas(policy, "absent") == {}


def test_statistics_of_coefficients(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1", "mlp_out.2"))
    one = site_layers(policy)["mlp_out.1"].sparse_coeffs_delta["default"].weight
    one.data[[3, 5, 7]] = torch.tensor([0.5, -1.5, 1e-4])
    assert delta_statistics(policy, eps=1e-3) == {
        "coefficients": 2 * FEATURES,
        "nonzero": 3,
        "changed": 2,
        "flipped": 1,
        "largest": 1.5,
        "sites": {
            "mlp_out.1": {
                "coefficients": FEATURES,
                "nonzero": 3,
                "changed": 2,
                "flipped": 1,
                "largest": 1.5,
                "l1": pytest.approx(2.0001),
                "top": [{"feature": 5, "delta": -1.5}, {"feature": 3, "delta": 0.5}],
            },
            "mlp_out.2": dict.fromkeys(("coefficients", "nonzero", "changed", "flipped", "largest", "l1"), 0)
            | {"coefficients": FEATURES, "top": []},
        },
    }
    assert delta_statistics(tiny_neox())["coefficients"] == 0


def test_random_saes_of_the_tests_do_fire():
    assert (random_sae().encode(torch.randn(100, 16)) > 0).float().mean() > 0.2
