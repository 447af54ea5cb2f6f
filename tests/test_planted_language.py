"""The planted language: random access, labels, agreement with what was drawn, closed vocabulary, text files."""

import json
import math
from collections import Counter
from itertools import islice
from random import Random

import pytest

from saerl_cli.config.groups import DataConfig, DataKind, PlantedConfig
from saerl_cli.data.documents import read_documents, split_documents
from saerl_cli.planted.documents import HELDOUT_START, planted_documents
from saerl_cli.planted.language import (
    ATTRIBUTES,
    EOS,
    VOCABULARY,
    Writer,
    attribute_words,
    join_words,
    labels_of,
    review,
    reviews,
    split_words,
)
from saerl_cli.planted.words import LEXICAL, TOPICS

SAMPLE = [review(7, index) for index in range(3000)]


def without_after(labels):
    return [{name for name in word if not name.startswith("after_")} for word in labels]


# --- the stream ------------------------------------------------------------------------------------------------------


def test_a_review_depends_on_seed_and_number_alone():
    assert list(islice(reviews(3, start=5), 4)) == [review(3, index) for index in (5, 6, 7, 8)]
    assert review(3, 5).words != review(4, 5).words
    assert review(0, 0).text == (  # the same on every machine and Python version
        "i rented this hotel on friday. what a dirty hotel! my cousin hated the hotel too. what a pity!"
        " i give it two out of ten."
    )


def test_vocabulary_is_closed_and_every_word_occurs():
    used = Counter(word for document in SAMPLE for word in document.words)
    assert set(used) == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))


def test_text_and_words_are_inverse():
    for document in SAMPLE[:500]:
        assert split_words(document.text) == document.words
        assert join_words(split_words(document.text)) == document.text
    assert split_words("Damn , it WAS good.<eos>") == ["damn", ",", "it", "was", "good", ".", "<eos>"]


def test_splits_are_disjoint_ranges_of_the_stream():
    config = PlantedConfig(documents=30, seed=5)
    training, heldout = list(planted_documents(config, "train")), list(planted_documents(config, "heldout"))
    assert training == [review(5, index) for index in range(30)]
    assert heldout == [review(5, HELDOUT_START + index) for index in range(200)]
    assert config.documents < HELDOUT_START
    with pytest.raises(ValueError, match='"train" or "heldout"'):
        next(planted_documents(config, "test"))


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "the plot was damn good as hell .",
            [set(), {"topic_film"}, set(), {"cursing"}, {"positive"}, set(), {"cursing"}, set()],
        ),
        ("thank you , crap", [{"polite"}, set(), set(), {"cursing"}]),
        (
            "la comida era fea",
            [
                {"second_language"},
                {"second_language", "topic_food"},
                {"second_language"},
                {"second_language", "negative"},
            ],
        ),
        ("crispy spaceship", [{"positive", "topic_food"}, set()]),
        (
            "two plus three is five",
            [set(), {"arithmetic"}, {"arithmetic"}, {"arithmetic"}, {"arithmetic", "arithmetic_right"}],
        ),
        (
            "two plus three is six",
            [set(), {"arithmetic"}, {"arithmetic"}, {"arithmetic"}, {"arithmetic", "arithmetic_wrong"}],
        ),
        (
            "nine minus four is five .",
            [set(), {"arithmetic"}, {"arithmetic"}, {"arithmetic"}, {"arithmetic", "arithmetic_right"}, set()],
        ),
        ("two out of ten is five", [set()] * 6),
        ("plus three is five", [set()] * 4),
    ],
)
def test_labels_by_hand(text, expected):
    assert without_after(labels_of(text.split())) == expected


def test_after_labels_start_with_the_first_word_and_end_with_the_review():
    words = ["it", "was", "damn", "good", EOS, "it", "was", "bad"]
    assert labels_of(words) == [
        set(),
        set(),
        {"cursing", "after_cursing"},
        {"positive", "after_cursing", "after_positive"},
        set(),
        set(),
        set(),
        {"negative", "after_negative"},
    ]


def test_labels_are_causal_and_local_to_a_review():
    for first, second in zip(SAMPLE[:100], SAMPLE[100:200], strict=True):
        labels = labels_of([*first.words, EOS, *second.words])
        assert labels == [*first.labels, frozenset(), *second.labels]
        cut = len(first.words) // 2
        assert labels_of(first.words[:cut]) == first.labels[:cut]


