"""What `saerl evaluate` measures: a finished policy, and those before it, on prompts and samples of their own."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config import flat
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.groups import ModelKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.evaluation.base import Base, base_of, measured_by
from saerl_cli.rl.runs import kl_coef, run_config, snapshot_files
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_jsonl
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.run.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.data.prompts import Prompt
    from saerl_cli.rewards.score import Reward
    from saerl_cli.rl.evaluation.measure import Samples, Sampling
    from saerl_cli.rl.policy import Policy


@dataclass
class Evaluated:
    """What was measured."""

    numbers: dict[str, Any]
    """For summary.json."""
    base: Base
    """Empty where no limit is asked for."""


def evaluate_policy(config: EvaluateConfig, run: Run, device: Any, group: ProcessGroup = ONE_PROCESS) -> Evaluated:
    """Draw fresh samples of the policy, of those kept along the way and of the reference, and measure them.

    `numbers["frontier"]` has an entry a policy, in order, the last one being the policy itself: {step, reward,
    reward_se, gain, gain_se, kl, kl_se, kl_exact, kl_exact_se, length, ended, nll_heldout}, and for coefficients
    {changed, nonzero, delta_max, delta_norm}. All of them answer the same prompts with the same random numbers; gains
    are means of differences from the reference on the same prompt, whose mean reward is `reward_base`. The processes of
    the group share the sampling, the scoring and the held-out text.
    """
    from saerl_cli.rl.evaluation.baselines import behaviour
    from saerl_cli.rl.evaluation.behaviour import warnings_of
    from saerl_cli.rl.evaluation.measure import measure
    from saerl_cli.rl.summary import curse_words

    bench = build_evaluation(config, device, group)
    record_inputs(config, run)
    base = base_of(config, run, bench.policy, bench.reward, bench.prompts, bench.sampling(BASE))
    say(f"sampling {config.evaluation.samples} completions from the policy and from its reference")
    planted = bench.trained.model.kind is ModelKind.planted
    how = bench.sampling(POLICY)
    numbers, before, after = measure(bench.policy, bench.reward, bench.prompts, bench.rows, how, attributes=planted)
    show(run, after)
    coef = kl_coef(config.policy)
    numbers["behaviour"] = behaviour(bench.policy, bench.reward, before, after, how, coef)
    last = read_jsonl(Path(config.policy) / "metrics.jsonl")[-1]["step"]
    baseline = baseline_rewards(base, before)
    final = point(last, bench.policy, baseline, after, numbers["nll_heldout_after"])
    numbers = {
        "policy": str(Path(config.policy)),
        "adapter": bench.trained.adapter.kind,
        "seed": config.seed,
        **numbers,
        **curse_words(numbers),
        "warnings": warnings_of(numbers),
        "trainable_parameters": policy_parameters(config.policy),
        "reward_base": sum(baseline) / len(baseline),
        "frontier": [*weaker(bench, baseline, last), *(earlier(bench, baseline) if config.snapshots else []), final],
        "measured": measured_by(config, bench.trained) | {"prompts": prompts_sha256(bench.prompts)},
    }
    return Evaluated(numbers, base)


POLICY, BASE = 7, 8
"""What completions are drawn for: each has random numbers of its own."""


@dataclass
class EvaluationSetup:
    """What a policy is measured with."""

    config: EvaluateConfig
    trained: RlhfConfig
    """Settings of the policy's run."""
    policy: "Policy"
    reward: "Reward"
    prompts: "list[Prompt]"
    rows: "Tensor"
    """[n, context] packed held-out token ids."""
    group: ProcessGroup = ONE_PROCESS

    def sampling(self, purpose: int) -> "Sampling":
        """How completions are drawn."""
        from saerl_cli.rl.evaluation.measure import Sampling
        from saerl_cli.run.seeds import derived_seed

        algo, seed = self.trained.algo, derived_seed(self.config.seed, purpose)
        return Sampling(algo.max_new_tokens, algo.temperature, self.config.evaluation.batch_size, seed, self.group)


def record_inputs(config: EvaluateConfig, run: Run) -> None:
    """What is measured, and all settings it was trained with, into run.json."""
    trained = flat(Run(config.policy).settings)
    inputs = Run(config.policy).record.get("inputs", {})
    run.update(inputs={**inputs, "policy": str(Path(config.policy)), "base": config.base}, trained_with=trained)


def build_evaluation(config: EvaluateConfig, device: Any, group: ProcessGroup = ONE_PROCESS) -> EvaluationSetup:
    """Load the policy, build its reward, choose prompts."""
    from saerl_cli.data.documents import documents
    from saerl_cli.data.prompts import choose_prompts
    from saerl_cli.models import quiet_transformers
    from saerl_cli.rewards.score import build_reward
    from saerl_cli.rl.build import heldout_rows
    from saerl_cli.rl.policy import load_policy

    trained = run_config(config.policy)
    trained.evaluation = config.evaluation
    with quiet_transformers():
        policy = load_policy(config.policy, device, config.launch)
    reward = build_reward(trained.reward, policy.tokenizer, device)
    texts = documents(trained.data, trained.model, "heldout")
    _, unseen = choose_prompts(trained, policy.tokenizer, policy.context_size)
    prompts = drawn(unseen, config.evaluation.samples, config.seed)
    rows = heldout_rows(trained, policy.context_size, policy.tokenizer, texts)
    return EvaluationSetup(config, trained, policy, reward, prompts, rows, group)


