"""`saerl rlhf`: PPO on a frozen language model with SAE coefficients, or on the whole model."""

import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import AdapterKind, ModelKind, Precision, Schedule
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.check import check, chosen_saes
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder, read_json
from saerl_cli.run.progress import say, task_bars

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.models import Loaded
    from saerl_cli.rewards.score import Reward
    from saerl_cli.rl.policy import Policy
    from saerl_cli.rl.prompts import Prompt
    from saerl_cli.rl.trainer import PPOTrainer

__all__ = ["check", "work"]

SHOWN_SAMPLES = 8
"""Completions that samples.jsonl gets at a time, of the same held-out prompts each time."""
CHANGED = 1e-3
"""A coefficient with |delta| above this counts as changed."""
TOP_FEATURES = 20
"""Most moved features in summary.json."""
LABEL_ROWS = 64
"""Held-out rows that name a feature by the token it fires on."""


@dataclass
class Parts:
    """What a run is made of."""

    config: RlhfConfig
    run: Run
    loaded: "Loaded"
    reward: "Reward"
    prompts: "list[Prompt]"
    heldout_prompts: "list[Prompt]"
    heldout_rows: "Tensor"
    """[n, context] packed held-out token ids."""
    saes: dict[str, Path] = field(default_factory=dict)
    """Site -> SAE folder."""


def work(config: RlhfConfig, run: Run, accelerator: Any) -> float:
    """Train, prove the restriction, measure, save; returns the reward after training.

    Raises:
        ValueError: what only loading can find out, or a frozen tensor that moved.
        saerl_cli.rl.trainer.Diverged: a number that is not finite.
    """
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    parts = build_parts(config, run, accelerator.device)
    trainer = build_trainer(parts, accelerator)
    policy = policy_of(trainer, parts)
    frozen = frozen_hashes(trainer)
    record_inputs(parts, trainer)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate(-1)  # what an attempt without a checkpoint left
        first_look(parts, policy)
    train(trainer, parts, policy, checkpoint)
    refuse_moved(frozen, frozen_hashes(trainer), run)
    save_policy(trainer, parts)
    numbers: dict[str, Any] = {"reward_after": 0.0}
    if accelerator.is_main_process:  # the others wait: the numbers do not depend on how many there are
        numbers = summarise(parts, trainer, policy)
        run.summary(numbers)
        say(outcome(numbers))
    accelerator.wait_for_everyone()
    return numbers["reward_after"]


# --- building --------------------------------------------------------------------------------------------------------


def build_parts(config: RlhfConfig, run: Run, device: Any) -> Parts:
    """Load the model, build the reward, cut the prompts."""
    from saerl_cli.activations import documents
    from saerl_cli.models import load_model
    from saerl_cli.rewards.score import build_reward
    from saerl_cli.rl.prompts import build_prompts, refuse_too_few

    loaded = load_model(config.model, device)
    reward = build_reward(config.reward, loaded.tokenizer, device)
    heldout = documents(config.data, config.model, "heldout")
    train = documents(config.data, config.model, "train")
    prompts, heldout_prompts = build_prompts(
        train, heldout, loaded.tokenizer, config.prompts.tokens, config.prompts.count
    )
    refuse_too_few(len(prompts), config.algo.rollouts, config.prompts.tokens)
    saes = chosen_saes(config.adapter) if config.adapter.kind is AdapterKind.sparse_coeffs else {}
    rows = heldout_rows(config, loaded.context_size, loaded.tokenizer, heldout)
    return Parts(config, run, loaded, reward, prompts, heldout_prompts, rows, saes)