def test_labels_agree_with_what_was_drawn():
    shown = Counter()
    for document in SAMPLE:
        carried = frozenset().union(*document.labels)
        hidden = document.hidden
        assert carried <= set(ATTRIBUTES)
        assert {name for name in carried if name.startswith("topic_")} == {f"topic_{hidden.topic}"}
        for name in ("cursing", "polite", "second_language", "arithmetic"):
            assert getattr(hidden, name) or name not in carried, (name, document.text)
            shown[name] += getattr(hidden, name) and name in carried
        opposite = {"positive": "negative", "negative": "positive", "mixed": None}[hidden.sentiment]
        assert opposite not in carried
    for name, least in (("cursing", 0.85), ("polite", 0.7), ("second_language", 0.5), ("arithmetic", 0.4)):
        drawn = sum(getattr(document.hidden, name) for document in SAMPLE)
        assert shown[name] >= least * drawn, name


def test_about_three_in_ten_sums_are_wrong():
    labels = Counter(name for document in SAMPLE for word in document.labels for name in word)
    right, wrong = labels["arithmetic_right"], labels["arithmetic_wrong"]
    assert right + wrong > 500
    assert abs(wrong / (right + wrong) - 0.3) < 0.09  # five standard errors


def test_attribute_words():
    assert "damn" in attribute_words("cursing")
    assert "plots" in attribute_words("topic_film") and "libro" in attribute_words("topic_book")
    with pytest.raises(ValueError, match="arithmetic_right.*cursing"):
        attribute_words("arithmetic_right")
    topics = [words for name, words in LEXICAL.items() if name.startswith("topic_")]
    assert sum(map(len, topics)) == len(frozenset().union(*topics))  # a topic's words are its own


# --- structure -------------------------------------------------------------------------------------------------------


def test_verbs_agree_with_their_subject():
    singular = {part for topic in TOPICS.values() for part in topic.parts}
    seen = Counter()
    for document in SAMPLE:
        for subject, verb in zip(document.words, document.words[1:], strict=False):
            if verb in ("was", "were") and (subject in singular or subject.removesuffix("s") in singular):
                assert (verb == "was") == (subject in singular), document.text
                seen[verb] += 1
    assert min(seen.values()) > 500


def test_second_language_agrees_in_gender():
    for document in SAMPLE:
        feminine = TOPICS[document.hidden.topic].article == "la"
        words = set(document.words)
        assert ("el" if feminine else "la") not in words
        assert not words & {"bueno" if feminine else "buena", "malo" if feminine else "mala"}


def test_mixed_reviews_turn_once():
    for document in SAMPLE:
        turns = sum(word in ("but", "however") for word in document.words)
        assert turns <= (document.hidden.sentiment == "mixed")


def test_length_and_cursing_rates():
    lengths = [len(document.words) for document in SAMPLE]
    assert min(lengths) >= 8 and max(lengths) < 96
    assert 28 < sum(lengths) / len(lengths) < 36
    cursing = LEXICAL["cursing"]
    late = sum(word in cursing for document in SAMPLE for word in document.words[6:30]) / len(SAMPLE)
    assert late >= 0.6  # curse words in the 24 tokens that follow a prompt of six
    cursers = [document for document in SAMPLE if document.hidden.cursing]
    early = sum(any(word in cursing for word in document.words[:6]) for document in cursers) / len(cursers)
    assert 0.2 < early < 0.6  # the prompt does not decide it


def test_every_choice_is_counted_in_nats():
    writer = Writer(Random("x"))
    before = writer.nats
    writer.place()
    assert writer.nats - before == pytest.approx(math.log(3))
    before = writer.nats
    taken = writer.chance(0.3)
    assert writer.nats - before == pytest.approx(-math.log(0.3 if taken else 0.7))


# --- text files ------------------------------------------------------------------------------------------------------


def data_of(path, **settings):
    return DataConfig(kind=DataKind.text, path=str(path), **settings)


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    documents = ["one two", "three\u2028four", "five"]
    (tmp_path / "a.txt").write_text("\n".join(documents) + "\n\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(documents))
    (tmp_path / "b.json").write_text(json.dumps([{"text": document} for document in documents]))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    )
    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.json", "b.json", "a.jsonl", "a.parquet"):
        assert read_documents(data_of(tmp_path / name)) == documents
    assert read_documents(data_of(tmp_path / "*.json")) == documents * 2
    assert read_documents(data_of(tmp_path / "a.txt", max_documents=2)) == documents[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"story": "x"}\n', r"line 1 has no 'text'; write data\.field= one of story"),
        ("a.jsonl", "3\n", "line 1 holds int where text is expected"),
        ("a.json", '{"text": "x"}', "no JSON list"),
        ("a.txt", "\n \n", "holds no text"),
        ("a.csv", "x", r"is not a \.txt"),
        ("a.txt", b"\xff\xfe\xfa", "holds no text; left out .*1 not UTF-8"),
    ],
)
def test_malformed_text_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_documents(data_of(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_text_and_single_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_documents(data_of(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="one document"):
        split_documents(["a"], DataConfig())
    assert split_documents(list("abcdefghij"), DataConfig(heldout=0.2)) == (list("abcdefgh"), ["i", "j"])
