"""What a feature is: direct logit attribution, firing tokens, contexts."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saerl_cli.analysis.features import logit_effect, strongest_contexts

SIZES = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


class Letters:
    """A stand-in tokenizer: token i is the i-th letter."""

    def decode(self, ids):
        return "".join("abcdefghijklmnopqrstuvw"[i] for i in ids)


@pytest.fixture(params=[GPTNeoXForCausalLM, LlamaForCausalLM], ids=["neox", "llama"])
def model(request):
    torch.manual_seed(0)
    kind = {GPTNeoXForCausalLM: GPTNeoXConfig, LlamaForCausalLM: LlamaConfig}[request.param]
    model = request.param(kind(**SIZES)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            weight.data.uniform_(0.5, 1.5)  # a norm that does something
    return model


def test_logit_effect_is_the_derivative_of_the_logits_up_to_the_norms_scale(model):
    """Moving the stream along d changes logits by effect * scale, apart from the change of the scale itself."""
    inner = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
    norm = inner.final_layer_norm if hasattr(inner, "final_layer_norm") else inner.norm
    h, d = torch.randn(8), torch.randn(8)
    centred = h - h.mean() if isinstance(norm, torch.nn.LayerNorm) else h
    d_centred = d - d.mean() if isinstance(norm, torch.nn.LayerNorm) else d
    d = d - centred * (d_centred @ centred) / (centred @ centred)  # keep the scale constant to first order
    logits = lambda x: model.get_output_embeddings()(norm(x))
    got = (logits(h + 1e-3 * d) - logits(h - 1e-3 * d)) / 2e-3
    effect = logit_effect(model, "anything.mlp", d)
    scale = (got @ effect) / (effect @ effect)
    torch.testing.assert_close(got, effect * scale, atol=1e-3, rtol=1e-3)
    assert scale > 0


def test_hidden_layer_directions_go_through_the_second_map():
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    d = torch.randn(16)
    through = model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight @ d
    torch.testing.assert_close(
        logit_effect(model, "gpt_neox.layers.1.mlp.act", d), logit_effect(model, "gpt_neox.layers.1.mlp", through)
    )


def test_contexts_are_the_strongest_places_in_different_rows():
    f = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    rows = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    contexts = strongest_contexts(f, rows, Letters(), 5, width=1)
    assert contexts == [[("g", 9.0)], [("b", 1.0), ("c", 5.0)]]