def baseline_rewards(base: Base, before: "Samples") -> list[float]:
    """What the reference gets for each completion's prompt: the mean of its base samples, or one sample without any."""
    from saerl_cli.rewards.score import TOTAL

    if not base:
        return before.scores[TOTAL]
    means = {line["prompt"]: sum(line["rewards"]) / len(line["rewards"]) for line in base}
    return [means[prompt.text] for prompt in before.prompts]


def earlier(bench: EvaluationSetup, baseline: list[float]) -> list[dict[str, Any]]:
    """Entries of the policies kept along the way; the last of them stays in `bench.policy`."""
    from saerl_cli.rl import snapshots
    from saerl_cli.rl.evaluation.measure import draw, heldout_loss

    policy, points = bench.policy, []
    files = snapshot_files(bench.config.policy)
    for number, (step, file) in enumerate(files, start=1):
        say(f"snapshot {number} of {len(files)}, step {step}")
        snapshots.load(policy.model, file)
        samples = draw(policy, bench.reward, bench.prompts, bench.sampling(POLICY))
        points.append(point(step, policy, baseline, samples, heldout_loss(policy.model, bench.rows, group=bench.group)))
    return points


def weaker(bench: EvaluationSetup, baseline: list[float], step: int) -> list[dict[str, Any]]:
    """Entries of the policy with all that it learned times `factors`; the policy is itself again afterwards.

    On the line between a reference and what RLHF made of it rewards are bought with less KL than early policies of
    training pay (Rame et al. 2024, "WARP"; for fine-tuning Wortsman et al. 2022).
    """
    import torch

    from saerl_cli.rl.evaluation.measure import draw, heldout_loss

    policy, points = bench.policy, []
    changes = learned(bench) if bench.config.factors else []
    for factor in sorted(bench.config.factors):
        say(f"what was learned times {factor:g}")
        for parameter, reference, value in changes:
            parameter.data.copy_(torch.lerp(reference.double(), value.double(), factor))
        samples = draw(policy, bench.reward, bench.prompts, bench.sampling(POLICY))
        entry = point(step, policy, baseline, samples, heldout_loss(policy.model, bench.rows, group=bench.group))
        points.append(entry | {"factor": factor})
    for parameter, _, value in changes:
        parameter.data.copy_(value)
    return points


def learned(bench: EvaluationSetup) -> "list[tuple[Tensor, Tensor, Tensor]]":
    """The policy's trained parameters, what each is in the reference, and what training made of it.

    What the adapter's entry calls undecided stays as it is: of LoRA's two factors the first, so that their product
    follows a line, and gates.
    """
    import torch

    from saerl_cli.rl.adapters import adapter_of

    policy = bench.policy
    trained = Run(bench.config.policy).record["trainable"].keys()
    untouched = adapter_of(bench.trained.adapter).untouched
    base = {} if policy.reference_model is None else dict(policy.reference_model.named_parameters())
    found = []
    for name, parameter in policy.model.named_parameters():
        value = next((value for part, value in untouched.items() if part in name), 0.0)
        if name not in trained or value is None:
            continue
        reference = base[name] if base else torch.full_like(parameter, value)
        found.append((parameter, reference.detach().clone(), parameter.detach().clone()))
    return found


def drawn(prompts: "list[Prompt]", count: int, seed: int) -> "list[Prompt]":
    """So many prompts in an order that depends on the seed; each as often as the next where there are too few."""
    from random import Random

    order = list(prompts)
    Random(seed).shuffle(order)
    return [order[i % len(order)] for i in range(count)]


def point(step: int, policy: "Policy", baseline: list[float], samples: "Samples", loss: float) -> dict[str, Any]:
    """An entry of the frontier."""
    from saerl_cli.adapter import deltas
    from saerl_cli.rewards.score import TOTAL
    from saerl_cli.rl.evaluation.measure import describe, mean_and_error
    from saerl_cli.rl.summary import coefficient_statistics

    scores = samples.scores[TOTAL]
    gains = [x - y for x, y in zip(scores, baseline, strict=True)]
    columns = {"reward": scores, "gain": gains, "kl": samples.kl, "kl_exact": samples.kl_exact}
    numbers: dict[str, Any] = {"step": step}
    for name, values in columns.items():
        numbers[name], numbers[f"{name}_se"] = mean_and_error(values)
    described = describe(samples, policy.eos_token_ids)
    numbers |= {"length": described["length"], "ended": described["ended"], "nll_heldout": loss}
    found = coefficient_statistics(policy.model)
    nonzero = {"nonzero": sum(int((d != 0).sum()) for d in deltas(policy.model).values())} if found else {}
    return numbers | found | nonzero


def show(run: Run, samples: "Samples") -> None:
    """The first completions, into samples.jsonl."""
    from saerl_cli.rewards.score import TOTAL

    run.truncate(-1)  # what a killed attempt has written
    rows = zip(samples.prompts, samples.texts, samples.scores[TOTAL], samples.kl, strict=True)
    for prompt, text, score, kl in list(rows)[:64]:
        run.sample(0, prompt.text, text, score, kl)


def policy_parameters(run_path: Path | str) -> int:
    """How many parameters of the policy a run trained."""
    from saerl_cli.rl.rollouts.scoring import is_value_parameter

    trainable = Run(run_path).record.get("trainable", {})
    return sum(count for name, count in trainable.items() if not is_value_parameter(name))


def prompts_sha256(prompts: "list[Prompt]") -> str:
    """Hash of the prompts, in order."""
    return hashlib.sha256(json.dumps([prompt.input_ids for prompt in prompts]).encode()).hexdigest()