def heldout_rows(config: RlhfConfig, context_size: int, tokenizer: Any, heldout: Sequence[str]) -> "Tensor":
    """Packed held-out tokens, `evaluation.heldout_tokens` at most; [n, context]."""
    from saerl_cli.activations import row_length, token_rows

    length = row_length(config.data, context_size)
    enough = heldout[: config.evaluation.heldout_tokens]  # a document has a token at least
    return token_rows(enough, tokenizer, length)[: max(1, config.evaluation.heldout_tokens // length)]


def build_trainer(parts: Parts, accelerator: Any) -> "PPOTrainer":
    """The trainer with policy, reference and value head."""
    from datasets import Dataset

    from saerl_cli.rl.trainer import PPOTrainer

    config, model = parts.config, parts.loaded.model
    peft_config = None
    if config.adapter.kind is AdapterKind.sparse_coeffs:
        peft_config = adapter_config(parts)
    else:
        model.requires_grad_(True)
    rows = {"prompt": [p.text for p in parts.prompts], "input_ids": [list(p.input_ids) for p in parts.prompts]}
    return PPOTrainer(
        model=model,
        reward_funcs=[trl_reward(part) for part in parts.reward.parts],
        args=ppo_config(config, parts.run.path, [part.weight for part in parts.reward.parts]),
        train_dataset=Dataset.from_dict(rows),
        processing_class=parts.loaded.tokenizer,
        peft_config=peft_config,
        open_checkpoint=parts.run.save_checkpoint,
    )


def adapter_config(parts: Parts) -> Any:
    """The PEFT config that puts a coefficient on every feature of the run's SAEs."""
    from saerl_cli.adapter import sparse_coeffs

    return sparse_coeffs(parts.loaded, parts.saes, splice=parts.config.adapter.splice.value)


def trl_reward(part: Any) -> Any:
    """A part of the reward as TRL calls it."""

    def function(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[float]:
        return part(prompts, completions, completion_ids)

    function.__name__ = part.name
    return function


def ppo_config(config: RlhfConfig, path: Path, weights: list[float]) -> Any:
    """Our settings as the trainer's."""
    import torch

    from saerl_cli.rl.trainer import PPOConfig

    algo, launch, on_cpu = config.algo, config.launch, config.launch.cpu or not torch.cuda.is_available()
    minibatch = algo.rollouts // (launch.num_processes * algo.minibatches)
    micro_batch = algo.micro_batch or minibatch
    steps_per_phase = algo.epochs * algo.minibatches
    return PPOConfig(
        output_dir=str(path / "checkpoints"),
        max_steps=algo.phases * steps_per_phase,
        save_strategy="steps",
        save_steps=config.checkpoint_every * steps_per_phase,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=minibatch // micro_batch,
        steps_per_generation=algo.minibatches * minibatch // micro_batch,
        num_iterations=algo.epochs,
        max_completion_length=algo.max_new_tokens,
        temperature=algo.temperature,
        beta=algo.kl_coef,
        kl_target=algo.kl_target,
        kl_horizon=algo.kl_horizon,
        gamma=algo.gamma,
        lam=algo.lam,
        epsilon=algo.cliprange,
        cliprange_value=algo.cliprange_value,
        vf_coef=algo.vf_coef,
        learning_rate=config.adapter.lr,
        value_learning_rate=algo.value_lr,
        weight_decay=config.adapter.weight_decay,
        max_grad_norm=algo.max_grad_norm,
        whiten_advantages=algo.whiten_advantages,
        missing_eos_penalty=algo.missing_eos_penalty,
        critic_warmup=algo.critic_warmup,
        lr_scheduler_type="linear" if algo.schedule is Schedule.linear else "constant",
        reward_weights=weights,
        seed=config.seed,
        bf16=launch.mixed_precision is Precision.bf16,
        fp16=launch.mixed_precision is Precision.fp16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and launch.num_processes > 1 else None,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
    )


def policy_of(trainer: "PPOTrainer", parts: Parts) -> "Policy":
    """The trainer's model as something to measure."""
    from saerl_cli.models import eos_token_ids
    from saerl_cli.rl.policy import Policy, plain

    model = trainer.accelerator.unwrap_model(trainer.model)
    reference = trainer.ref_model and trainer.accelerator.unwrap_model(trainer.ref_model)
    loaded = parts.loaded
    return plain(Policy(model, loaded.tokenizer, eos_token_ids(loaded), loaded.context_size, reference))


def record_inputs(parts: Parts, trainer: "PPOTrainer") -> None:
    """What went in, and what may move, into run.json; a resumed run must find the same.

    Raises:
        ValueError: the model or an SAE has changed since the run began.
    """
    from saerl_cli.sae.files import sae_sha256

    loaded, run = parts.loaded, parts.run
    inputs = {
        "model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256},
        "sae": {site: {"path": str(path), "sha256": sae_sha256(path)} for site, path in parts.saes.items()},
    }
    known = run.path / "run.json"
    before = read_json(known).get("inputs") if known.is_file() and run.checkpoints() else None
    if before not in (None, inputs):
        raise ValueError(f"{run.path} was begun with another model or other SAEs; take a new hydra.run.dir")
    run.update(inputs=inputs, trainable={name: p.numel() for name, p in trainer.trainable()})


# --- training --------------------------------------------------------------------------------------------------------


def first_look(parts: Parts, policy: "Policy") -> None:
    """Samples of the untouched model: step 0 of samples.jsonl, and a warning when the reward tells nothing apart."""
    from saerl_cli.rewards.score import spread
    from saerl_cli.rl.measure import cycled, draw

    if not parts.run.writes:
        return
    prompts = cycled(parts.prompts, min(parts.config.evaluation.samples, 256))
    samples = draw(policy, parts.reward, prompts, sampling(parts, "spread"), reference=True)
    spreads = {name: spread(values) for name, values in samples.scores.items()}
    parts.run.update(reward_spread=spreads)
    for name, seen in spreads.items():
        if seen["std"] == 0:
            say(
                f"WARNING: {name} is {seen['mean']:g} for all {len(prompts)} completions of the untouched model;"
                " PPO cannot learn from a score that tells nothing apart"
            )
        elif seen["coverage"] < 0.05:
            say(f"WARNING: {name} tells only {seen['coverage']:.1%} of {len(prompts)} completions from the rest")
    write_samples(parts, policy, 0)


def train(trainer: "PPOTrainer", parts: Parts, policy: "Policy", checkpoint: tuple[int, Path] | None) -> None:
    """All phases, from the checkpoint on when there is one."""
    config, run = parts.config, parts.run
    phases, every = config.algo.phases, config.evaluation.every

    def on_phase(metrics: dict[str, float]) -> None:
        phase, step = int(metrics["phase"]), trainer.state.global_step
        run.log(step, **metrics, **coefficient_statistics(trainer))
        if run.writes and (phase == phases or (every and phase % every == 0)):
            write_samples(parts, policy, step)
        note = f"phase {phase}/{phases}, reward {metrics['reward']:.3f}, KL {metrics['kl']:.2f}"
        update("PPO", phase / phases, note)

    trainer.on_phase = on_phase
    bars = task_bars(["PPO"]) if run.writes else no_bars()
    with bars as update:
        if checkpoint is None:
            trainer.train()
            return
        step, folder = checkpoint
        run.truncate(step)
        if step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=str(folder))
        else:
            trainer.load_finished(folder)


def no_bars() -> Any:
    """For processes that show nothing."""
    import contextlib

    return contextlib.nullcontext(lambda name, share, note: None)


def write_samples(parts: Parts, policy: "Policy", step: int) -> None:
    """Completions of the same held-out prompts, drawn with the same random numbers every time, into samples.jsonl."""
    from saerl_cli.rewards.score import TOTAL
    from saerl_cli.rl.measure import cycled, draw

    was_training = policy.model.training
    policy.model.eval()
    samples = draw(policy, parts.reward, cycled(parts.heldout_prompts, SHOWN_SAMPLES), sampling(parts, "shown"))
    policy.model.train(was_training)
    rows = zip(samples.prompts, samples.texts, samples.scores[TOTAL], samples.kl, strict=True)
    for prompt, text, reward, kl in rows:
        parts.run.sample(step, prompt.text, text, reward, kl)


def sampling(parts: Parts, purpose: str) -> Any:
    """Settings of samples drawn beside training, each purpose with a seed of its own."""
    from saerl_cli.rl.measure import Sampling
    from saerl_cli.rl.trainer import derived_seed

    config = parts.config
    seed = derived_seed(config.seed, ["shown", "spread", "summary"].index(purpose), 1_000_003)
    return Sampling(config.algo.max_new_tokens, config.algo.temperature, config.evaluation.batch_size, seed)


def deltas(model: Any) -> dict[str, "Tensor"]:
    """Module path -> delta [d_sae] of the policy's adapter; empty without one."""
    from saerl_cli.adapter import SparseCoeffLayer

    return {
        name.removeprefix("base_model.model."): module.sparse_coeffs_delta["default"].weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, SparseCoeffLayer)
    }


def coefficient_statistics(trainer: "PPOTrainer") -> dict[str, float]:
    """How far the coefficients are from untouched."""
    import torch

    found = deltas(trainer.accelerator.unwrap_model(trainer.model))
    if not found:
        return {}
    delta = torch.cat(list(found.values()))
    return {
        "changed": int((delta.abs() > CHANGED).sum()),
        "delta_max": delta.abs().max().item(),
        "delta_norm": delta.norm().item(),
    }


# --- proof of restriction --------------------------------------------------------------------------------------------


def frozen_hashes(trainer: "PPOTrainer") -> dict[str, str]:
    """Name -> hash of every tensor that training must leave alone: base, SAEs, reference."""
    from saerl_cli.models import tensors_sha256

    moving = {name for name, _ in trainer.trainable()}
    return {name: tensors_sha256([("", t)]) for name, t in all_tensors(trainer) if name not in moving}


def all_tensors(trainer: "PPOTrainer") -> "Iterable[tuple[str, Tensor]]":
    """Parameters and buffers of the policy and of its frozen copy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    yield from model.named_parameters()
    yield from model.named_buffers()
    if trainer.ref_model is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            yield f"reference.{name}", tensor


def refuse_moved(before: dict[str, str], after: dict[str, str], run: Run) -> None:
    """Record whether everything frozen is bit-identical; `ValueError` naming the first tensor that is not."""
    import hashlib

    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    digest = hashlib.sha256("".join(f"{name} {value}\n" for name, value in sorted(after.items())).encode())
    run.update(frozen_unchanged=not moved, frozen_sha256=digest.hexdigest(), frozen_tensors=len(after))
    if moved:
        raise ValueError(
            f"{len(moved)} of {len(before)} frozen tensors moved during training, the first is {moved[0]};"
            " the run proves nothing and nothing is exported"
        )


# --- the end ---------------------------------------------------------------------------------------------------------


def save_policy(trainer: "PPOTrainer", parts: Parts) -> None:
    """RUN/adapter (coefficients only, a PEFT folder) or RUN/model (weights and tokenizer), whole or absent."""
    if not parts.run.writes:
        return
    from saerl_cli.rl.value import without_value_head

    model = trainer.accelerator.unwrap_model(trainer.model)
    if parts.config.adapter.kind is AdapterKind.full:
        with atomic_folder(parts.run.path / "model", replace=True) as folder:
            model.save_pretrained(folder, state_dict=without_value_head(model.state_dict()))
            parts.loaded.tokenizer.save_pretrained(folder)
        return
    with atomic_folder(parts.run.path / "adapter", replace=True) as folder:
        model.save_pretrained(folder, selected_adapters=["default"])


def summarise(parts: Parts, trainer: "PPOTrainer", policy: "Policy") -> dict[str, Any]:
    """The numbers of summary.json."""
    from saerl_cli.rl.measure import cycled, measure
    from saerl_cli.rl.value import is_value_parameter

    config = parts.config
    policy.model.eval()
    numbers, _, _ = measure(
        policy,
        parts.reward,
        cycled(parts.heldout_prompts, config.evaluation.samples),
        parts.heldout_rows,
        sampling(parts, "summary"),
        attributes=config.model.kind is ModelKind.planted,
    )
    sizes = {name: p.numel() for name, p in trainer.trainable()}
    value = sum(size for name, size in sizes.items() if is_value_parameter(name))
    episodes = config.algo.phases * config.algo.rollouts
    return {
        "adapter": config.adapter.kind.value,
        "trainable_parameters": sum(sizes.values()) - value,
        "value_parameters": value,
        **numbers,
        **curse_words(numbers),
        "phases": config.algo.phases,
        "steps": trainer.args.max_steps,
        "samples": episodes,
        "seconds": trainer.seconds,
        "samples_per_second": episodes / max(trainer.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
        "frozen_unchanged": True,
        **coefficient_statistics(trainer),
        "top_features": top_features(parts, policy),
    }


def curse_words(numbers: dict[str, Any]) -> dict[str, float]:
    """In the embedded world: curse words per completion and as a share of words, and the part of the share removed."""
    if "attributes_before" not in numbers:
        return {}
    found = {}
    for when in ("before", "after"):
        cursing = numbers[f"attributes_{when}"]["cursing"]
        found |= {f"curse_words_{when}": cursing["per_completion"], f"curse_share_{when}": cursing["share"]}
    if found["curse_share_before"] > 0:
        found["curse_removed"] = 1 - found["curse_share_after"] / found["curse_share_before"]
    return found


def top_features(parts: Parts, policy: "Policy") -> list[dict[str, Any]]:
    """The most moved features, each labelled with the token it fires most on in held-out text; "" if it never does."""
    from saerl_cli.activations import capture, special_ids, text_mask
    from saerl_cli.models import resolve_sites
    from saerl_cli.sae.describe import top_tokens
    from saerl_cli.sae.files import load_sae

    found = deltas(policy.model)
    if not found:
        return []
    loaded, rows = parts.loaded, parts.heldout_rows[:LABEL_ROWS]
    sites = {site.module: site for site in resolve_sites(list(parts.saes), loaded.model.config)}
    moved = [
        (module, int(feature), float(delta[feature]))
        for module, delta in found.items()
        for feature in delta.abs().topk(min(TOP_FEATURES, len(delta))).indices
        if delta[feature] != 0
    ]
    moved = sorted(moved, key=lambda entry: -abs(entry[2]))[:TOP_FEATURES]
    with policy.reference():
        base = policy.model.get_base_model()
        activations = capture(base, list(sites.values()), rows.to(base.device))
    text = text_mask(rows, special_ids(loaded.tokenizer))
    labels: dict[tuple[str, int], str] = {}
    for module, site in sites.items():
        features = [feature for name, feature, _ in moved if name == module]
        sae = load_sae(parts.saes[site.name])
        ids = top_tokens(sae, activations[site.name][text.to(base.device)].cpu(), rows[text], 1, features)
        labels |= {
            (module, feature): loaded.tokenizer.decode(best).strip()
            for feature, best in zip(features, ids, strict=True)
        }
    return [
        {"site": sites[module].name, "feature": feature, "delta": delta, "label": labels[module, feature]}
        for module, feature, delta in moved
    ]


def peak_memory() -> int:
    """Most memory this process has held, in bytes: the GPU's where one is used, else resident memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome(numbers: dict[str, Any]) -> str:
    """One line for the person who waited."""
    line = (
        f"reward {numbers['reward_before']:.3f} -> {numbers['reward_after']:.3f} (se {numbers['reward_se']:.3f}),"
        f" KL {numbers['kl']:.2f} nats, held-out loss {numbers['nll_heldout_before']:.3f} ->"
        f" {numbers['nll_heldout_after']:.3f}, {numbers['trainable_parameters']:,} trained parameters"
    )
    if "curse_removed" in numbers:
        line += f", {numbers['curse_removed']:.0%} of the curse words gone"
    return line
