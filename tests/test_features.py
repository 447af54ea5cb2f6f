"""What a feature is: direct logit attribution, streamed sums, places, quantiles, attributes, labels, explanations."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy
import psutil
import pytest
import torch
from rl_fixtures import tiny_model, tiny_sae, word_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saerl_cli.analysis.features import (
    Depth,
    Source,
    Text,
    aurocs,
    collect,
    describe_features,
    extreme_tokens,
    logit_effect,
    nearest,
    stream,
    take_census,
    token_label,
)
from saerl_cli.analysis.features.attributes import input_side, output_side
from saerl_cli.analysis.features.describe import quantiles_of
from saerl_cli.analysis.features.directions import piece
from saerl_cli.analysis.features.explain import balanced, detection, digits, explain, explain_all, first_phrase, marked
from saerl_cli.analysis.features.labels import as_file, put_labels, read_labels
from saerl_cli.analysis.features.neuronpedia import FROM_TABLES, write_batches
from saerl_cli.analysis.features.stream import AFTER, BEFORE, BINS, Keep, Places, binned, padded_rows, pearson, windows
from saerl_cli.config.features import ExplainConfig
from saerl_cli.models import Loaded, resolve_sites
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import load_sae
from saerl_cli.sae.metrics import auroc

SIZES = {"vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


# --- directions ------------------------------------------------------------------------------------------------------


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
    got = ((logits(h + 1e-3 * d) - logits(h - 1e-3 * d)) / 2e-3).detach()
    effect = logit_effect(model, "anything.mlp", d)
    scale = (got @ effect) / (effect @ effect)
    torch.testing.assert_close(got, effect * scale, atol=1e-3, rtol=1e-3)
    assert scale > 0
    many = logit_effect(model, "anything.mlp", torch.stack([d, 2 * d]))
    torch.testing.assert_close(many, torch.stack([effect, 2 * effect]))


def test_hidden_layer_directions_go_through_the_second_map():
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    d = torch.randn(16)
    through = model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight @ d
    torch.testing.assert_close(
        logit_effect(model, "gpt_neox.layers.1.mlp.act", d), logit_effect(model, "gpt_neox.layers.1.mlp", through)
    )


def test_extreme_tokens_and_nearest_directions_by_hand():
    tokenizer = word_tokenizer()
    effect = torch.zeros(len(tokenizer) + 3)
    effect[7], effect[9], effect[-1] = 2.0, -3.0, 99.0  # the last row belongs to no token
    up, down = extreme_tokens(effect, tokenizer, 1)
    assert (up, down) == (["w5"], ["w7"])
    decoder = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    cosine, near = nearest(decoder, torch.tensor([0, 2]), 2)
    assert near[0, 0] == 1 and cosine[0].tolist() == pytest.approx([1, 0]) and near[0, 1] == 2
    assert 2 not in near[1].tolist() and nearest(decoder, torch.tensor([0]), 9)[1].shape == (1, 3)


@pytest.mark.real_data
def test_pieces_of_subwords_put_together_are_the_text(shared_data):
    from saerl_cli.models import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "neox_stories_nano")
    text = 'Lily\'s friend said, "I want to play!"\nThey unhappily climbed.'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text.split()) and "".join(piece(tokenizer, i) for i in ids).strip() == text


def test_pieces_of_words_have_spaces_between_them(tiny_planted_model):
    from saerl_cli.models import load_tokenizer

    tokenizer = load_tokenizer(tiny_planted_model)
    text = "the film was good, thanks."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(piece(tokenizer, i) for i in ids).strip() in (text, "the film was good , thanks .")


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    """Random weights of two layers."""
    folder = tmp_path_factory.mktemp("model")
    return Loaded(tiny_model(folder), word_tokenizer(), "tiny", None, "0", 32, folder)


@pytest.fixture(scope="module")
def text() -> Text:
    """Rows of random words, a fifth of them masked."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(2, 32, (50, 20), generator=generator)
    return Text(rows, torch.rand(rows.shape, generator=generator) > 0.2)


