"""Shuffling, resuming, sharing and computing ahead, alike for text in memory, streamed text and a cache."""

import gc
import itertools
import json
import threading
import time

import pytest
import torch
from activation_fixtures import BOTH, LOW, Toy, ids, numbered_rows, toy_stream
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saerl_cli.activations import ShuffledStream, capture, special_ids, text_mask, token_rows
from saerl_cli.activations import forward as forward_file
from saerl_cli.activations.choose import open_stream
from saerl_cli.config.activations import ActivationsConfig, check_stream
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind, PlantedConfig
from saerl_cli.models import load_model, resolve_sites

KINDS = ["memory", "streamed", "cached"]
TEXTS = [f"we saw film {'good ' * (i % 7)}. it was number {i} ." for i in range(60)]


def text_data(path, stream: bool, heldout: int, **settings) -> DataConfig:
    """A file of texts; only of a stream are held-out documents counted."""
    counted = {"heldout_documents": heldout} if stream else {}
    return DataConfig(DataKind.text, str(path), stream=stream, **counted, **settings)


@pytest.fixture(scope="module")
def loaded(tiny_planted_model):
    return load_model(ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)))


@pytest.fixture(scope="module")
def make(loaded, tmp_path_factory):
    """Opens a stream of a kind on the tiny model: batches of 48, buffers of four."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sites = resolve_sites(["mlp_out.1", "resid_post.0"], loaded.model)

    def opened(kind, seed=3, state=None, rank=0, world_size=1, batch_size=48, **settings) -> ShuffledStream:
        data = text_data(folder / "a.jsonl", kind == "streamed", heldout=5, context_size=24)
        cache = str(folder / "cache") if kind == "cached" else None
        settings = ActivationsConfig(**{"buffer_tokens": 200, "cache": cache} | settings)
        return open_stream(
            loaded, ModelConfig(), data, settings, sites, batch_size, seed, rank, world_size, state=state
        )

    return opened


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    return set(a) == set(b) and all(torch.equal(x, b[name]) for name, x in a.items())


# --- every kind of stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_serves_the_same_bits(make, kind, prefetch):
    whole = make(kind)
    states, batches, positions = [whole.state()], [], []
    for batch in itertools.islice(whole, 31):  # several epochs
        batches.append(batch)
        positions.append(whole.positions)
        states.append(json.loads(json.dumps(whole.state())))
    for at in (0, 1, 3, 4, 5, 8, 17, 30):
        resumed = make(kind, state=states[at], prefetch=prefetch)
        assert resumed.state() == states[at]
        for number in range(at, 31):
            assert same(next(resumed), batches[number])
            assert torch.equal(resumed.positions, positions[number])
            assert resumed.state() == states[number + 1]
        resumed.close()


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_computes_one_fill(make, loaded, kind, monkeypatch):
    stream = make(kind)
    take(stream, 26)
    computed = []
    real = forward_file.capture
    monkeypatch.setattr(
        "saerl_cli.activations.stream.capture", lambda m, s, rows: computed.append(rows.numel()) or real(m, s, rows)
    )
    next(make(kind, state=stream.state()))
    assert sum(computed) <= (0 if kind == "cached" else 2 * 192)  # tokens of one buffer, with separators


@pytest.mark.parametrize("kind", KINDS)
def test_computing_ahead_changes_nothing(make, kind):
    plain, ahead = make(kind), make(kind, prefetch=True)
    for _ in range(25):
        assert same(next(plain), next(ahead))
        assert torch.equal(plain.positions, ahead.positions)
        assert plain.state() == ahead.state()
    ahead.close()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shares_of_processes_make_the_batch_of_one(make, kind, world_size):
    alone = make(kind)
    shares = [make(kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    sizes = set()
    for _ in range(13):
        batch = next(alone)
        parts = [next(stream) for stream in shares]
        places = torch.cat([stream.positions for stream in shares])
        assert places.sort().values.tolist() == list(range(48))
        for name, x in batch.items():
            together = torch.full_like(x, float("nan"))
            together[places] = torch.cat([part[name] for part in parts])
            assert torch.allclose(together, x, atol=1e-5)
        assert all(stream.state() == alone.state() for stream in shares)
        sizes |= {len(part["mlp_out.1"]) for part in parts}
    assert max(sizes) < 48


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_depends_on_the_seed(make, kind):
    first, again, other = (next(make(kind, seed=seed)) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_callers_to_keep(make, kind):
    stream = make(kind)
    kept = take(stream, 9)
    copies = [{name: x.clone() for name, x in batch.items()} for batch in kept]
    take(stream, 20)
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_serves_the_activations_of_its_text(make, loaded, kind):
    rows = token_rows(TEXTS[5:] if kind == "streamed" else TEXTS[:54], loaded.tokenizer, 24)
    text = text_mask(rows, special_ids(loaded.tokenizer))
    expected = capture(loaded.model, resolve_sites(["mlp_out.1"], loaded.model), rows)["mlp_out.1"][text]
    x = next(make(kind, batch_size=len(expected), buffer_tokens=len(expected)))["mlp_out.1"]
    distance = torch.cdist(x.double(), expected.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert x.shape == expected.shape
    assert distance.min(0).values.max() < 1e-4 and distance.min(1).values.max() < 1e-4
    assert not torch.allclose(x, expected, atol=0.1)  # shuffled


# --- the buffer ------------------------------------------------------------------------------------------------------


def test_every_token_is_served_once_an_epoch_and_sites_stay_aligned():
    stream = toy_stream(rows=numbered_rows(352), batch_size=44, buffer_tokens=352)  # one buffer = one epoch
    for _ in range(3):
        served = []
        for batch in take(stream, 8):
            assert torch.equal(batch["low"][:, 0], batch["high"][:, 0])
            assert (batch["low"][:, 1] == 1).all() and (batch["high"][:, 1] == -2).all()
            served += ids(batch)
        assert sorted(served) == list(range(1, 353)) and served != sorted(served)


def test_memory_is_allocated_once():
    stream = toy_stream()
    places = set()
    for _ in range(20):
        next(stream)
        fill = stream._current
        places |= {(name, x.data_ptr(), len(x)) for name, x in fill.data.items()}
    assert {(name, rows) for name, _, rows in places} == {("low", 64), ("high", 64)}
    assert len(places) == 2


def test_a_share_that_grows_gets_more_memory():
    shares = [toy_stream(rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(60):
        assert sorted(itertools.chain(*[(next(s), s.positions.tolist())[1] for s in shares])) == list(range(16))


def test_a_process_without_rows_serves_nothing_of_the_right_shape():
    stream = toy_stream(rows=numbered_rows(30, 31), batch_size=16, buffer_tokens=16, rank=1, world_size=2)
    assert {name: x.shape for name, x in next(stream).items()} == {"low": (0, 3), "high": (0, 2)}


# --- outliers --------------------------------------------------------------------------------------------------------


def spiked(*which, factor=1000.0, column=2):
    """A toy in which some tokens are far longer than the rest."""
    model = Toy()
    model.embed.weight.data[list(which), column] = factor
    return model


@pytest.mark.parametrize("prefetch", [False, True])
def test_outliers_leave_their_batch_and_the_others_stay_where_they_are(prefetch):
    model = spiked(5, 77, 300, factor=1e6)
    whole, filtered = toy_stream(model), toy_stream(model, outlier_norm=10.0, prefetch=prefetch)
    dropped = 0
    for _ in range(40):
        batch, rest = next(whole), next(filtered)
        stays = [token not in (5, 77, 300) for token in ids(batch)]
        assert ids(rest) == [token for token, kept in zip(ids(batch), stays, strict=True) if kept]
        assert filtered.positions.tolist() == [place for place, kept in enumerate(stays) if kept]
        assert len(rest["high"]) == len(rest["low"])
        dropped += stays.count(False)
        assert filtered.dropped == dropped
    assert dropped >= 3 and whole.dropped == 0
    filtered.close()


def test_a_token_is_an_outlier_if_it_is_one_at_any_site():
    model = Toy()
    model.high.weight.data[1] = torch.tensor([0.0, -2.0, 1e4])  # high sees the third dimension magnified
    model.embed.weight.data[9, 2] = 1.0
    one, both = toy_stream(model, sites=[LOW], outlier_norm=5.0), toy_stream(model, outlier_norm=5.0)
    assert 9 in itertools.chain(*map(ids, take(one, 22)))
    assert 9 not in itertools.chain(*map(ids, take(both, 22)))


def test_the_median_is_that_of_the_first_text_even_after_a_restart(monkeypatch):
    monkeypatch.setattr(forward_file, "FORWARD_TOKENS", 90)  # ten rows: tokens 1 to 80, whose median norm is about 40
    monkeypatch.setattr("saerl_cli.activations.stream.FORWARD_TOKENS", 90)
    stream = toy_stream(outlier_norm=2.0)
    limit = 2 * (40**2 + 1) ** 0.5
    first = take(stream, 6)
    state = stream.state()
    served = take(stream, 20)
    assert max(itertools.chain(*map(ids, first + served))) == 80  # 81 is longer than twice the median
    assert stream._limits["low"] == pytest.approx(limit)
    resumed = toy_stream(outlier_norm=2.0, state=state)
    assert all(same(a, b) for a, b in zip(served, take(resumed, 20), strict=True))


def test_processes_drop_what_one_process_drops():
    model = spiked(5, 77, 300, factor=1e6)
    alone = toy_stream(model, outlier_norm=10.0)
    pair = [toy_stream(model, outlier_norm=10.0, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(40):
        batch, shares = next(alone), []
        for stream in pair:
            x = next(stream)
            shares.append(dict(zip(stream.positions.tolist(), ids(x), strict=True)))
        assert shares[0] | shares[1] == dict(zip(alone.positions.tolist(), ids(batch), strict=True))
    assert sum(stream.dropped for stream in pair) == alone.dropped > 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", [{}, {"outlier_norm": 3.0}, {"prefetch": True}])
def test_activations_that_are_not_finite_name_site_and_step(value, settings):
    order = [ids(batch) for batch in take(toy_stream(), 30)]
    token = order[9][3]
    step = 1 + next(number for number, batch in enumerate(order) if token in batch)
    model = Toy()
    model.high.register_forward_hook(lambda module, args, output: torch.where(args[0][..., :1] == token, value, output))
    stream = toy_stream(model, **settings)
    with pytest.raises(ValueError, match=f"^step {step}: activations at high are NaN or infinite$"):
        take(stream, 30)
    stream.close()


def test_large_finite_activations_are_fine():
    model = spiked(*range(1, 351), factor=3e38)
    assert next(toy_stream(model, sites=[LOW]))["low"].isfinite().all()


def test_an_error_ahead_is_raised_when_its_fill_is_due():
    model = Toy()

    def fail(module, args, output):
        if model.passes == 3:
            raise RuntimeError("the model broke")

    model.low.register_forward_hook(fail)
    stream = toy_stream(model, prefetch=True)
    assert len(take(stream, 8)) == 8  # two buffers
    with pytest.raises(RuntimeError, match="the model broke"):
        next(stream)
    stream.close()


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("activations")]


@pytest.mark.parametrize("closed", [False, True])
def test_the_thread_ends_with_its_stream(closed):
    stream = toy_stream(prefetch=True)
    next(stream)
    assert len(ahead_threads()) == 1
    if closed:
        stream.close()
        assert not ahead_threads()
        with pytest.raises(ValueError, match="the stream is closed"):
            take(stream, 10)
    del stream
    gc.collect()
    end = time.monotonic() + 5
    while ahead_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not ahead_threads()


def test_closing_does_not_wait_for_the_whole_fill(monkeypatch):
    monkeypatch.setattr("saerl_cli.activations.stream.rows_at_once", lambda context: 1)
    model = Toy()
    stream = toy_stream(model, prefetch=True)
    next(stream)
    model.low.register_forward_hook(lambda *_: time.sleep(0.05))
    take(stream, 4)
    passes = model.passes
    stream.close()
    assert model.passes <= passes + 3


@pytest.mark.parametrize(
    ("data", "activations", "message"),
    [
        ({}, {"buffer_tokens": 63}, "sae.batch_size=64 exceeds activations.buffer_tokens=63"),
        (
            {"kind": DataKind.text, "path": "a.txt", "stream": True},
            {"cache": "somewhere"},
            "activations.cache needs all text at once; write data.stream=false, or leave activations.cache empty",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(data, activations, message):
    with pytest.raises(ValueError, match=message):
        check_stream(DataConfig(**data), ActivationsConfig(**activations), 64)


def test_settings_that_go_together_are_not_refused():
    check_stream(DataConfig(), ActivationsConfig(buffer_tokens=64, cache="somewhere"), 64)
    check_stream(DataConfig(DataKind.text, "a.txt", stream=True), ActivationsConfig(prefetch=True), 64)


@pytest.mark.parametrize("kind", KINDS)
def test_less_text_than_a_batch_is_refused(make, loaded, kind, tmp_path):
    (tmp_path / "a.txt").write_text("we saw film .\n" * 12)
    data = text_data(tmp_path / "a.txt", kind == "streamed", heldout=2)
    settings = ActivationsConfig(cache=str(tmp_path / "cache") if kind == "cached" else None)
    with pytest.raises(ValueError, match=r"the text holds 4\d tokens, less than one batch of sae.batch_size=64"):
        open_stream(loaded, ModelConfig(), data, settings, resolve_sites(["mlp_out.1"], loaded.model), 64)
    assert not (tmp_path / "cache").exists()


def test_text_of_separators_alone_is_refused():
    with pytest.raises(ValueError, match="the text holds 0 tokens"):
        toy_stream(rows=torch.zeros(5, 9, dtype=torch.long))


# --- capture ---------------------------------------------------------------------------------------------------------


def test_modules_above_the_last_site_are_never_called():
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    model = GPTNeoXForCausalLM(config).eval()
    called = set()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    sites = resolve_sites(["mlp_out.1", "resid_post.0"], model)
    capture(model, sites, torch.randint(0, 64, (2, 8)))
    layers = {name.split(".")[2] for name in called if name.startswith("gpt_neox.layers.")}
    assert layers == {"0", "1"}
    assert not called & {"embed_out", "gpt_neox.final_layer_norm"}


def test_another_thread_may_run_the_model_meanwhile():
    model, outside = Toy(), []
    rows = numbered_rows()

    def run_elsewhere(module, args, output):
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: outside.append(model(rows[2:3])))
            other.start()
            other.join()

    model.embed.register_forward_hook(run_elsewhere)
    model.low.register_forward_hook(run_elsewhere)
    found = capture(model, BOTH, rows[:1])
    assert found["low"].shape[:2] == found["high"].shape[:2] == (1, 9)
    assert torch.equal(found["low"][0, :, 0].long(), rows[0])
    assert [x.shape for x in outside] == [(1, 9, 2)] * 2  # complete passes, not cut short


# --- what the settings ask for ---------------------------------------------------------------------------------------


def test_the_settings_choose_the_stream(make):
    kinds = {kind: make(kind) for kind in KINDS}
    assert {kind: type(stream).__name__ for kind, stream in kinds.items()} == {
        "memory": "ActivationStream",
        "streamed": "ActivationStream",
        "cached": "CachedStream",
    }
    next(kinds["streamed"])
    assert kinds["memory"].counts.documents == kinds["cached"].counts.documents == len(TEXTS)
    assert kinds["streamed"].counts.documents >= 6


def test_what_was_left_out_is_reported(loaded, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"we saw film .\n\n\xff\n" * 40)
    sites = resolve_sites(["mlp_out.1"], loaded.model)
    for stream in (False, True):
        data = text_data(tmp_path / "a.txt", stream, heldout=2)
        opened = open_stream(loaded, ModelConfig(), data, ActivationsConfig(buffer_tokens=150), sites, 150)
        next(opened)
        assert opened.counts.note() == "left out lines or documents of the text: 40 empty, 40 not UTF-8"


def test_the_planted_language_is_read(loaded):
    model = ModelConfig(planted=PlantedConfig(documents=60))
    sites = resolve_sites(["mlp_out.1"], loaded.model)
    stream = open_stream(loaded, model, DataConfig(), ActivationsConfig(buffer_tokens=64), sites, 32)
    assert next(stream)["mlp_out.1"].shape == (32, 32)
