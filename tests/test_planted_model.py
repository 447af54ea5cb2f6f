"""The planted model: tokenizer, packing, training and its resumption, the checked cache, the train-lm job."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saerl_cli.config.groups import DataConfig, DataKind, LaunchConfig, ModelConfig, ModelKind, PlantedConfig
from saerl_cli.config.train_lm import TrainLmConfig
from saerl_cli.jobs import train_lm as job
from saerl_cli.planted import cache, train
from saerl_cli.planted.cache import TINY, damage, planted_model, planted_shape
from saerl_cli.planted.documents import planted_documents
from saerl_cli.planted.language import VOCABULARY, review
from saerl_cli.planted.tokenizer import build_tokenizer, frequent_words
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder, read_json, read_jsonl, sha256_file

QUICK = PlantedConfig(
    documents=60, hidden_size=16, layers=2, heads=2, context_size=48, steps=30, batch_size=4, lr=1e-2, seed=3
)
CPU = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model, trained in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAERL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return planted_model(TINY)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAERL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def new_run(path):
    path.mkdir(exist_ok=True)
    return Run(path)


def token_ids(config=QUICK, split="train"):
    ids = build_tokenizer(VOCABULARY).get_vocab()
    return [[ids[word] for word in document.words] for document in planted_documents(config, split)]


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_saved_tokenizer_reads_and_writes_reviews(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for index in range(300):
        document = review(11, index)
        ids = tokenizer(document.text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == document.words  # nothing added, nothing unknown
        assert tokenizer.decode(ids) == document.text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 1)
    assert len(tokenizer) == planted_shape(TINY)["vocab_size"]


def test_tokenizer_pads_left_ignores_case_and_knows_what_it_does_not_know():
    tokenizer = build_tokenizer(["the", "film", "don't", "."])
    assert tokenizer(["The film.", "film"], padding=True)["input_ids"] == [[3, 4, 6], [0, 0, 4]]
    assert tokenizer("the robot don’t<eos>film")["input_ids"] == [3, 2, 5, 1, 4]
    assert tokenizer.decode([3, 4, 6, 1], skip_special_tokens=True) == "the film."


def test_frequent_words_counts_and_breaks_ties_by_the_alphabet():
    assert frequent_words(build_tokenizer([]), ["b a don't. B", "c. a. b"], 4) == [".", "b", "a", "c"]


# --- packing and loss ------------------------------------------------------------------------------------------------


def test_rows_start_with_documents_and_lose_no_text():
    rows = train.pack_rows([[5, 6], [7, 8, 9], [2, 3]], context_size=5, end=1)
    assert rows.tolist() == [[5, 6, 1, 7, 8], [7, 8, 9, 1, 2]]  # the cut review begins the next row anew
    assert train.pack_rows([[5, 6, 7, 8, 9]], context_size=3, end=1).tolist() == [[5, 6, 7], [8, 9, 1]]
    with pytest.raises(ValueError, match="shorter than one row of context_size=9"):
        train.pack_rows([[5]], context_size=9, end=1)


def test_an_epoch_reads_every_row_once_in_an_order_of_its_own():
    rows = torch.arange(12)[:, None]  # [12, 1]
    config = PlantedConfig(batch_size=4, seed=2)
    epochs = [torch.cat([train.batch_of(rows, config, step) for step in steps]) for steps in (range(3), range(3, 6))]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(12))
    assert not torch.equal(*epochs)


def test_learning_rate_rises_then_falls_to_nothing():
    config = PlantedConfig(steps=100, lr=1.0)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[52] == pytest.approx(0.5, abs=0.01) and rates[99] < 0.001
    assert all(later <= earlier for earlier, later in pairwise(rates[5:]))


def test_heldout_loss_equals_a_loop_over_tokens():
    model = train.new_model(QUICK, 20).eval()
    documents = [[5, 6, 7], [4] * 3, list(range(3, 19)) * 4]  # the last exceeds the context of 48
    total, count = 0.0, 0
    for document in documents:
        tokens = [1, *document, 1]
        for position in range(1, len(tokens)):
            start = (position - 1) // 47 * 47  # sequences overlap by the one token that is read but not predicted
            context = torch.tensor([tokens[start:position]])
            with torch.no_grad():
                total -= model(context).logits[0, -1].log_softmax(-1)[tokens[position]].item()
            count += 1
    for batch_size in (1, 3):
        assert train.heldout_loss(model, documents, end=1, batch_size=batch_size) == pytest.approx(
            total / count, abs=1e-5
        )


# --- training --------------------------------------------------------------------------------------------------------


def test_training_learns_more_than_word_frequencies(tiny):
    words = [word for document in planted_documents(TINY, "heldout") for word in (*document.words, "<eos>")]
    unigram = -sum(n / len(words) * math.log(n / len(words)) for n in Counter(words).values())
    record = read_json(tiny / "planted.json")
    assert record["entropy"] < record["loss_heldout"] < 0.75 * unigram
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny).eval()
    again = train.heldout_loss(model, [tokenizer(d.text)["input_ids"] for d in planted_documents(TINY, "heldout")], 1)
    assert again == pytest.approx(record["loss_heldout"], abs=1e-5)  # what was saved is what was measured
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, value in planted_shape(TINY).items():
        if name != "rope_parameters":
            assert getattr(model.config, name) == value
    assert model.config.use_parallel_residual
    assert model.generation_config.eos_token_id == 1 and model.generation_config.pad_token_id == 0


def test_training_is_a_function_of_the_seed():
    tokenizer, documents = build_tokenizer(VOCABULARY), token_ids()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (train.train_model(QUICK, documents, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())  # nobody else's randomness is touched
    other = train.train_model(PlantedConfig(**{**vars(QUICK), "seed": 4}), documents, tokenizer).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stop", [5, 17, 29])
def test_an_interrupted_training_ends_like_an_unbroken_one(tmp_path, monkeypatch, stop):
    tokenizer, documents = build_tokenizer(VOCABULARY), token_ids()
    unbroken, broken = new_run(tmp_path / "a"), new_run(tmp_path / "b")
    expected = train.train_model(QUICK, documents, tokenizer, unbroken, log_every=4, checkpoint_every=10).state_dict()

    steps, step = iter(range(stop)), train.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *words: (next(steps), step(*words))[1])
        with pytest.raises((StopIteration, RuntimeError)):
            train.train_model(QUICK, documents, tokenizer, broken, log_every=4, checkpoint_every=10)
    assert len(broken.checkpoints()) == stop // 10
    resumed = train.train_model(QUICK, documents, tokenizer, broken, log_every=4, checkpoint_every=10).state_dict()

    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert (broken.path / "metrics.jsonl").read_bytes() == (unbroken.path / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_jsonl(broken.path / "metrics.jsonl")] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_an_infinite_loss_stops_and_names_the_step(monkeypatch):
    losses = iter([1.0, 1.0, math.inf])
    monkeypatch.setattr(train, "train_step", lambda *words: next(losses))
    with pytest.raises(ValueError, match=r"loss is inf at step 3; lower model\.planted\.lr=0\.01"):
        train.train_model(QUICK, token_ids(), build_tokenizer(VOCABULARY))


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SAERL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/saerl"),
        ({"HOME": "/c"}, "/c/.cache/saerl"),
    ],
)
def test_cache_folder(monkeypatch, variables, expected):
    for name in ("SAERL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_folder()) == expected


def test_settings_name_the_cached_model(empty_cache):
    keys = {cache.cache_key(PlantedConfig(**{**vars(TINY), **change})) for change in ({}, {"seed": 1}, {"steps": 61})}
    assert len(keys) == 3
    assert cache.cache_key(TINY) == cache.cache_key(PlantedConfig(**vars(TINY)))


def flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGES = {
    "model.safetensors has changed": flip_a_bit,
    "tokenizer.json is missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "config.json has changed": lambda folder: (folder / "config.json").write_text("{}"),
    "planted.json cannot be read": lambda folder: (folder / "planted.json").write_text('{"sha256"'),
    "planted.json names no weights": lambda folder: (folder / "planted.json").write_text('{"sha256": {}}'),
}


def test_a_damaged_cache_is_rebuilt_with_a_note(empty_cache, capsys, monkeypatch):
    folder = planted_model(QUICK)
    weights = sha256_file(folder / "model.safetensors")
    trained = []
    train_planted = cache.train_planted
    monkeypatch.setattr(cache, "train_planted", lambda *words: (trained.append(1), train_planted(*words)))
    assert planted_model(QUICK) == folder and not trained
    for number, (reason, harm) in enumerate(DAMAGES.items()):
        copy = shutil.copytree(folder, empty_cache / str(number))
        assert damage(copy) is None
        harm(copy)
        assert damage(copy) == reason
    flip_a_bit(folder)
    capsys.readouterr()
    assert planted_model(QUICK) == folder and trained == [1]
    note = capsys.readouterr().err
    assert "is damaged (model.safetensors has changed); training it again" in note
    assert damage(folder) is None and sha256_file(folder / "model.safetensors") == weights


def test_two_at_once_train_once(empty_cache, monkeypatch, capsys):
    calls = []

    def slow(config, folder, *rest):
        calls.append(folder)
        time.sleep(0.3)
        with atomic_folder(folder) as partial:
            (partial / "model.safetensors").write_text("weights")
            hashes = {"model.safetensors": sha256_file(partial / "model.safetensors")}
            (partial / "planted.json").write_text(json.dumps({"sha256": hashes}))

    monkeypatch.setattr(cache, "train_planted", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(planted_model(QUICK))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found == [calls[0]] * 3
    assert "another process is training" in capsys.readouterr().err


def test_an_unwritable_cache_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAERL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot write the cache .* set SAERL_CACHE=DIR"):
        planted_model(QUICK)


def test_shape_and_documents_need_no_torch():
    code = (
        "import sys; from saerl_cli.jobs.train_lm import check; from saerl_cli.config.train_lm import TrainLmConfig;"
        "check(TrainLmConfig()); from saerl_cli.planted.cache import planted_shape, damage;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the job ---------------------------------------------------------------------------------------------------------


def settings(**changes):
    return TrainLmConfig(**({"model": ModelConfig(planted=QUICK), "log_every": 10, "checkpoint_every": 10} | changes))


def test_train_lm_trains_then_copies(empty_cache, tmp_path, capsys):
    first, second = new_run(tmp_path / "first"), new_run(tmp_path / "second")
    loss = job.work(settings(), first, CPU)
    summary = first.read_summary()
    assert not summary["cached"] and summary["loss_heldout"] == loss
    assert summary["tokens"] == 30 * 4 * 48 and summary["steps"] == 30
    assert [line["step"] for line in read_jsonl(first.path / "metrics.jsonl")] == [10, 20, 30]
    capsys.readouterr()
    assert job.work(settings(), second, CPU) == loss
    assert "in the cache already" in capsys.readouterr().err
    assert second.read_summary() == {**summary, "cached": True}
    assert sha256_file(second.path / "model" / "model.safetensors") == summary["sha256"]
    assert damage(second.path / "model") is None


def test_train_lm_on_a_text(tmp_path):
    lines = [
        f"the {animal} sat on the {place} and didn't move ." for animal in ("cat", "dog") for place in "abcdefghij"
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines * 3))
    data = DataConfig(kind=DataKind.text, path=str(tmp_path / "text.txt"))
    run = new_run(tmp_path / "run")
    job.check(settings(data=data))
    loss = job.work(settings(data=data), run, CPU)
    model = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    assert run.read_summary()["entropy"] is None and loss < math.log(len(tokenizer)) - 1
    assert len(tokenizer) == model.config.vocab_size == 3 + 9 + 10  # specials, words, places
    assert tokenizer.decode(tokenizer("the dog didn't move.")["input_ids"]) == "the dog didn't move."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(kind=ModelKind.local, path="x")}, "leave model=planted"),
        ({"data": DataConfig(kind=DataKind.hub, name="a/b")}, "data=text data.path=FILE"),
        ({"data": DataConfig(kind=DataKind.text, path="nowhere.txt")}, "nowhere.txt does not exist"),
        ({"data": DataConfig(context_size=17)}, "leave data.context_size empty"),
        ({"launch": LaunchConfig(num_processes=200)}, "is less than a row for each of launch.num_processes=200"),
    ],
)
def test_train_lm_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        job.check(settings(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"heads": 3}, {"heads": 4}, {"context_size": 1}, {"lr": 0.0}, {"steps": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match=r"model\.planted"):
        PlantedConfig(**{**vars(QUICK), **change})


KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from saerl_cli.run.directory import Run
from tests.test_planted_model import CPU, QUICK, settings
from saerl_cli.config.groups import ModelConfig, PlantedConfig
from saerl_cli.jobs import train_lm as job
torch.set_num_threads(1)
config = settings(model=ModelConfig(planted=PlantedConfig(**{**vars(QUICK), "steps": 400})))
job.work(config, Run(Path(sys.argv[1])), CPU)
"""


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bits(tmp_path):
    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        environment = os.environ | {"SAERL_CACHE": str(tmp_path / f"cache-{name}")}
        return folder, subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)

    for steps in (10, 150):
        folder, process = start("killed")
        while (Run(folder).latest_checkpoint() or (0,))[0] < steps and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (folder / "summary.json").exists()
    folder, process = start("killed")
    assert process.wait() == 0
    unbroken, process = start("unbroken")
    assert process.wait() == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