@pytest.fixture(scope="module", params=["standard", "topk"])
def source(request, loaded, tmp_path_factory) -> Source:
    """A random SAE of 64 features at the second MLP."""
    sae = load_sae(tiny_sae(tmp_path_factory.mktemp("sae")))
    if request.param == "topk":
        other = SAE(32, 64, "topk", 5)
        other.load_state_dict(sae.state_dict())
        sae = other
    return Source(loaded.model, resolve_sites(["mlp_out.1"], loaded.model)[0], sae)


@pytest.fixture(scope="module")
def dense(source, text) -> torch.Tensor:
    """All activations at once, [rows, seq, M], silent where masked."""
    with torch.no_grad():
        out: dict = {}
        hook = source.model.get_submodule(source.site.module).register_forward_hook(lambda m, a, y: out.update(y=y))
        source.model(input_ids=text.rows)
        hook.remove()
        return source.sae.encode(out["y"]) * text.mask[..., None]


def test_the_census_is_that_of_all_activations_at_once(source, text, dense):
    census = take_census(source, text)
    f = dense[text.mask].double()
    assert census.tokens == len(f) == text.tokens
    for name, expected in (("fired", (f > 0).sum(0)), ("total", f.sum(0)), ("square", f.square().sum(0))):
        torch.testing.assert_close(getattr(census, name), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(census.peak.double(), f.amax(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(census.density, (f > 0).double().mean(0))


def test_what_is_collected_is_what_all_activations_at_once_show(source, text, dense):
    census, chosen = take_census(source, text), torch.tensor([3, 60, 17])
    kept = collect(source, text, chosen, census.peak[chosen], Keep(top=4, sample=30, silent=3, values=True))
    f = dense[..., chosen]
    torch.testing.assert_close(torch.cat(kept.values), f[text.mask], rtol=1e-4, atol=1e-5)
    for c in range(3):
        mine = f[text.mask][:, c]
        counts, _ = numpy.histogram(mine[mine > 0].numpy(), BINS, (0, float(mine.max())))
        assert abs(kept.histogram[c].numpy() - counts).sum() <= 2, "but for rounding at the edge of a bin"
        assert kept.histogram[c].sum() == (mine > 0).sum()
        strongest = f[..., c].amax(1).sort(descending=True, stable=True)
        torch.testing.assert_close(kept.top.score[:, c], strongest.values[:4], rtol=1e-4, atol=1e-5)
        assert kept.top.row[:, c].tolist() == strongest.indices[:4].tolist()
        for k in range(4):
            row, at = int(kept.top.row[k, c]), int(kept.top.at[k, c])
            around = torch.nn.functional.pad(f[row, :, c], (BEFORE, AFTER))[at : at + BEFORE + 1 + AFTER]
            torch.testing.assert_close(kept.top.window[k, c], around, rtol=1e-4, atol=1e-5)
        for k in (kept.sample.score[:, c] > 0).nonzero()[:, 0].tolist():
            assert f[int(kept.sample.row[k, c]), int(kept.sample.at[k, c]), c] > 0
        places = list(zip(kept.sample.row[:, c].tolist(), kept.sample.at[:, c].tolist(), strict=True))
        found = min(30, int((mine > 0).sum()))
        assert len(set(places[:found])) == found, "no firing is drawn twice"
        assert (kept.silent.window[kept.silent.score[:, c] > 0, c] == 0).all()
        by_token = torch.zeros(32).index_add_(0, text.rows[text.mask], mine)
        torch.testing.assert_close(kept.by_token[:, c].float(), by_token, rtol=1e-4, atol=1e-4)
    everything = dense[text.mask].double()
    expected = torch.nan_to_num(torch.corrcoef(everything.T))[chosen]
    torch.testing.assert_close(pearson(kept, census), expected, rtol=1e-3, atol=1e-4)


def test_batches_do_not_change_what_is_found(source, text, loaded, monkeypatch):
    whole = take_census(source, text)
    chosen = whole.density.topk(6).indices.tolist()
    depth = Depth(contexts=4, silent=3)
    first = describe_features(source, loaded, text, whole, chosen, depth)
    monkeypatch.setattr(stream, "CODES_AT_ONCE", 64 * 7)
    small = replace(source, rows_at_once=3)
    parts = take_census(small, text)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-5, atol=1e-5)
    assert parts.fired.tolist() == whole.fired.tolist()
    second = describe_features(small, loaded, text, parts, chosen, depth)
    for one, other in zip(first, second, strict=True):
        for key in ("contexts", "silent", "drawn"):
            tokens = [[[token for token, _ in context] for context in which[key]] for which in (one, other)]
            assert tokens[0] == tokens[1] and (tokens[0] or key == "silent"), key  # half of the ReLUs always fire
        assert one["fires_on"] == other["fires_on"] and one["promotes"] == other["promotes"]
        assert one["density"] == other["density"]
        assert [q["from"] for q in one["quantiles"]] == pytest.approx([q["from"] for q in other["quantiles"]], abs=2e-4)
        assert [n["feature"] for n in one["neighbours"]["together"]] == [
            n["feature"] for n in other["neighbours"]["together"]
        ]


def test_the_draw_is_uniform_over_firings(loaded, text, source):
    """A firing is among the 10 drawn with probability 10 / firings, whatever its activation and place."""
    census = take_census(source, text)
    feature = int(((census.fired - 60).abs()).argmin())
    chosen, hits, firings = torch.tensor([feature]), {}, int(census.fired[feature])
    assert firings > 20
    for seed in range(150):
        drawn = collect(
            source, text, chosen, census.peak[chosen], Keep(top=0, sample=10, seed=seed, products=False)
        ).sample
        for place in zip(drawn.row[:, 0].tolist(), drawn.at[:, 0].tolist(), strict=True):
            hits[place] = hits.get(place, 0) + 1
    expected = 150 * 10 / firings
    counts = torch.tensor([*hits.values(), *[0] * (firings - len(hits))]).double()
    assert len(counts) == firings
    chi_square = float(((counts - expected).square() / (expected * (1 - 10 / firings))).sum())
    assert chi_square < firings + 4 * (2 * firings) ** 0.5


def test_a_hundred_thousand_features_are_usable(loaded, text):
    """Bounded memory: all activations of these features would be 320 MB, the products of all features 40 GB."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(32, 100_000)
    sae.W_enc.data.normal_(generator=generator)
    sae.W_dec.data.copy_(torch.nn.functional.normalize(sae.W_enc.T, dim=-1))
    sae.b_enc.data.fill_(-0.5)
    wide = Source(loaded.model, resolve_sites(["mlp_out.1"], loaded.model)[0], sae)
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    try:
        census = take_census(wide, text)
        found = describe_features(wide, loaded, text, census, [0, 99_999, *range(500, 538)], Depth(contexts=2))
    finally:
        done.set()
        thread.join()
    assert len(found) == 40 and found[1]["feature"] == 99_999
    assert time.monotonic() - start < 60
    assert peak[0] < 600e6, f"{peak[0] / 1e6:.0f} MB"


def test_a_feature_that_never_fires_is_described_as_such(loaded, text, source):
    sae = SAE(32, 4)
    sae.W_dec.data.normal_(generator=torch.Generator().manual_seed(0))
    sae.b_enc.data.fill_(-1)
    silent = replace(source, sae=sae)
    (one,) = describe_features(silent, loaded, text, take_census(silent, text), [2], Depth(dashboards=True))
    assert (one["density"], one["peak"], one["contexts"], one["quantiles"], one["fires_on"]) == (0, 0, [], [], [])
    assert one["histogram"] == {"edges": [], "tokens": []} and one["neighbours"]["together"] == []
    assert token_label(one) == f"never fires on {text.tokens:,} tokens"
    assert len(one["promotes"]) == 10
    json.dumps(one, allow_nan=False)


def test_an_unknown_feature_is_refused_with_the_range(loaded, text, source):
    with pytest.raises(ValueError, match="mlp_out.1 has the features 0 to 63, not 64"):
        describe_features(source, loaded, text, take_census(source, text), [1, 64])


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_histogram_by_hand():
    f = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.51, 0.0], [0.01, 0.0]])
    counts = binned(f, torch.tensor([1.0, 1.0]))
    assert counts[0].nonzero()[:, 0].tolist() == [0, BINS // 2, BINS - 1] and counts[0].sum() == 4
    assert counts[0, BINS // 2] == 2 and counts[1, BINS - 1] == 1 and counts[1].sum() == 1


def test_windows_by_hand():
    f = torch.arange(1.0, 7.0).view(2, 3, 1)  # rows [1 2 3] and [4 5 6]
    found = windows(padded_rows(f), torch.tensor([[1], [0]]), torch.tensor([[0], [2]]))
    assert found[0, 0].tolist() == [0.0] * BEFORE + [4, 5, 6] + [0.0] * (AFTER - 2)
    assert found[1, 0, BEFORE - 2 : BEFORE + 2].tolist() == [1, 2, 3, 0]


def test_quantiles_by_hand():
    """Eight firings 1 to 8 in quarters: bounds are the sample's quantiles, each part holds two."""
    values = torch.tensor([5.0, 1, 8, 3, 2, 7, 6, 4])
    text = Text(torch.arange(2, 10).view(8, 1), torch.ones(8, 1, dtype=torch.bool))
    window = torch.zeros(9, 1, BEFORE + 1 + AFTER)
    window[:8, 0, BEFORE] = values
    score = torch.tensor([*[0.9 - i / 10 for i in range(8)], 0.0]).view(9, 1)  # the ninth place is none
    row = torch.tensor([*range(8), 0]).view(9, 1)
    places = Places(score, row, torch.zeros_like(row), window)
    found = quantiles_of(places, 0, text, word_tokenizer(), Depth(contexts=8, quantiles=4))
    assert [(q["from"], q["to"]) for q in found] == [(6.25, 8.0), (4.5, 6.25), (2.75, 4.5), (1.0, 2.75)]
    shown = [[context[0][1] for context in q["contexts"]] for q in found]
    assert shown == [[8, 7], [5, 6], [3, 4], [1, 2]], "in the order in which they were drawn"


def test_auroc_and_f1_by_hand():
    scores = torch.tensor([[0.0, 1.0], [0.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    truth = torch.tensor([[True, False], [False, False], [True, False], [False, False]])
    area = aurocs(scores, truth)
    assert area[:, 0].tolist() == [(0.5 + 0 + 1 + 1) / 4, (1 + 1 + 0.5 + 0.5) / 4]
    assert area[:, 1].tolist() == [0.5, 0.5], "no positives"
    assert area[0, 0] == auroc(scores[:, 0], truth[:, 0])
    first, second = input_side(scores, truth, ("a", "b"))
    assert first["attributes"]["a"] == {"f1": 0.5, "auroc": 0.625}
    assert (second["attribute"], second["f1"]) == ("a", pytest.approx(2 / 3))


def test_the_output_side_finds_the_attribute_whose_words_are_promoted(tiny_planted_model):
    from saerl_cli.models import load_tokenizer
    from saerl_cli.planted.language import attribute_words

    tokenizer = load_tokenizer(tiny_planted_model)
    effect = torch.zeros(2, len(tokenizer))
    effect[0, tokenizer.convert_tokens_to_ids(sorted(attribute_words("cursing")))] = 1.0
    effect[1, tokenizer.convert_tokens_to_ids(sorted(attribute_words("polite")))] = -2.0
    up, down = output_side(effect, tokenizer)
    assert up["promotes"] == {"attribute": "cursing", "auroc": 1.0}
    assert down["suppresses"] == {"attribute": "polite", "auroc": 0.0}


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_hand_win_over_a_model_and_a_model_over_tokens(tmp_path):
    base = {"site": "mlp_out.1", "fires_on": ["a", "b", "c"], "mass": [0.6, 0.2, 0.05], "promotes": ["x", "y"]}
    features = [{**base, "feature": 1}, {**base, "feature": 2, "explanation": {"text": "said"}}, {**base, "feature": 3}]
    (tmp_path / "labels.json").write_text('{"mlp_out.1": {"3": "by hand", "9": "another"}, "mlp_out.7": {"0": "far"}}')
    imported = read_labels(tmp_path / "labels.json", {"mlp_out.1": 64})
    put_labels(features, imported)
    assert [(one["label"], one["label_from"]) for one in features] == [
        ("a · b → x · y", "tokens"),
        ("said", "model"),
        ("by hand", "file"),
    ]
    assert as_file(features, imported) == {
        "mlp_out.1": {"1": "a · b → x · y", "2": "said", "3": "by hand", "9": "another"},
        "mlp_out.7": {"0": "far"},
    }
    assert token_label(base | {"mass": [0.01, 0.01, 0.01]}).startswith("many: a · b · c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"mlp_out.1": {"64": "x"}}', "names mlp_out.1:64, but its features are 0 to 63"),
        ('{"mlp_out.3": {"1": "x"}}', "names none of the sites mlp_out.1, only mlp_out.3"),
        ("[1]", "is no label file"),
        ("{", "malformed|no label file"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(tmp_path, content, message):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.json", {"mlp_out.1": 64})


# --- explanations ----------------------------------------------------------------------------------------------------


def test_balanced_accuracy_by_hand():
    found = balanced([True, True, True, False], [True, False])
    assert found["score"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["score_se"] == pytest.approx(((3 / 16) / 4 + (1 / 4) / 2) ** 0.5 / 2)
    assert balanced([True], []) == {}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("1 0 1", [True, False, True]),
        ("[1, 0, 1]", [True, False, True]),
        ("1 0", None),
        ("1 0 1 1", None),
        ("10 1", None),
        ("yes", None),
    ],
)
def test_answers_in_another_form_are_not_guessed(answer, found):
    assert digits(answer, 3) == found


def test_a_judge_that_knows_scores_one_and_one_that_answers_nonsense_is_not_scored():
    positive, negative = [f"curse {i}" for i in range(7)], [f"nice {i}" for i in range(5)]

    def knows(question: str) -> str:
        lines = question.split("\n\n")[2].splitlines()
        return " ".join(str(int("curse" in line)) for line in lines)

    assert detection("cursing", positive, negative, knows, batch=5) == {
        "judged": 12,
        "unread": 0,
        "score": 1.0,
        "score_se": 0.0,
    }
    assert detection("x", positive, negative, lambda question: "1 1 1 1", batch=4)["score"] == 0.5
    assert detection("x", positive, negative, lambda question: "who knows", batch=5) == {"judged": 0, "unread": 12}


def test_contexts_that_were_shown_are_not_judged():
    shown = [[("the", 0.0), ("damn", 2.0)]]
    one = {"feature": 0, "contexts": shown, "drawn": [*shown, [("a", 0.0), ("hell", 1.0)]], "silent": [[("so", 0.0)]]}
    asked = []
    found = explain(one, lambda question: asked.append(question) or '"Curses."\nmore', ExplainConfig(model="m"))
    assert found["text"] == "Curses" and "1. the <<damn>>" in asked[0]
    assert "a hell" in asked[1] and "so" in asked[1] and "the damn" not in asked[1] and "<<" not in asked[1]
    assert first_phrase("\n\n  ") == "" and marked([(" a", 0.0), (" b", 1.0)]) == "a<<b>>"


@pytest.fixture
def service():
    """A tiny OpenAI-compatible service on this machine, which knows the word damn."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            question = body["messages"][0]["content"]
            answer = "the word damn"
            if "In which of the following" in question:
                lines = question.split("\n\n")[2].splitlines()
                answer = " ".join(str(int("damn" in line)) for line in lines)
            reply = {"choices": [{"message": {"content": answer}}]} if body["model"] == "stub" else {"oops": 1}
            status = 401 if body["model"] == "closed" else 200
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    thread.join()
    server.server_close()


def words(*tokens: str) -> list:
    return [(token, float(token == "damn")) for token in tokens]


def test_an_endpoint_explains_and_judges(service, monkeypatch):
    url, seen = service
    monkeypatch.setenv("MY_KEY", "secret")
    one = {
        "feature": 3,
        "contexts": [words("a", "damn", "film")],
        "drawn": [words("damn", str(i)) for i in range(4)],
        "silent": [words("nice", str(i)) for i in range(4)],
    }
    never = {"feature": 4, "contexts": []}
    config = ExplainConfig(endpoint=url + "/", model="stub", key="MY_KEY", judged=3, batch=2)
    explain_all([one, never], config)
    assert one["explanation"] == {
        "text": "the word damn",
        "model": "stub",
        "judged": 6,
        "unread": 0,
        "score": 1.0,
        "score_se": 0.0,
    }
    assert "explanation" not in never and len(seen) == 1 + 3
    path, key, body = seen[0]
    assert (path, key, body["temperature"]) == ("/v1/chat/completions", "Bearer secret", 0)
    for name, message in (("closed", "refused with status 401 .*MY_KEY"), ("odd", "another form than OpenAI's")):
        with pytest.raises(ValueError, match=message) as caught:
            explain_all([one], replace(config, model=name))
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    explain_all([one], config)
    assert seen[-1][1] is None


def test_an_endpoint_that_is_not_there_is_one_line():
    config = ExplainConfig(endpoint="http://127.0.0.1:9/v1", model="m", timeout=2)
    with pytest.raises(ValueError, match="cannot reach http://127.0.0.1:9/v1/chat/completions"):
        explain_all([{"feature": 0, "contexts": [words("damn")]}], config)


def test_nothing_is_asked_unless_a_model_is_named():
    features = [{"feature": 0, "contexts": [words("damn")]}]
    explain_all(features, ExplainConfig())
    assert features == [{"feature": 0, "contexts": [words("damn")]}]
    with pytest.raises(ValueError, match="explain.endpoint does nothing without explain.model"):
        ExplainConfig(endpoint="http://localhost/v1")


def test_a_local_model_is_asked_by_its_likeliest_tokens(tiny_planted_model):
    """Mechanics: a model that cannot answer leaves texts unread and is not scored; twice the same."""
    config = ExplainConfig(model=str(tiny_planted_model), max_tokens=6, judged=2)
    one = {
        "feature": 0,
        "contexts": [words("the", "damn", "film")],
        "drawn": [words("damn", "film"), words("so", "damn")],
        "silent": [words("nice"), words("good")],
    }
    explain_all([one], config)
    first = one["explanation"]
    explain_all([one], config)
    assert one["explanation"] == first and first["text"] and first["unread"] + first["judged"] == 4
    with pytest.raises(ValueError, match="fills the context"):
        explain_all([one], replace(config, max_tokens=64))


# --- Neuronpedia -----------------------------------------------------------------------------------------------------

KEYS = {
    "feature_index",
    *FROM_TABLES,
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "n_prompts_total",
    "n_tokens_in_prompt",
    "dataset",
    "decoder_weights_dist",
    "activations",
}


def test_neuronpedia_files_hold_its_keys_and_the_numbers(tmp_path, loaded, text, source, dense):
    census = take_census(source, text)
    chosen = census.density.topk(3).indices.tolist()
    found = describe_features(source, loaded, text, census, chosen, Depth(contexts=4, quantiles=2, dashboards=True))
    facts = {"model_id": "tiny", "sae_set": "saerl", "dataset": "d", "prompts": 50, "tokens_in_prompt": 20}
    (path,) = write_batches(tmp_path, found, {"mlp_out.1": {"layer": 1}}, facts)
    batch = json.loads(path.read_text())
    assert {key: batch[key] for key in batch if key != "features"} == {
        "model_id": "tiny",
        "layer": 1,
        "sae_set": "saerl",
        "sae_id_suffix": None,
    }
    f = dense[text.mask]
    for one, feature in zip(batch["features"], chosen, strict=True):
        assert one.keys() == KEYS and one["feature_index"] == feature
        assert len(one["freq_hist_data_bar_values"]) == len(one["freq_hist_data_bar_heights"]) == BINS
        assert sum(one["logits_hist_data_bar_heights"]) == len(loaded.tokenizer)
        assert len(one["pos_str"]) == len(one["pos_values"]) == 10 and one["pos_values"][0] > one["neg_values"][0]
        strongest, *others = one["activations"]
        assert (strongest["bin_min"], strongest["bin_contains"]) == (-1, -1)
        assert max(strongest["values"]) == pytest.approx(strongest["bin_max"], abs=1e-3)
        for shown in one["activations"]:
            assert len(shown["tokens"]) == len(shown["values"])
            value = shown["values"][shown["qualifying_token_index"]]
            assert value > 0 and value <= shown["bin_max"] + 1e-3 and value >= shown["bin_min"] - 1e-3
        assert {shown["bin_contains"] for shown in others} == {-1, 0.5}
        other = one["correlated_features_indices"][0]
        cosine = torch.nn.functional.cosine_similarity(f[:, feature], f[:, other], dim=0)
        assert other != feature and one["correlated_features_l1"][0] == pytest.approx(float(cosine), abs=1e-3)
