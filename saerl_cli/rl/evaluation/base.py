"""Rewards of the reference's own completions, many a prompt: what the limits of any policy follow from.

RUN/base.jsonl holds a line a prompt, {prompt, rewards: [...]}. They are drawn once for a model, reward, prompts and
sampling; other evaluations of the same take them from there. Torch is imported by `draw_base` alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from saerl_cli.config.adapter import Splice
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.run.directory import Run, write_jsonl
from saerl_cli.run.files import read_jsonl

if TYPE_CHECKING:
    from saerl_cli.data.prompts import Prompt
    from saerl_cli.rewards.score import Reward
    from saerl_cli.rl.evaluation.measure import Sampling
    from saerl_cli.rl.policy import Policy

FILE = "base.jsonl"

Base = list[dict[str, Any]]
"""{prompt, rewards} of every prompt."""


def measured_by(config: EvaluateConfig, trained: RlhfConfig) -> dict[str, Any]:
    """What two evaluations must share to be comparable, beside their prompts: reference, reward and sampling."""
    inputs = Run(config.policy).record.get("inputs", {})
    reconstructs = trained.adapter.splice is Splice.reconstruct
    saes = {site: sae["sha256"] for site, sae in inputs.get("sae", {}).items()} if reconstructs else {}
    return {
        "model": inputs.get("model", {}).get("sha256"),
        "reference": {"splice": "reconstruct", "sae": saes} if reconstructs else "model",
        "reward": OmegaConf.to_container(OmegaConf.structured(trained.reward), enum_to_str=True),
        "max_new_tokens": trained.algo.max_new_tokens,
        "temperature": trained.algo.temperature,
        "samples": config.evaluation.samples,
        "seed": config.seed,
    }


NAMES = {
    "model": "another model",
    "reference": "another reference",
    "reward": "another reward",
    "max_new_tokens": "another algo.max_new_tokens",
    "temperature": "another algo.temperature",
    "samples": "another evaluation.samples",
    "seed": "another seed",
    "prompts": "other prompts",
}
"""What differs, in words, by key of `measured`."""


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What tells two evaluations apart so that their numbers are not comparable; None when nothing does."""
    differing = [key for key in NAMES if key in one and key in other and one[key] != other[key]]
    return NAMES[differing[0]] if differing else None


def check_base(config: EvaluateConfig, trained: RlhfConfig) -> None:
    """Refuse a `base` that is no finished evaluation of the same, or has no base samples.

    Raises:
        ValueError: one line saying what is wrong.
    """
    if config.base is None:
        return
    run = Run(config.base)
    if run.record.get("job") != "evaluate" or not (run.path / FILE).is_file():
        raise ValueError(
            f"base={config.base} has no {FILE}; give a run of `saerl evaluate` with snapshots=true or base_samples=N"
        )
    if run.status != "completed":
        raise ValueError(f"base={config.base} is {run.status}; repeat its command to finish it")
    differs = difference(run.read_summary()["measured"], measured_by(config, trained))
    if differs:
        raise ValueError(f"base={config.base} was drawn with {differs} than {config.policy}; leave base out")


def base_of(
    config: EvaluateConfig,
    run: Run,
    policy: "Policy",
    reward: "Reward",
    prompts: "Sequence[Prompt]",
    how: "Sampling",
) -> Base:
    """The base samples of an evaluation, drawn or read; kept in its run directory. Empty where none are wanted.

    Raises:
        ValueError: `base` has other prompts.
    """
    distinct = list(dict.fromkeys(prompts))
    source = Path(config.base) if config.base else run.path
    found = read_jsonl(source / FILE)  # in its own directory: of an attempt that was killed later
    if found and [line["prompt"] for line in found] != [prompt.text for prompt in distinct]:
        raise ValueError(f"{source} has base samples of other prompts; leave base out")
    if not found and config.samples_a_prompt:
        found = draw_base(policy, reward, distinct, how, config.samples_a_prompt)
    if found and run.writes:
        write_jsonl(run.path / FILE, found)
    return found


def draw_base(policy: "Policy", reward: "Reward", prompts: "Sequence[Prompt]", how: "Sampling", count: int) -> Base:
    """Rewards of `count` completions of the reference for every prompt."""
    from saerl_cli.rewards.score import TOTAL
    from saerl_cli.rl.evaluation.measure import draw
    from saerl_cli.run.progress import say

    say(f"sampling {count} completions of each of {len(prompts)} prompts from the reference")
    scores = draw(policy, reward, [p for p in prompts for _ in range(count)], how, reference=True).scores[TOTAL]
    return [{"prompt": prompt.text, "rewards": scores[i * count : (i + 1) * count]} for i, prompt in enumerate(prompts)]
