"""Run directories written by hand, as small as a report needs them, or as large as it must bear."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'> & \u2028 \"quoted\" <!--"
"""What a model might write."""


def constant(kind: str, text: str, reward: float, difference: float, kl: float) -> dict[str, Any]:
    """A constant completion as `saerl_cli.rl.evaluation.baselines` describes it."""
    errors = {"reward_se": 0.0, "difference_se": 0.01, "kl_se": 0.1}
    word = text.split()[0] if kind == "token" else None
    found = {"kind": kind, "text": text, "token": word, "reward": reward, "difference": difference, "kl": kl}
    return found | errors | {"objective": reward - 0.05 * kl, "near": 0.25}


def behaviour(beaten: bool = True, empty_kl: float = 1.0) -> dict[str, Any]:
    """The key `behaviour` of a summary, in which the empty completion has the reward 0 and the policy -0.25."""
    part = {"repetition": 0.1, "commonest": 0.02, "commonest_text": None, "top_token": {"text": ".", "share": 0.1}}
    part |= {"tail": {"kurtosis": 1.5, "hill": None, "hill_se": None, "top_share": 0.1}}
    less = 0.25 if beaten else -0.5
    return {
        "before": part,
        "after": part | {"commonest_text": HOSTILE, "repetition": 0.4},
        "one_token": {"text": "damn", "share": 0.3, "gain_without": 0.7, "held_before": 0.2, "held_after": 0.01},
        "baselines": {
            "string": constant("empty", "", 0.0, less, empty_kl),
            "token": constant("token", "one one", 0.0, less, 240.0),
            "empty": constant("empty", "", 0.0, less, empty_kl),
            "policy": {"reward": -0.25, "kl": 2.0, "objective": -0.35},
            "candidates": 300,
            "prompts": 128,
            "kl_coef": 0.05,
        },
        "beaten": beaten,
    }


def record(folder: Path, job: str, **more: Any) -> dict[str, Any]:
    """run.json."""
    found = {
        "job": job,
        "status": "completed",
        "command": f"saerl {job.replace('_', '-')} hydra.run.dir={folder}",
        "started": f"2026-01-01T00:00:00 {folder}",
        "versions": {"saerl": "0.1.0"},
        "inputs": {"model": {"name": "planted", "revision": None, "sha256": "ab"}},
        "seed": 0,
        "frozen_unchanged": True,
    }
    return found | more


def lines(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A jsonl file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, adapter: str = "full", seed: int = 0, points: int = 5, **summary: Any) -> Path:
    """A finished run of `saerl rlhf`."""
    folder.mkdir(parents=True)
    numbers = {
        "adapter": adapter,
        "trainable_parameters": 3072,
        "reward_before": -1.5,
        "reward_after": -0.25,
        "reward_se": 0.05,
        "kl": 2.0,
        "kl_se": 0.1,
        "nll_heldout_before": 1.2,
        "nll_heldout_after": 1.3,
        "seconds": 60.0,
        "frozen_unchanged": True,
        "curse_share_before": 0.08,
        "curse_share_after": 0.02,
        "curse_removed": 0.75,
        "length_before": 20.0,
        "length_after": 19.0,
        "behaviour": behaviour(),
        "warnings": ["a constant string gets reward 0.000, the policy -0.250: the empty completion"],
        **summary,
    }
    numbers = {key: value for key, value in numbers.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(record(folder, "rlhf", seed=seed)))
    (folder / "summary.json").write_text(json.dumps(numbers))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(f"seed: {seed}\nadapter:\n  kind: {adapter}\n  lr: 0.1\n")
    rows = [{"step": 16 * i, "phase": i, "reward": i / points, "kl": 2 * i / points} for i in range(points)]
    lines(folder, "metrics", [row | {"length": 20.0, "entropy": 1.0 + row["kl"]} for row in rows])
    texts = ((0, HOSTILE, -1.0), (40, "in the middle", -0.5), (80, "was fine", 0.0))
    lines(folder, "samples", [sample(step, "the film", text, reward) for step, text, reward in texts])
    return folder


def sample(step: int, prompt: str, text: str, reward: float) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {"step": step, "prompt": prompt, "completion": text, "reward": reward, "kl": 0.5}


def write_features(run: Path, count: int = 200, described: int = 30) -> None:
    """features.json, with `count` features at one site."""
    deltas = [((7919 * i) % 1000 - 500) / 250 or 0.5 for i in range(count)]
    features = [
        {"site": "mlp_out.1", "feature": i, "delta": deltas[i], "effect": float(described - i), "density": 0.1}
        | {"fires_on": [f"word{i}", HOSTILE], "promotes": ["up"], "suppresses": ["down"], "attribute": "cursing"}
        | {"f1": 0.5, "contexts": [[["the", 0.0], [HOSTILE, 2.0]]]}
        for i in range(described)
    ]
    (run / "features.json").write_text(json.dumps({"features": features, "deltas": {"mlp_out.1": deltas}}))


def write_evaluation(folder: Path, policy: Path, adapter: str = "full", seed: int = 0, reward: float = -0.2) -> Path:
    """A finished run of `saerl evaluate` with a frontier and its limits."""
    folder.mkdir(parents=True)
    inputs = {"model": {"name": "planted"}, "policy": str(policy)}
    settings = {"adapter.kind": adapter, "adapter.lr": 0.1, "seed": seed}
    facts = record(folder, "evaluate", seed=1, inputs=inputs, trained_with=settings)
    (folder / "run.json").write_text(json.dumps(facts))
    points = [
        {"step": step, "kl": kl, "kl_exact": kl, "kl_exact_se": 0.05, "reward": r, "reward_se": 0.04, "gain": r + 1.5}
        | {"gain_se": 0.04}
        for step, kl, r in ((40, 1.0, reward - 0.3), (80, 2.0, reward))
    ]
    limit = [
        {"kl": kl / 4, "gain": (kl / 8) ** 0.5, "gain_se": 0.0, "ess": 30.0, "reliable": kl < 7} for kl in range(10)
    ]
    numbers = {
        **{"policy": str(policy), "adapter": adapter, "reward_before": -1.5, "reward_after": reward, "reward_se": 0.04},
        **{"kl": 2.0, "kl_se": 0.1, "reward_base": -1.5, "frontier": points, "efficiency": 0.8, "efficiency_se": 0.05},
        **{"measured": {"model": "ab", "samples": 64, "seed": 1}, "base_samples": 64, "optimum": limit},
        "best_of_n": [{"n": n, "kl": 0.4 * n, "gain": 0.2 * n} for n in (1, 2, 4)],
    }
    (folder / "summary.json").write_text(json.dumps(numbers))
    lines(folder, "samples", [sample(0, "the book", "was new", 0.0)])
    return folder


def write_audit(folder: Path, policy: Path) -> Path:
    """A finished run of `saerl audit`."""
    folder.mkdir(parents=True)
    facts = record(folder, "audit", inputs={"policy": str(policy)})
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "summary.json").write_text("{}")
    curve = [{"n": n, "gain": n / 10, "share": min(1.0, n / 8), "share_se": 0.02} for n in (0, 1, 2, 4, 8, 16)]
    reverts = [
        {"site": "mlp_out.1", "feature": i, "delta": 0.5, "attribution": 1.0 / (i + 1), "attribution_se": 0.01}
        | {"reward": -0.5 / (i + 1), "reward_se": 0.02, "kl": -0.1, "fires_on": [HOSTILE]}
        for i in range(20)
    ]
    audit = {"version": 1, "gain": {"gain": 1.25, "gain_se": 0.05, "kl": 2.0}, "reverts": reverts}
    audit |= {"curves": {"keep": curve, "keep_random": curve}, "needed": {"90": {"n": 7, "random": 0.1}, "99": None}}
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder


def write_everything(place: Path) -> Path:
    """Two policies, one with features, their evaluations, an audit, SAEs and a run that failed."""
    sparse, full = write_run(place / "sparse", "sparse_coeffs", changed=3), write_run(place / "full")
    write_features(sparse)
    write_evaluation(place / "eval-sparse", sparse, "sparse_coeffs")
    write_evaluation(place / "eval-full", full, reward=-0.1)
    write_audit(place / "audit", sparse)
    saes = place / "saes"
    saes.mkdir()
    (saes / "run.json").write_text(json.dumps(record(saes, "train_sae")))
    metrics = {"site": "mlp_out.1", "d_in": 8, "d_sae": 64, "fvu": 0.01, "l0": 8.0}
    (saes / "summary.json").write_text(json.dumps({"saes": {"mlp_out.1": metrics}, "fvu_mean": 0.01}))
    lines(saes, "metrics", [{"step": i, "mlp_out.1/fvu": 1 / (i + 1), "mlp_out.1/l0": 8.0} for i in range(1, 9)])
    write_failed(place / "failed")
    return place


def write_failed(folder: Path) -> Path:
    """A run that failed at step 40, before it had written any samples."""
    folder.mkdir(parents=True)
    error = "step 40: reward is NaN"
    (folder / "run.json").write_text(json.dumps(record(folder, "rlhf", status="failed", error=error)))
    lines(folder, "metrics", [{"step": step, "reward": 0.1, "kl": 0.0} for step in (20, 40)])
    return folder
