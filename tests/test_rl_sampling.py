"""Sampling: the model's own distribution, each row by its own numbers, however rows are batched, dropped and cached."""

import inspect

import pytest
import torch
from adapter_fixtures import coefficients_on, tiny_llama, tiny_neox
from rl_fixtures import build_trainer, tiny_model
from transformers import MambaConfig, MambaForCausalLM
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from saerl_cli.rl.rollouts.sampling import choose, compact, keeps_past, sample

EOS = 1


def prompts(rows: int = 6, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(2, 60, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= torch.arange(rows)[:, None] % 3).long()
    return ids * mask, mask


def numbers(rows: int, steps: int) -> torch.Tensor:
    return torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def one_by_one(model, prompt: list[int], steps: int, uniforms, temperature, ends) -> list[int]:
    """The definition: no cache, no batch, no padding."""
    written = []
    for step in range(steps):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + written])).logits[0, -1].double()
        sums = (logits / temperature).softmax(-1).cumsum(-1)
        written.append(int((sums <= uniforms[step]).sum()))
        if written[-1] in ends:
            break
    return written


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize("adapted", [False, True])
def test_batched_cached_and_dropped_rows_are_what_the_definition_gives(tmp_path, make, adapted):
    model = make()
    if adapted:
        model = coefficients_on(model, tmp_path, ("mlp_out.1", "attn_out.2"), seed=3)
    ids, mask = prompts()
    ends, uniforms = [EOS, *range(2, 10)], numbers(6, 12)
    got = sample(model, ids, mask, 12, ends, 0.9, uniforms)
    for row in range(6):
        prompt = ids[row][mask[row].bool()].tolist()
        assert got[row] == one_by_one(model, prompt, 12, uniforms[row], 0.9, ends)
    assert len(set(map(len, got))) > 2, "rows must end at different steps"
    assert all(token not in ends for row in got for token in row[:-1])


def test_a_row_does_not_depend_on_the_others():
    model = tiny_neox()
    ids, mask = prompts()
    uniforms = numbers(6, 8)
    together = sample(model, ids, mask, 8, [EOS], 1.0, uniforms)
    halves = [sample(model, ids[part], mask[part], 8, [EOS], 1.0, uniforms[part]) for part in (slice(3), slice(3, 6))]
    assert together == halves[0] + halves[1]


def test_the_likeliest_token_without_a_temperature():
    model = tiny_neox()
    ids, mask = prompts()
    want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=59)
    got = sample(model, ids, mask, 5, [59], None)
    for row, tokens in enumerate(got):
        assert tokens == want[row, ids.shape[1] :].tolist()[: len(tokens)]


def test_tokens_are_where_the_distribution_function_passes_the_number():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 1e-16], dtype=torch.float64)
    assert choose(logits, 1.0, uniforms).tolist() == [0, 0, 1, 1, 3, 3]
    assert choose(torch.tensor([[0.25, 0.75]]).log(), 0.5, torch.tensor([0.11])).tolist() == [1]  # 1/16 : 9/16
    assert choose(torch.tensor([[0.25, 0.75]]).log(), 0.5, torch.tensor([0.09])).tolist() == [0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_scored_probabilities(tmp_path, temperature):
    """Pearson's chi-square over the two-token completions of one prompt, against probabilities from scoring."""
    model, count = tiny_model(tmp_path), 20_000
    prompt = torch.tensor([[3, 4, 5]])
    uniforms = numbers(count, 2)
    got = sample(
        model, prompt.expand(count, 3), torch.ones(count, 3, dtype=torch.long), 2, [EOS], temperature, uniforms
    )
    with torch.no_grad():
        first = (model(prompt).logits[0, -1] / temperature).softmax(-1)  # [V]
        pairs = torch.cat([prompt.expand(32, 3), torch.arange(32)[:, None]], 1)
        second = (model(pairs).logits[:, -1] / temperature).softmax(-1)  # [V, V]
    joint = first[:, None] * second
    joint[EOS] = 0
    joint[EOS, 0] = first[EOS]
    observed = torch.zeros(32, 32)
    for row in got:
        observed[row[0], row[1] if len(row) > 1 else 0] += 1
    expected = joint * count
    common = expected >= 5
    rest = (observed[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
    chi = ((observed - expected)[common] ** 2 / expected[common]).sum() + rest
    cells = int(common.sum())
    assert cells > 30
    assert abs(float(chi) - cells) < 5 * (2 * cells) ** 0.5


def test_a_model_without_keys_and_values_reads_everything_again():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5)).eval()
    assert not keeps_past(model)
    ids, uniforms = prompts()[0], numbers(6, 5)
    got = sample(model, ids, torch.ones_like(ids), 5, [EOS, 2, 3], 1.0, uniforms)
    for row in range(6):
        assert got[row] == one_by_one(model, ids[row].tolist(), 5, uniforms[row], 1.0, [EOS, 2, 3])


@pytest.mark.parametrize("k", [None, 4], ids=["relu", "topk"])
@pytest.mark.parametrize("splice", ["error_preserving", "reconstruct", "pre_activation"])
def test_features_without_a_coefficient_are_not_computed(tmp_path, splice, k):
    policy = coefficients_on(tiny_neox(), tmp_path, ("mlp_out.1",), splice, k, seed=3)
    layer = next(m for m in policy.modules() if hasattr(m, "sparse_coeffs_delta"))
    for name in ("sparse_coeffs_delta", "sparse_coeffs_bias"):
        for held in getattr(layer, name).values():
            held.weight.data[10:] = 0
    ids, mask = prompts()
    with torch.no_grad():
        whole = policy(input_ids=ids, attention_mask=mask).logits
        with compact(policy):
            small = k is None and splice != "reconstruct"
            assert (layer.fixed is not None and layer.fixed[0].d_sae <= 10) == small
            some = policy(input_ids=ids, attention_mask=mask).logits
            with policy.disable_adapter():
                off = policy(input_ids=ids, attention_mask=mask).logits
    assert layer.fixed is None
    torch.testing.assert_close(some, whole, atol=2e-4, rtol=1e-4)
    assert (off - whole).abs().max() > 0.01


def test_untouched_coefficients_cost_nothing(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path)
    ids, mask = prompts()
    layer = next(m for m in policy.modules() if hasattr(m, "sparse_coeffs_delta"))
    layer.sae.pre_activations = lambda x: pytest.fail("encoded all features")
    with compact(policy), torch.no_grad():
        policy(input_ids=ids, attention_mask=mask)


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_where_trl_generates():
    names = list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)
    assert names[:2] == ["self", "prompt_ids"]
    assert list(inspect.signature(RLOOTrainer._generate_single_turn).parameters)[:2] == ["self", "prompt_ids"]
    assert "return completion_ids, logprobs" in inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "return completion_ids\n" in inspect.getsource(RLOOTrainer._generate_single_turn)


def test_the_trainer_samples_here(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.GenerationMixin.generate", lambda *a, **k: pytest.fail("generate() was called"))
    trainer = build_trainer(tmp_path, phases=1)
    trainer.train()
    ids = [[3, 4, 5], [6, 7]]
    torch.manual_seed(4)
    first = trainer.sample(ids)
    torch.manual_seed(4)
    assert trainer.sample(ids) == first
    assert all(1 <= len(row) <= 10 for row in first)
