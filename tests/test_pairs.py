"""Preference pairs: of the planted language, and of files."""

import gzip
import json
from collections import Counter

import pytest
from datasets import Dataset

from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.config.pairs import PairsConfig, PairsKind, Prefer
from saerl_cli.data.pairs import Pair, read_pairs
from saerl_cli.planted.language import join_words, labels_of, split_words

PLANTED = ModelConfig()
ROWS = [{"prompt": f"p{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(6)]


def of_file(path, **more):
    return PairsConfig(kind=PairsKind.file, path=str(path), **{"heldout": 2, **more})


def marked(pair: Pair, text: str, attribute: str) -> int:
    before = split_words(pair.prompt)
    labels = labels_of(split_words(pair.prompt + text))[len(before) :]
    return sum(attribute in of_word for of_word in labels)


# --- planted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attribute", "prefer"), [("cursing", Prefer.less), ("positive", Prefer.more)])
def test_planted_pairs_begin_alike_and_differ_in_the_attribute(attribute, prefer):
    config = PairsConfig(attribute=attribute, prefer=prefer, count=60, heldout=20, prompt_tokens=5)
    pairs = read_pairs(config, PLANTED, "train")
    assert len(pairs) == 60 and len(read_pairs(config, PLANTED, "heldout")) == 20
    for pair in pairs:
        chosen, rejected = (marked(pair, text, attribute) for text in (pair.chosen, pair.rejected))
        assert chosen < rejected if prefer is Prefer.less else chosen > rejected
        words = split_words(pair.prompt + pair.chosen)
        assert len(split_words(pair.prompt)) == 5 and join_words(words) == pair.prompt + pair.chosen


def test_planted_pairs_are_a_function_of_the_seed_and_splits_are_disjoint():
    config = PairsConfig(count=50, heldout=50)
    train, heldout = (read_pairs(config, PLANTED, split) for split in ("train", "heldout"))
    assert train == read_pairs(config, PLANTED, "train")
    assert read_pairs(PairsConfig(count=20), PLANTED, "train") == train[:20]
    assert not set(train) & set(heldout)
    assert not set(train) & set(read_pairs(PairsConfig(count=50, seed=1), PLANTED, "train"))


def test_planted_pairs_refuse_what_the_language_does_not_give():
    with pytest.raises(ValueError, match="pairs.attribute='swearing' is unknown; there are .*cursing"):
        read_pairs(PairsConfig(attribute="swearing"), PLANTED, "train")
    with pytest.raises(ValueError, match="only 0 pairs of reviews begin with the same pairs.prompt_tokens=60 words"):
        read_pairs(PairsConfig(prompt_tokens=60, count=5), PLANTED, "train")
    local = ModelConfig(kind=ModelKind.local, path="x")
    with pytest.raises(ValueError, match="belongs to model=planted; write pairs.kind=file"):
        read_pairs(PairsConfig(), local, "train")


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder, name):
    path, lines = folder / name, "".join(json.dumps(row) + "\n" for row in ROWS)
    if name == "a.parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        text = json.dumps(ROWS, indent=1) if name == "list.json" else lines
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "list.json", "lines.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    config = of_file(write(tmp_path, name))
    assert read_pairs(config, PLANTED, "train") == [Pair(**row) for row in ROWS[:4]]
    assert read_pairs(config, PLANTED, "heldout") == [Pair(**row) for row in ROWS[4:]]
    assert read_pairs(of_file(config.path, count=1), PLANTED, "train") == [Pair(**ROWS[0])]


def transcript(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def test_transcripts_are_cut_at_the_last_reply_and_unusable_ones_counted(tmp_path):
    rows = [
        (transcript("a", "b", "c", "d"), transcript("a", "b", "c", "e")),
        (transcript("a", "b"), transcript("a", "b", "c", "d")),  # one side has a turn more
        (transcript("a", ""), transcript("a", "b")),
        (transcript("a", "b"), transcript("a", "b")),
        (transcript("x", "y"), transcript("x", "z")),
    ]
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps({"chosen": c, "rejected": r}) + "\n" for c, r in rows))
    left_out = Counter()
    pairs = read_pairs(of_file(path, heldout=1), PLANTED, "train", left_out)
    assert pairs == [Pair("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e")]
    assert sorted(left_out.values()) == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chosen": "a"}\n', r"p.jsonl line 1 has no 'rejected' but chosen; pairs.path needs rows of prompt, chosen"),
        ('{"prompt": "p", "chosen": "a", "rejected": 3}\n', "line 1: 'rejected' holds int where text is expected"),
        ('{"chosen": "a", "rejected": "b"}\n', "line 1 has no 'prompt' and no 'Assistant:' in its texts"),
        ('["a", "b"]\n', "item 1 holds str where an object"),
        ('{"chosen": \n', "line 1 is not JSON"),
        (json.dumps(ROWS[0]) + "\n", "holds 1 usable pairs, of which pairs.heldout=2 are kept from training"),
        ("", "holds 0 usable pairs"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(of_file(tmp_path / "p.jsonl"), PLANTED, "train")


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pairs\.path=/nowhere/p\.jsonl does not exist"):
        read_pairs(of_file("/nowhere/p.jsonl"), PLANTED, "train")
    (tmp_path / "p.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"p\.csv is not a \.jsonl, \.json, \.parquet file"):
        read_pairs(of_file(tmp_path / "p.csv"), PLANTED, "train")
    with pytest.raises(ValueError, match="pairs.kind=file needs pairs.path=FILE"):
        PairsConfig(kind=PairsKind.file)


def test_hh_pairs_are_read(shared_data):
    path = shared_data / "hh_rlhf" / "harmless_pairs.jsonl"
    left_out = Counter()
    train = read_pairs(of_file(path, heldout=200), PLANTED, "train", left_out)
    assert sum(left_out.values()) + len(train) + 200 == 1834
    assert left_out["the two sides do not share their prompt"] == 4 and left_out["a reply is empty"] == 2
    assert all(pair.prompt.endswith("\n\nAssistant:") and "\n\nHuman:" not in pair.chosen for pair in train)
