"""Bad input: exit code 2, one line that says what is wrong, no traceback, nothing left behind.

A case is the words of a command and a part of the line it must print. Files that a case needs are made by a function
named in `needs`, in the empty directory where the command runs.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from saerl_cli import cli


@dataclass(frozen=True)
class Case:
    """A command line that must be refused."""

    words: str
    says: str
    needs: Callable[[], object] = lambda: None
    env: tuple[tuple[str, str], ...] = ()


def a_file(name: str, text: str = "") -> Callable[[], object]:
    """Make a file."""

    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)

    return make


WORDS = [
    Case("nope", "No such command 'nope'"),
    Case("rhlf", "Did you mean 'rlhf'?"),
    Case("completion zsh", "written for bash"),
    Case("report", "Missing argument 'PATH'"),
    Case("report nowhere", "there is no folder nowhere"),
    Case("runs nowhere", "there is no folder nowhere"),
    Case("compare nowhere", "there is no folder nowhere"),
    Case("compare --nope", "unknown flag --nope"),
    Case("train-sae --nope", "unknown flag --nope"),
    Case("train-sae --config-name=x", "unknown flag --config-name"),
    Case("train-sae seed", "'seed' is no setting; settings are written key=value"),
    Case("train-sae seeed=1", "there is no setting seeed; did you mean seed?"),
    Case("train-sae +seeed=1", "there is no setting seeed; did you mean seed?"),
    Case("train-sae sae.expansoin=3", "there is no setting sae.expansoin; did you mean sae.expansion?"),
    Case("train-sae zzz.yyy=3", "there is no setting zzz; saerl train-sae --help lists"),
    Case("train-sae sae.lr=abc", "sae.lr: Value 'abc' of type 'str' could not be converted to Float"),
    Case("train-sae seed=1.5", "seed: Value '1.5'"),
    Case("train-sae sae.architecture=foo", "expected one of [topk, batchtopk, matryoshka, relu, jumprelu, gated]"),
    Case("train-sae model=missing", "there is no model=missing; options are hub, local, planted, pythia-14m"),
    Case(
        "train-sae launch=two",
        "there is no launch=two; options are cpu_2, fsdp2, gpu",
    ),
    Case("train-sae launch=gpu_3", "gpu_8, one, or launch.num_processes=3"),
    Case("train-sae launch=cpu_3", "gpu_8, one, or launch.num_processes=3 launch.cpu=true"),
    Case("demo launch=cpu_2", "saerl demo runs in one process; leave launch=cpu_2 out"),
    Case("features saes=x launch=cpu_2", "saerl features runs in one process; leave launch=cpu_2 out"),
    Case("compare runs=x launch=gpu", "saerl compare runs in one process; leave launch=gpu out"),
    Case("eval-sae saes=x reward=hf", "saerl eval-sae has no group reward; leave reward=hf out"),
    Case("train-lm -m", "-m sweeps over values, and no setting has any; write KEY=VALUE,VALUE, or leave -m out"),
    Case("rlhf -m hydra.sweep.dir=x", "-m sweeps over values, and no setting has any"),
    Case("train-sae sae.lr=0.1,0.2", "sae.lr=0.1,0.2 is a sweep: add -m, or write a list as sae.lr=[0.1,0.2]"),
    Case("train-sae sae=[", "cannot read a setting"),
    Case("train-sae --config-dir nowhere", "nowhere is not a directory"),
    Case("train-sae hydra/launcher=basic", "has no effect without -m; add -m"),
    Case("train-sae -m site=mlp_out,mlp_out.3", "mixes the group option mlp_out with places"),
    Case("train-sae --cfg job sae.lr=abc", "sae.lr: Value 'abc'"),
    Case("evaluate", "policy has no value; write policy=…"),
]
if find_spec("hydra_plugins") is None:
    WORDS.append(Case("train-sae -m hydra/launcher=joblib", "needs an extra: pip install 'saerl[joblib]'"))
CONTRADICTIONS = [
    Case("train-sae sae.expansion=0", "must be >= 1"),
    Case("train-sae -m sae.expansion=4,0", "must be >= 1"),
    Case("train-sae -m seed=range(1,3) sae.l1=choice(0.1,x)", "sae.l1: Value 'x'"),
    Case("train-sae sae.d_sae=64", "give either sae.expansion or sae.d_sae"),
    Case("train-sae sae.expansion=null sae.d_sae=8", "sae.k=16 exceeds d_sae=8"),
    Case("train-sae site=", "site.names is empty"),
    Case("train-sae model=local", "model=local needs model.path=DIR"),
    Case("train-sae model=hub", "model=hub needs model.name=OWNER/MODEL"),
    Case(
        "train-sae model.revision=step3000",
        "does nothing with model=planted; it belongs to model=hub; leave it at null",
    ),
    Case("train-sae data=text", "data=text needs data.path=FILE"),
    Case("train-sae data.heldout=0.9", "data.heldout must be in (0, 0.5]"),
    Case("rlhf adapter.saes=x", "adapter=full; it belongs to adapter=sparse_coeffs or random_dictionary"),
    Case("rlhf --sparse-coeffs", "needs adapter.saes=DIR"),
    Case("rlhf algo=ppoo", "there is no algo=ppoo; options are dpo, grpo, ppo, ppo_arena, ppo_tldr, rloo, rwr"),
    Case("rlhf algo=grpo algo.group=7", "algo.group=7 must divide algo.rollouts=64 for algo=grpo; write one of 2, 4"),
    Case("rlhf algo=rloo algo.group=1", "algo.group=1 must divide algo.rollouts=64 for algo=rloo; write one of 2, 4"),
    Case("rlhf algo.group=48", "write one of 1, 2, 4, 8, 16, 32, 64"),
    Case("rlhf algo=grpo algo.lam=0.9", "algo.lam does nothing with algo=grpo; it belongs to algo=ppo"),
    Case("rlhf algo=grpo algo.critic=shared", "algo.critic does nothing with algo=grpo; it belongs to algo=ppo"),
    Case(
        "rlhf algo=sft algo.rollouts=32",
        "algo.rollouts does nothing with algo=sft; it belongs to algo=ppo,",
    ),
    Case("rlhf algo=sft algo.kl_target=1", "nothing with algo=sft; it belongs to algo=ppo, grpo or rloo;"),
    Case("rlhf algo=ppo algo.kl_gain=1", "algo.kl_gain does nothing without algo.kl_target; set that too, or"),
    Case("rlhf algo=dpo algo.attribute=cursing", "algo.attribute does nothing with algo=dpo; it belongs to algo=sft"),
    Case("rlhf algo.batch_size=8", "does nothing with algo=ppo; it belongs to algo=sft, dpo or rwr"),
    Case("rlhf algo.kl_target=-1", "algo.kl_target must be > 0, got -1.0"),
    Case("rlhf algo.critic=own", "expected one of [detached, shared, separate]"),
    Case("rlhf algo.stop_epochs_kl=0", "algo.stop_epochs_kl must be > 0"),
    Case("rlhf algo.stop_epochs_kl=0.1 launch.mixed_precision=fp16", "algo.stop_epochs_kl does not go with"),
    Case("rlhf algo.warmup=1", "algo.warmup must be in [0, 1)"),
    Case("rlhf algo=sft algo.batch_size=9 launch=cpu_2", "must be a multiple of launch.num_processes=2"),
    Case("rlhf algo=rwr algo.group=3", "algo.group=3 must be at least 2 and divide algo.draws=8192"),
    Case("rlhf algo=rwr adapter=sparse_coeffs adapter.saes=x adapter.splice=reconstruct", "not the reference of"),
    Case("rlhf algo=sft reward.clip=1", "leave them out for algo=sft"),
    Case("rlhf algo.draws=64", "algo.draws does nothing with algo=ppo; it belongs to algo=rwr"),
    Case("rlhf algo=sft algo.micro_batch=5", "algo.micro_batch=5 must divide the 32"),
    Case("rlhf algo=sft algo.examples=x.jsonl algo.attribute=cursing", "write one of them"),
    Case("rlhf evaluation.tracked=4", "evaluation.tracked must be >= 8"),
    Case("rlhf algo.kl_coef=0", "algo.kl_coef must be > 0"),
    Case("rlhf algo.minibatches=7", "algo.minibatches=7 must divide algo.rollouts=64"),
    Case("rlhf algo.rollouts=4 launch=cpu_2", "must be a multiple of launch.num_processes x algo.minibatches = 8"),
    Case("rlhf reward.parts.a.kind=planted", "a new part of reward.parts is written whole: 'reward.parts={NAME:"),
    Case("rlhf reward.parts={a:{kid:planted}}", "there is no setting reward.parts.a.kid"),
    Case("rlhf reward.parts={a:{kind:planted}}", "kind=planted needs reward.parts.NAME.attribute=NAME"),
    Case("rlhf model.world.seed=3", "model.world is called model.planted now"),
    Case("train-lm -m model.world.seed=1,2", "model.world is called model.planted now"),
    Case("rlhf reward=cursing reward.parts.cursing.kind=world", "kind=world is called planted now"),
    Case("rlhf reward.parts={a:{kind:world,attribute:polite}}", "kind=world is called planted now"),
    Case("rlhf reward=lexicon", "a reward part of kind lexicon needs path or words"),
]
NO_GPU = (("CUDA_VISIBLE_DEVICES", ""),)
MACHINE = [
    Case("train-sae launch.num_processes=0", "launch.num_processes must be >= 1"),
    Case("train-sae launch.num_processes=64", "has 0 GPUs; write launch=cpu_2", env=NO_GPU),
    Case("rlhf launch=gpu", "launch=gpu wants a process for each GPU, but there is none", env=NO_GPU),
    Case("rlhf adapter=full launch=gpu_8", "but this machine has 0 GPUs; write launch=cpu_2", env=NO_GPU),
    Case("train-sae launch=cpu_2 launch.num_processes=4096", "cores; write launch.num_processes="),
    Case("rlhf", "not under torchrun", env=(("LOCAL_RANK", "0"),)),
    Case("train-sae hydra.run.dir=file/run", "file/run", needs=a_file("file")),
]
SAES = [
    Case("train-sae sae=nope", "there is no sae=nope; options are anthropic-apr24"),
    Case("train-sae sae.tokens=0", "sae.tokens=0 is less than one batch"),
    Case("train-sae sae.k=2000", "sae.k=2000 exceeds d_sae=1024"),
    Case("train-sae sae=relu sae.auxk=0.1", "sae.auxk does nothing with sae.architecture=relu; it belongs to sae"),
    Case("train-sae sae.preact=1", "sae.preact does nothing with sae.architecture=topk; it belongs to sae"),
    Case("train-sae sae.controller=auto sae.target_l0=5", "sae.controller does nothing with sae.architecture=topk"),
    Case("train-sae sae=relu sae.controller=auto", "sae.controller=auto needs sae.target_l0=NUMBER"),
    Case("train-sae sae=matryoshka sae.prefixes=[0.5,0.2,1]", "sae.prefixes must rise"),
    Case("train-sae sae.tied=true", "it belongs to sae.architecture=relu and sae.decoder_norm=unit or"),
    Case("train-sae sae.max_grad_norm=0", "sae.max_grad_norm must be > 0"),
    Case("train-sae activations.buffer_tokens=100", "sae.batch_size=2048 exceeds activations.buffer_tokens=100"),
    Case("train-sae activations.outlier_norm=0.5", "activations.outlier_norm must be > 1, got 0.5"),
    Case("train-sae activations.cache=c activations.cache_gb=0", "activations.cache_gb must be > 0"),
    Case(
        "train-sae data=text data.path=a.txt data.stream=true activations.cache=c model=local model.path=.",
        "activations.cache needs all text at once",
        needs=a_file("a.txt", "a\n"),
    ),
    Case("train-sae sweep=[{kk:1}]", "sweep: there is no setting sae.kk"),
    Case("train-sae sweep=[{sae:nope}]", "sweep: there is no preset sae=nope"),
    Case("train-sae sweep=[{batch_size:1}]", "batch_size belongs to the stream"),
    Case("train-sae site.names=[mlp_in.1] site.targets=[]", "site.targets names 0 sites for 1 of site.names"),
    Case("train-sae site.names=[mlp_in.1] site.targets=[mlp_in.1]", "to itself is an autoencoder"),
    Case("train-sae sae.init_from=nowhere", "nowhere"),
    Case("eval-sae", "saes has no value; write saes=…"),
    Case("eval-sae saes=nowhere", "nowhere"),
    Case("eval-sae saes=a", "no SAE", needs=a_file("a/readme.txt")),
    Case("export nowhere --to saelens", "nowhere"),
    Case("export a --to numpy", "numpy", needs=a_file("a/readme.txt")),
]
if find_spec("wandb") is None:
    SAES.append(Case("train-sae launch.trackers=[wandb]", "launch.trackers=[wandb] needs a package: pip install wandb"))
REWARDS = [
    Case("rlhf reward=verifier", "reward.parts.right verifies answers, and documents have none"),
    Case("rlhf reward=verifier prompts.kind=file", "prompts.kind=file needs prompts.path=FILE"),
    Case("rlhf reward=verifier prompts.kind=file prompts.path=nowhere.jsonl", "nowhere.jsonl does not exist"),
    Case("rlhf reward=verifier reward.parts.right.match=regex", "match=regex needs reward.parts.NAME.pattern=REGEX"),
    Case("rlhf reward=count reward.parts.count.pattern=[a", "cannot read a setting"),
    Case("rlhf reward=count reward.parts.count.pattern='*'", "pattern='*' is no regular expression"),
    Case("rlhf reward=heavy reward.parts.error.shape=0", "shape must be > 0, got 0"),
    Case("rlhf reward=cursing reward.clip=0", "reward.clip must be > 0"),
    Case("rlhf reward=lexicon reward.parts.lexicon.path=a", "the word list a is empty", needs=a_file("a")),
    Case("rlhf reward=hf reward.parts.model.path=./nowhere", "there is no folder nowhere"),
    Case("train-reward pairs.kind=file", "pairs.kind=file needs pairs.path=FILE"),
    Case("train-reward pairs.attribute=nope", "pairs.attribute='nope' is unknown"),
    Case("train-reward batch_size=3 micro_batch=2", "micro_batch=2 must divide 3 pairs"),
    Case("train-reward model=local model.path=x", "x"),
]
JOBS = [
    Case("rlhf algo=sft algo.examples=nope.jsonl", "algo.examples=nope.jsonl does not exist"),
    Case("rlhf algo=sft algo.examples=a.jsonl", "algo.examples", needs=a_file("a.jsonl", '{"prompt": "a"}\n')),
    Case("rlhf algo=sft algo.attribute=swearing", "algo.attribute='swearing' is unknown; there are"),
    Case("rlhf algo=dpo algo.pairs.attribute=swearing", "pairs.attribute='swearing' is unknown"),
    Case("rlhf algo=dpo algo.pairs.kind=file", "pairs.kind=file needs pairs.path=FILE"),
    Case("rlhf algo=dpo algo.pairs.kind=file algo.pairs.path=nope.jsonl", "pairs.path=nope.jsonl does not exist"),
    Case("train-lm model=local model.path=x", "train-lm makes a new model"),
    Case("train-lm launch=cpu_2 model.planted.batch_size=1", "is less than a row for each of launch.num_processes=2"),
    Case("demo overrides.nope=[x]", "overrides.nope: no such stage"),
]


@pytest.fixture
def place(empty_place: Path) -> Iterator[Path]:
    """An empty directory in which the command may make noise only on purpose."""
    logging.captureWarnings(False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a warning would be a second line
        yield empty_place


@pytest.mark.parametrize(
    "case", [*WORDS, *CONTRADICTIONS, *MACHINE, *SAES, *REWARDS, *JOBS], ids=lambda case: case.words
)
def test_refused(case, place, monkeypatch, capfd):
    case.needs()
    before = sorted(place.rglob("*"))
    for name, value in case.env:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["saerl", *case.words.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    line = capfd.readouterr().err
    assert end.value.code == 2, line
    assert line.startswith("saerl: ")
    assert line.count("\n") == 1
    assert case.says in line
    assert "Traceback" not in line
    assert sorted(place.rglob("*")) == before
    assert os.getcwd() == str(place)
