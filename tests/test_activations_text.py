"""Text read as it is needed: places to go on from, what is left out, packing on the fly."""

import gzip
import itertools
import json
import subprocess
import sys

import pyarrow
import pytest
import torch
from pyarrow import parquet

from saerl_cli.activations import StreamedRows, pack, special_ids, text_mask, token_rows
from saerl_cli.activations import tokens as tokens_file
from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind
from saerl_cli.data.documents import Counts, documents, iter_documents, read_documents, stream_documents
from saerl_cli.models import load_tokenizer, separator_id

MODEL = ModelConfig(kind=ModelKind.local, path="anywhere")
TEXTS = [f"we saw film {'good ' * (i % 7)}. it was number {i} ." for i in range(40)]


def data_of(path, **settings):
    return DataConfig(kind=DataKind.text, path=str(path), **settings)


def streaming(path, heldout=3, **settings):
    return data_of(path, stream=True, heldout_documents=heldout, **settings)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def tokenizer(tiny_planted_model):
    return load_tokenizer(tiny_planted_model)


@pytest.fixture
def folder(tmp_path):
    """The same forty documents over five files of every kind."""
    parts = [TEXTS[i : i + 8] for i in range(0, 40, 8)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(parts[0]))
    (tmp_path / "b.txt").write_text("\n".join(parts[1]))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(parts[2])))
    parquet.write_table(pyarrow.table({"text": parts[3]}), tmp_path / "d.parquet", row_group_size=3)
    with pyarrow.output_stream(str(tmp_path / "e.txt.zst"), compression="zstd") as file:
        file.write("\n".join(parts[4]).encode())
    return tmp_path


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_streamed_in_order(folder):
    assert [text for text, _ in stream_documents(streaming(folder / "*"))] == TEXTS
    assert read_documents(data_of(folder / "*")) == TEXTS
    assert [text for text, _ in stream_documents(streaming(folder / "*", max_documents=21))] == TEXTS[:21]


def test_reading_goes_on_behind_any_document(folder):
    data = streaming(folder / "*", max_documents=38)
    read = list(stream_documents(data))
    for number, (_, place) in enumerate(read, start=1):
        assert place.document == number
        assert list(stream_documents(data, place)) == read[number:]


def test_what_lies_before_a_place_is_not_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    places = [place for _, place in stream_documents(streaming(path))]
    content = path.read_bytes()
    path.write_bytes(b"#" * places[24].offset + content[places[24].offset :])  # as long, but no JSON
    assert [text for text, _ in stream_documents(streaming(path), places[24])] == TEXTS[25:]
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(stream_documents(streaming(path)))


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS) + b"{malformed\n")
    assert len(list(itertools.islice(stream_documents(streaming(path)), 40))) == 40
    assert next(iter_documents(streaming(path), MODEL, "train")) == TEXTS[3]
    assert documents(streaming(path), MODEL, "heldout") == TEXTS[:3]
    with pytest.raises(ValueError, match="a.jsonl line 41 is not JSON"):
        documents(streaming(path), MODEL, "train")


def test_the_first_documents_of_a_stream_are_held_out(folder):
    splits = [documents(streaming(folder / "*", heldout=5), MODEL, split) for split in ("heldout", "train")]
    assert splits == [TEXTS[:5], TEXTS[5:]]
    assert list(iter_documents(data_of(folder / "*", heldout=0.25), MODEL, "heldout")) == TEXTS[30:]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_stream_with_nothing_left_for_training_is_refused(folder, tokenizer, split):
    data = streaming(folder / "*", heldout=40)
    message = "holds 40 documents, and data.stream keeps the first data.heldout_documents=40 from training; lower it"
    with pytest.raises(ValueError, match=message):
        documents(data, MODEL, split)
    with pytest.raises(ValueError, match=message):
        StreamedRows(data, tokenizer, 16, special_ids(tokenizer)).head(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": True}, "data.stream does nothing with data=planted; it belongs to data=text or hub"),
        (
            {"kind": DataKind.text, "path": "a.txt", "stream": True, "heldout_documents": 0},
            "data.heldout_documents must be >= 1",
        ),
        (
            {"kind": DataKind.text, "path": "a.txt", "stream": True, "max_documents": 1000},
            "data.max_documents=1000 leaves nothing beside data.heldout_documents=1000",
        ),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    import datasets

    rows = [{"text": text} for text in ["", *TEXTS]]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    table = datasets.IterableDataset.from_generator(lambda: iter(rows))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: asked.append((words, more)) or table)
    data = DataConfig(kind=DataKind.hub, name="some/set", stream=True, heldout_documents=2)
    read, counts = list(stream_documents(data)), Counts()
    assert [text for text, _ in stream_documents(data, counts=counts)] == TEXTS
    assert asked[0] == (("some/set", None), {"split": "train", "streaming": True})
    assert counts.skipped_empty == 1
    for number in (1, 20, 40):
        assert list(stream_documents(data, read[number - 1][1])) == read[number:]
    with pytest.raises(ValueError, match="some/set row 1 has no 'story'"):
        next(stream_documents(DataConfig(kind=DataKind.hub, name="some/set", field="story")))


