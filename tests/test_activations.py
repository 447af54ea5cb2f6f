import itertools
import json

import pytest
import torch

from saerl_cli.activations import (
    ActivationStream,
    activation_batches,
    capture,
    pack,
    special_ids,
    text_mask,
    token_rows,
)
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind, PlantedConfig
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import load_model, output_tensor, resolve_sites

PLANTED = ModelConfig(planted=PlantedConfig(documents=300))
STORIES = ModelConfig(kind=ModelKind.local, path="anywhere")


@pytest.fixture(scope="module")
def loaded(tiny_planted_model):
    return load_model(ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)))


@pytest.fixture(scope="module")
def rows(loaded):
    return token_rows(documents(DataConfig(max_documents=60), PLANTED, "train"), loaded.tokenizer, 32)


def stream(loaded, rows, names=("mlp_out.1",), **settings):
    sites = resolve_sites(names, loaded.model)
    settings = {"batch_size": 64, "buffer_tokens": 256} | settings
    return ActivationStream(loaded.model, rows, sites, special_ids(loaded.tokenizer), **settings)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


# --- documents -------------------------------------------------------------------------------------------------------


def test_splits_of_text_are_disjoint_and_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {i}"}) + "\n" for i in range(20)))
    data = DataConfig(kind=DataKind.text, path=str(path), heldout=0.25)
    train, heldout = (documents(data, STORIES, split) for split in ("train", "heldout"))
    assert train + heldout == [f"story {i}" for i in range(20)]
    assert len(heldout) == 5


def test_splits_of_the_planted_language_are_disjoint():
    train, heldout = (set(documents(DataConfig(), PLANTED, split)) for split in ("train", "heldout"))
    assert len(train) > 290
    assert not train & heldout


def test_the_planted_language_belongs_to_the_planted_model():
    with pytest.raises(ValueError, match="data=planted belongs to model=planted"):
        documents(DataConfig(), STORIES, "train")


def test_a_row_cannot_be_longer_than_the_context():
    assert row_length(DataConfig(), 2048) == 512
    assert row_length(DataConfig(), 96) == 96
    assert row_length(DataConfig(context_size=40), 96) == 40
    with pytest.raises(ValueError, match="exceeds the model's context of 96"):
        row_length(DataConfig(context_size=97), 96)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_start_where_documents_start():
    # body of 4: [1 2 .] [3 → cut, so again in the next row: 3 4 5 .]
    assert pack([[1, 2], [3, 4, 5]], separator=0, context_size=5).tolist() == [[0, 1, 2, 0, 3], [0, 3, 4, 5, 0]]


def test_a_document_longer_than_a_row_goes_on_where_it_was_cut():
    rows = pack([[1, 2, 3, 4, 5, 6]], separator=0, context_size=4)
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 0, 0, 0]]


def test_every_document_stands_whole_in_some_row():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (50,), generator=generator).tolist()
    encoded = [[100 * (i + 1) + j for j in range(size)] for i, size in enumerate(sizes)]
    rows = ["," + ",".join(map(str, row)) + "," for row in pack(encoded, 0, 12).tolist()]
    assert all(any("," + ",".join(map(str, document)) + "," in row for row in rows) for document in encoded)


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        pack([[], []], 0, 8)


# --- capture ---------------------------------------------------------------------------------------------------------


def test_capture_equals_a_full_forward_and_stops_at_the_last_site(loaded, rows):
    names = ["attn_out.0", "mlp_out.0", "resid_post.0", "mlp_hidden.0"]
    sites = resolve_sites(names, loaded.model)
    expected, later = {}, []
    hooks = [
        loaded.model.get_submodule(site.module).register_forward_hook(
            lambda m, a, output, name=site.name: expected.__setitem__(name, output_tensor(output))
        )
        for site in sites
    ]
    loaded.model(rows[:2])
    for hook in hooks:
        hook.remove()
    hook = loaded.model.gpt_neox.layers[1].register_forward_hook(lambda m, a, o: later.append(m))
    captured = capture(loaded.model, sites, rows[:2])
    hook.remove()
    assert list(captured) and all(torch.equal(captured[name], expected[name]) for name in names)
    assert later == []
    assert not any(module._forward_hooks for module in loaded.model.modules())


