"""What a restriction can express: its parameters fitted directly to the KL-optimal policy, without PPO.

python fit.py --seed 0 --drawn FOLDER --base EVALUATION RUN ...        # one JSON line a run

The optimal policy at temperature beta is pi_ref exp(r / beta) / Z. For each of many training prompts, completions of
the reference are weighted with w_i = exp(r_i / beta) / sum_j exp(r_j / beta), and the parameters are fitted by maximum
likelihood under these weights: as completions grow in number, towards the policy of the class that is closest to the
optimal one in KL(pi* || pi). No exploration, no critic, no clipping, little noise: what is missing then is missing from
the class, or from what so many steps of Adam can reach.

RUN: a finished run of `saerl rlhf`, of which only the kind of adapter is used: its parameters are set back to
untouched. EVALUATION: a run of `saerl evaluate` with base samples, on the same model; results are measured as it does.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.report.frontier import limits_of, shares
from saerl_cli.rewards.score import TOTAL
from saerl_cli.rl.evaluate_job import POLICY, Bench, baseline_rewards, build_bench, point
from saerl_cli.rl.measure import draw, generate, heldout_loss, log_probabilities
from saerl_cli.rl.questions import choose_prompts
from saerl_cli.run.files import read_json, read_jsonl, write_json

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("runs", nargs="+", type=Path)
p.add_argument("--base", type=Path, required=True)
p.add_argument("--drawn", type=Path, required=True, help="where completions of the reference are kept, a file a seed")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--beta", type=float, default=0.4)
p.add_argument("--prompts", type=int, default=256)
p.add_argument("--samples", type=int, default=32)
p.add_argument("--epochs", type=int, default=4)
p.add_argument("--batch", type=int, default=64)
a = p.parse_args()
torch.set_num_threads(1)


def untouch(bench: Bench) -> list[Tensor]:
    """Set the policy back to its reference; the parameters that may be fitted."""
    policy = bench.policy
    if policy.reference_model is not None:
        policy.model.load_state_dict(policy.reference_model.state_dict())
        parameters = list(policy.model.parameters())
    else:
        trained = {
            name for name in json.loads((a.run / "run.json").read_text())["trainable"] if "value_head" not in name
        }
        parameters = [q for name, q in policy.model.named_parameters() if name in trained]
        assert parameters, "the run's trainable parameters are not in the loaded policy"
        for q in parameters:
            q.data.zero_()
    for q in parameters:
        q.requires_grad_(True)
    return parameters


def examples(bench: Bench) -> list[dict[str, Any]]:
    """Completions of the reference on training prompts, {prompt, ids, reward}, drawn once a seed."""
    file = a.drawn / f"seed-{a.seed}.json"
    if file.is_file():
        return read_json(file)["examples"]
    seen, _ = choose_prompts(bench.trained, bench.policy.tokenizer, bench.policy.context_size)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(a.seed)).tolist()
    prompts = [seen[i] for i in order[: a.prompts] for _ in range(a.samples)]
    algo, tokenizer = bench.trained.algo, bench.policy.tokenizer
    with bench.policy.reference() as model:
        settings = (algo.max_new_tokens, algo.temperature, 64, 1000 + a.seed)
        ids = generate(model, prompts, tokenizer, bench.policy.eos_token_ids, *settings)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = bench.reward.score([q.text for q in prompts], texts, ids, [q.answer for q in prompts])[TOTAL]
    found = [{"prompt": q.text, "ids": row, "reward": r} for q, row, r in zip(prompts, ids, scores, strict=True)]
    a.drawn.mkdir(parents=True, exist_ok=True)
    write_json(file, {"examples": found})
    return found


def weights(drawn: list[dict[str, Any]]) -> list[float]:
    """exp(r / beta), normalised over the completions of each prompt and then to mean 1."""
    found = []
    for start in range(0, len(drawn), a.samples):
        rewards = torch.tensor([example["reward"] for example in drawn[start : start + a.samples]], dtype=torch.float64)
        found += ((rewards / a.beta).softmax(0) * a.samples).tolist()
    return found


def fit(bench: Bench, parameters: list[Tensor]) -> None:
    """Weighted maximum likelihood, Adam with a linear schedule to 0 at the learning rate of the run."""
    seen, _ = choose_prompts(bench.trained, bench.policy.tokenizer, bench.policy.context_size)
    prompt_of = {prompt.text: prompt for prompt in seen}
    drawn = examples(bench)
    kept = [(e, w) for e, w in zip(drawn, weights(drawn), strict=True) if w > 0.01]
    optimiser = torch.optim.Adam(parameters, lr=bench.trained.adapter.lr)
    steps = a.epochs * math.ceil(len(kept) / a.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(a.seed)
    policy, temperature = bench.policy, bench.trained.algo.temperature
    for _ in range(a.epochs):
        order = torch.randperm(len(kept), generator=generator).tolist()
        for start in range(0, len(order), a.batch):
            part = [kept[i] for i in order[start : start + a.batch]]
            prompts, ids = [prompt_of[e["prompt"]] for e, _ in part], [e["ids"] for e, _ in part]
            logp, tokens, mask = log_probabilities(
                policy.model, prompts, ids, policy.tokenizer.pad_token_id, temperature
            )
            chosen = (logp.gather(-1, tokens[..., None]).squeeze(-1) * mask).sum(1)  # [batch]
            loss = -(chosen * torch.tensor([w for _, w in part])).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def main(run: Path) -> None:
    """Fit one run's restriction and measure it."""
    a.run = run
    base = read_jsonl(a.base / "base.jsonl")
    samples = read_json(a.base / "summary.json")["measured"]["samples"]
    config = EvaluateConfig(policy=str(run))
    config.evaluation.samples = samples
    bench = build_bench(config, torch.device("cpu"))
    parameters = untouch(bench)
    fit(bench, parameters)
    for q in parameters:
        q.requires_grad_(False)
    after = draw(bench.policy, bench.reward, bench.prompts, bench.sampling(POLICY))
    found = point(0, bench.policy, baseline_rewards(base, after), after, heldout_loss(bench.policy.model, bench.rows))
    numbers = {
        "name": run.name,
        "seed": a.seed,
        "beta": a.beta,
        "trainable_parameters": sum(q.numel() for q in parameters),
    }
    print(json.dumps(numbers | found | shares(found, limits_of(base))), flush=True)


for run in a.runs:
    main(run)