# --- what is left out ------------------------------------------------------------------------------------------------


def bad_parquet(path):
    """Strings that are not UTF-8, as careless writers leave them."""
    binary = pyarrow.array([b"one", b"\xff\xfe", None, b"two", b" "], pyarrow.binary())
    valid, offsets, content = binary.buffers()
    strings = pyarrow.StringArray.from_buffers(5, offsets, content, valid)
    parquet.write_table(pyarrow.table({"text": strings}), path)


BAD = {
    "a.txt": (b"\xef\xbb\xbfone\n\n\xff\xfe\ntwo\r\n  \n", 2, 1),
    "a.jsonl": (b'{"text": "one"}\n\n{"text": "a\xff"}\n{"text": "\\ud800"}\n{"text": ""}\n{"text": "two"}\n', 2, 2),
    "a.json": (b'["one", "a\xff", null, "two", "\\udc12"]', 1, 2),
    "a.jsonl.gz": (gzip.compress(b'{"text": "one"}\n{"text": "a\xff"}\n{"text": null}\n"two"\n', mtime=0), 1, 1),
}


@pytest.mark.parametrize("name", [*BAD, "a.parquet"])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_bytes_and_empty_documents_are_left_out_and_counted(tmp_path, name, stream):
    path = tmp_path / name
    if name in BAD:
        content, empty, encoding = BAD[name]
        path.write_bytes(content)
    else:
        bad_parquet(path)
        empty, encoding = 2, 1
    data = streaming(path, heldout=1) if stream else data_of(path)
    counts = Counts()
    train = documents(data, MODEL, "train", counts)
    assert train == (["two"] if stream else ["one"])
    assert counts == Counts(documents=2, skipped_empty=empty, skipped_encoding=encoding)
    assert counts.note() == f"left out lines or documents of the text: {empty} empty, {encoding} not UTF-8"
    assert Counts(documents=2).note() == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n[1]\n', mtime=0), r"a\.jsonl\.gz line 2 holds list"),
        ("a.txt.gz", gzip.compress(b"some words\n" * 99, mtime=0)[:-12], r"cannot read .*a\.txt\.gz"),
        ("a.jsonl.zst", b"no zstandard", r"cannot read .*a\.jsonl\.zst"),
        ("a.parquet", b"no parquet", r"cannot read .*a\.parquet"),
        ("a.parquet.gz", b"", "is not a .txt"),
        ("a.gz", b"", "is not a .txt"),
        ("a.txt", b"\xff\n\n", "holds no text; left out lines or documents of the text: 1 empty, 1 not UTF-8"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_documents(data_of(tmp_path / name))
    assert "\n" not in str(error.value)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    from saerl_cli.data import text

    (tmp_path / "a.txt").write_text("words")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(text, "opened", denied)
    with pytest.raises(ValueError, match="cannot read .*a.txt: .*Permission denied"):
        read_documents(data_of(tmp_path / "a.txt"))


# --- rows on the fly -------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(folder, tokenizer):
    return StreamedRows(streaming(folder / "*"), tokenizer, 16, special_ids(tokenizer))


def test_rows_of_a_stream_are_those_of_the_text_in_memory(rows, tokenizer):
    whole = token_rows(TEXTS[3:], tokenizer, 16)
    epoch = int(text_mask(whole, rows.special).sum())
    first, cursor = rows.take(rows.start, epoch)
    assert torch.equal(first, whole)
    again, _ = rows.take(cursor, epoch)
    assert torch.equal(again, whole)
    assert torch.equal(rows.head(10**9), whole)
    assert torch.equal(rows.head(40), whole[: len(rows.head(40))])
    assert rows.counts.documents >= 2 * 37


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_rows_go_on_behind_any_cursor(folder, tokenizer, at_once, monkeypatch):
    monkeypatch.setattr(tokens_file, "DOCUMENTS_AT_ONCE", at_once)
    data, special = streaming(folder / "*"), special_ids(tokenizer)
    reader = StreamedRows(data, tokenizer, 16, special)
    taken, cursors, cursor = [], [], reader.start
    for _ in range(130):  # more than two epochs, a row at a time
        row, cursor = reader.take(cursor, 1)
        taken.append(row)
        cursors.append(json.loads(json.dumps(cursor)))
    assert cursors[-1]["epoch"] >= 2
    for number in range(0, 120):
        later, end = StreamedRows(data, tokenizer, 16, special).take(cursors[number], 40)
        assert torch.equal(later, torch.cat(taken[number + 1 : number + 1 + len(later)]))
        assert end == cursors[number + len(later)]


def test_a_long_document_is_cut_alike_in_a_stream(tmp_path, tokenizer):
    texts = ["we saw film ."] * 2 + ["good film " * 60]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    reader = StreamedRows(streaming(tmp_path / "a.txt", heldout=1), tokenizer, 16, special_ids(tokenizer))
    cursor, taken = reader.start, []
    while cursor["epoch"] == 0:
        fresh = StreamedRows(reader.data, tokenizer, 16, reader.special)
        row, cursor = fresh.take(cursor, 1)
        taken.append(row)
    assert torch.equal(torch.cat(taken), token_rows(texts[1:], tokenizer, 16))


def test_a_cursor_stays_small(rows):
    _, cursor = rows.take(rows.start, 150)
    assert set(cursor) == {"source", "epoch", "place", "unfinished", "used"}
    assert len(cursor["unfinished"]) < 16


def test_a_stream_reads_no_further_than_it_must(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_file, "DOCUMENTS_AT_ONCE", 8)
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 100))
    reader = StreamedRows(streaming(tmp_path / "a.jsonl"), tokenizer, 16, special_ids(tokenizer))
    reader.take(reader.start, 200)
    assert 10 < reader.counts.documents < 60