# --- stream ----------------------------------------------------------------------------------------------------------


def test_batches_have_exactly_the_text_tokens_of_the_rows(loaded, rows):
    text = text_mask(rows, special_ids(loaded.tokenizer))
    whole = capture(loaded.model, resolve_sites(["mlp_out.1"], loaded.model), rows)["mlp_out.1"][text]
    count = len(whole)
    batches = stream(loaded, rows, batch_size=count, buffer_tokens=count)  # one buffer = one epoch
    x = next(batches)["mlp_out.1"]
    assert x.shape == whole.shape
    assert not torch.equal(x, whole)  # shuffled
    distance = torch.cdist(x.double(), whole.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(0).values.max() < 1e-4 and distance.min(1).values.max() < 1e-4


def test_sites_stay_aligned_in_the_shuffle(loaded, rows):
    # resid_post.1 = resid_post.0 + attn_out.1 + mlp_out.1 for every token, in the parallel residual
    names = ["resid_post.0", "attn_out.1", "mlp_out.1", "resid_post.1"]
    for batch in take(stream(loaded, rows, names), 3):
        before, attention, mlp, after = (batch[name] for name in names)
        assert torch.allclose(before + attention + mlp, after, atol=1e-4)


def test_the_order_depends_on_the_seed_and_changes_every_epoch(loaded, rows):
    first, again, other = (next(stream(loaded, rows, seed=seed))["mlp_out.1"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    served = take(stream(loaded, rows), 60)  # several epochs
    sums = [round(float(batch["mlp_out.1"].double().sum()), 6) for batch in served]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("start", [1, 4, 7, 41])
def test_a_stream_that_starts_late_serves_the_same_bits(loaded, rows, start):
    whole = take(stream(loaded, rows), 45)
    late = take(stream(loaded, rows, start_step=start), 45 - start)
    assert all(torch.equal(a["mlp_out.1"], b["mlp_out.1"]) for a, b in zip(whole[start:], late, strict=True))


def test_the_shares_of_two_processes_make_the_batch_of_one(loaded, rows):
    alone = stream(loaded, rows)
    pair = [stream(loaded, rows, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(9):
        x = next(alone)["mlp_out.1"]
        together = torch.full_like(x, float("nan"))
        for half in pair:
            share = next(half)["mlp_out.1"]
            together[half.positions] = share
        assert torch.allclose(together, x, atol=1e-5)


def test_text_shorter_than_a_batch_is_refused(loaded, rows):
    with pytest.raises(ValueError, match=r"less than one batch of sae.batch_size=100000; lower it or give more text"):
        stream(loaded, rows, batch_size=100_000)


def test_public_stream(loaded):
    texts = documents(DataConfig(max_documents=40), PLANTED, "train")
    batch = next(activation_batches(loaded, texts, ["mlp_out.*"], batch_size=50, context_size=24))
    assert {name: x.shape for name, x in batch.items()} == {"mlp_out.0": (50, 32), "mlp_out.1": (50, 32)}


@pytest.mark.real_data
def test_pythia_and_story_specials_are_masked(shared_data):
    from saerl_cli.models import load_tokenizer, separator_id

    pythia = load_tokenizer(shared_data / "pythia_tokenizer")
    assert separator_id(pythia) == pythia.bos_token_id == pythia.eos_token_id == 0
    assert {0, 1} <= set(special_ids(pythia))
    nano = load_tokenizer(shared_data / "neox_stories_nano")
    rows = token_rows(["Once upon a time", "The end"], nano, 16)
    assert rows[0, 0] == 1
    assert not text_mask(rows, special_ids(nano))[rows == 1].any()
    text = nano.decode(rows[0][text_mask(rows, special_ids(nano))[0]])
    assert " ".join(text.split()) == "Once upon a time The end"