def test_a_file_that_vanishes_is_named(tmp_path, tokenizer):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join(TEXTS))
    data = streaming(f"{tmp_path}/[ab].txt")
    reader = StreamedRows(data, tokenizer, 16, special_ids(tokenizer))
    _, cursor = reader.take(reader.start, 20)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*b\.txt: .*No such file"):
        reader.take(cursor, 10_000)  # in the next epoch
    with pytest.raises(ValueError, match="is not the text that this stream was reading"):
        StreamedRows(data, tokenizer, 16, special_ids(tokenizer)).take(cursor, 1)


def test_text_without_tokens_ends_a_stream(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    reader = StreamedRows(streaming(tmp_path / "a.txt"), tokenizer, 16, special_ids(tokenizer))
    monkeypatch.setattr(tokens_file, "encode", lambda texts, tokenizer: [[] for _ in texts])
    with pytest.raises(ValueError, match="the text has no tokens"):
        reader.take(reader.start, 1)


def test_packing_leaves_a_generator_of_documents_lazy(tokenizer):
    packer = tokens_file.Packer(separator_id(tokenizer), 5)
    assert packer.add([]) == []
    made = packer.add([3, 4, 5, 6, 7]) + packer.flush()
    assert torch.equal(torch.tensor(made), pack([[3, 4, 5, 6, 7]], separator_id(tokenizer), 5))
    assert packer.flush() == []


def test_checks_before_a_run_load_no_torch():
    code = """
import sys
from saerl_cli.config.activations import check_stream
from saerl_cli.data import documents, examples, pairs, prompts
from saerl_cli.planted import cache
import saerl_cli.activations
sys.exit(bool({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_can_be_imported():
    import saerl_cli.activations as activations

    assert all(getattr(activations, name) is not None for name in activations.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = activations.nope
