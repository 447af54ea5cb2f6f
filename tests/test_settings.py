"""A setting says once to what it belongs: everywhere else it is refused, and where it belongs it does something."""

from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch

from saerl_cli.config.groups import DataConfig
from saerl_cli.config.reward import Match, RewardPart
from saerl_cli.config.sae import Architecture, Controller, DecoderNorm, Penalty, SaeConfig
from saerl_cli.config.settings import applies, belongs, check_settings, default_of, filled, setting, suited, within
from saerl_cli.run.help import described
from saerl_cli.run.jobs import JOBS, resolve

EVERYWHERE = {
    "AdapterConfig": "lr weight_decay",
    "AlgoConfig": "phases micro_batch max_new_tokens temperature max_grad_norm schedule warmup"
    " activation_checkpointing",
    "DataConfig": "max_documents context_size",
    "ModelConfig": "dtype planted",
    "PairsConfig": "count heldout",
    "PromptConfig": "count",
    "RewardPart": "weight",
    "SaeConfig": "expansion d_sae init_from dead_after_tokens resample scale centre decoder_norm decoder_start tokens"
    " batch_size optimizer lr lr_at_width lr_warmup lr_shape lr_decay beta1 max_grad_norm encoder_dtype seed",
}
"""Dataclasses with kinds -> their settings that do something with every kind."""


def reachable(schema) -> list[type]:
    """A dataclass and those inside."""
    hints = [part for kind in get_type_hints(schema).values() for part in (kind, *get_args(kind))]
    return [schema, *(found for kind in hints if is_dataclass(kind) for found in reachable(kind))]


SCHEMAS = sorted({c for job in JOBS.values() for c in reachable(resolve(job.schema))}, key=lambda c: c.__name__)
CONDITIONAL = [(schema, f) for schema in SCHEMAS for f in fields(schema) if f.metadata.get("only")]


def other(schema, f):
    """Some legal value that is not the default."""
    default, bounds = default_of(f), f.metadata.get("bounds") or ">= -100"
    if is_dataclass(default):
        free = next(one for one in fields(default) if not one.metadata.get("only") and one.name != "kind")
        return replace(default, **{free.name: other(type(default), free)})
    hint = get_type_hints(schema)[f.name]
    kind = next(part for part in (*get_args(hint), hint) if part is not type(None))
    if isinstance(default, Enum):
        return next(member for member in type(default) if member is not default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float) or (default is None and kind in (int, float)):
        numbers = (default if default is not None else 0, 1, 2, 0.3, 1.5, 0.45)
        return next(n for n in (*[numbers[0] + 1], *numbers[1:]) if n != default and within(n, bounds))
    if default in ({}, None):
        return {"a": 1.0} if default == {} else "x" if kind is str else ["x"]
    return "{prompt}." if isinstance(default, str) else [0.5, 1.0]


def configured(schema, **values):
    """An instance at its defaults but for some values and what is needed, not checked yet."""
    config = object.__new__(schema)
    for f in fields(schema):
        setattr(config, f.name, values.get(f.name, default_of(f)))
    for f in fields(schema):
        if f.metadata.get("write") and applies(config, f.name) and f.name not in values:
            setattr(config, f.name, other(schema, f))
    return config


def refusal(config) -> str:
    try:
        check_settings(config)
    except ValueError as error:
        return str(error)
    return ""


def surroundings(schema, f):
    """Every combination of the settings that a setting asks for."""
    by_name = {one.name: one for one in fields(schema)}
    keys = {key for case in f.metadata["only"] for key in case}
    keys |= {k for key in keys for case in by_name[key].metadata.get("only", ()) for k in case}
    values = []
    for key in sorted(keys):
        default = default_of(by_name[key])
        if isinstance(default, Enum):
            values.append(tuple(type(default)))
        elif key == "kind":  # a name, of which others are used too
            values.append({default, *(case["kind"] for case in f.metadata["only"] if isinstance(case["kind"], str))})
            values[-1] |= {k for case in f.metadata["only"] if not isinstance(case["kind"], str) for k in case["kind"]}
        else:
            values.append((default, other(schema, by_name[key])))
    return [dict(zip(sorted(keys), chosen, strict=True)) for chosen in product(*values)]


@pytest.mark.parametrize(("schema", "f"), CONDITIONAL, ids=lambda part: getattr(part, "name", None) or part.__name__)
def test_a_setting_is_accepted_exactly_where_it_belongs(schema, f):
    met = set()
    for around in surroundings(schema, f):
        plain = configured(schema, **around)
        assert f"{f.name} does nothing" not in refusal(plain), "a setting at its default is never refused"
        if "does nothing" in refusal(plain):
            continue  # what surrounds it is refused already
        given = configured(schema, **around, **{f.name: other(schema, f)})
        met.add(applies(plain, f.name))
        assert (f"{f.name} does nothing" in refusal(given)) is not applies(plain, f.name), around
    assert met == {True, False}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_setting_says_where_it_belongs(name):
    schema = next(schema for schema in SCHEMAS if schema.__name__ == name)
    unsaid = [f.name for f in fields(schema) if not f.metadata.get("only")]
    assert sorted(unsaid[1:]) == sorted(EVERYWHERE[name].split()), "say it at the field, or here that it is for all"


@pytest.mark.parametrize("command", JOBS)
def test_the_help_says_where_settings_belong_and_what_they_may_be(command):
    text = " ".join(" ".join(described(resolve(JOBS[command].schema))).split())
    inside = reachable(resolve(JOBS[command].schema))
    assert text.count(" Only with ") >= sum(bool(belongs(f)) for schema in inside for f in fields(schema))
    if command == "rlhf":
        assert "algo.gamma=1.0 (in [0, 1]): Discount. Only with algo=ppo. " in text
        assert "algo.kl_gain=3.0 (> 0)" in text and "Only with algo.kl_target. " in text


TOPK, RELU, JUMPRELU = Architecture.topk, Architecture.relu, Architecture.jumprelu


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        (TOPK, {"l1": 2.0}),
        (TOPK, {"bandwidth": 1.0}),
        (TOPK, {"penalty": Penalty.step}),
        (TOPK, {"auxk_latents": 4}),
        (RELU, {"k": 4}),
        (RELU, {"prefixes": [0.5, 1.0]}),
        (RELU, {"theta": 0.2}),
        (JUMPRELU, {"l1": 2.0}),
        (JUMPRELU, {"penalty": Penalty.step, "tanh_scale": 2.0}),
    ],
)
def test_settings_of_another_architecture(architecture, values):
    with pytest.raises(ValueError, match=f"sae.{list(values)[-1]} does nothing with"):
        SaeConfig(architecture=architecture, **values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("vader", {"attribute": "cursing"}),
        ("verifier", {"pattern": "x"}),
        ("python", {"function": "a:b", "words": {"a": 1.0}}),
        ("verifier", {"match": Match.start, "tolerance": 0.1}),
        ("count", {"pattern": "x", "shape": 1.0}),
    ],
)
def test_settings_of_another_reward(kind, values):
    with pytest.raises(ValueError, match=f"reward.parts.NAME.{list(values)[-1]} does nothing with"):
        RewardPart(kind=kind, **values)


def test_what_stands_for_an_empty_setting():
    @dataclass
    class Settings:
        kind: Architecture = TOPK
        number: int | None = setting(None, ">= 1", kind={TOPK: 3, RELU: 5})

    assert [filled(Settings(kind), "number") for kind in (TOPK, RELU, JUMPRELU)] == [3, 5, None]
    assert filled(Settings(RELU, 7), "number") == 7
    assert filled(DataConfig(), "context_size") is None


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (">= 1", (1, 2), (0.9,)),
        ("> 0", (0.1,), (0, -1)),
        ("in [0, 1)", (0, 0.5), (1, -0.1)),
        ("in (0, 0.5]", (0.5,), (0,)),
    ],
)
def test_bounds(bounds, inside, outside):
    assert all(within(n, bounds) for n in inside) and not any(within(n, bounds) for n in outside)


# --- what belongs does something -------------------------------------------------------------------------------------

UNTRIED = ("architecture", "init_from", "kernel", "d_sae")
"""A file is needed; equal to rounding; the other of two."""


def active(architecture: Architecture) -> SaeConfig:
    """Settings with which as many others as can do something."""
    config = SaeConfig(
        architecture=architecture, expansion=4, tokens=16 * 24, batch_size=16, dead_after_tokens=32, lr=0.02,
        resample_every_tokens=64, dead_below_rate=0.01, lr_warmup=0.2, lr_at_width=40, max_grad_norm=0.1,
    )  # fmt: skip
    values = {"k": 3} if applies(config, "k") else {}
    if applies(config, "auxk"):
        values |= {"auxk": 0.5, "auxk_latents": 3}
    if applies(config, "controller"):
        values |= {"controller": Controller.auto, "target_l0": 3.0, "control_every": 2, "control_factor": 1.9}
    if architecture is JUMPRELU:
        values |= {"penalty": Penalty.tanh, "preact": 0.1, "theta": 0.3, "l0": 0.2}
    if architecture is RELU:
        values |= {"decoder_norm": DecoderNorm.unit, "l1": 1.0}
    return replace(config, **values)


CHANGED = {
    "prefixes": [0.5, 1.0], "expansion": 5, "control_after_tokens": 200, "control_every": 5, "control_factor": 1.2,
    "control_band": 1000.0, "dead_below_rate": 0.4, "auxk_latents": 2, "resample_until": 0.2, "tokens": 16 * 30,
    "dead_after_tokens": 10_000, "resample_every_tokens": 160, "batch_size": 32, "target_l0": 6.0, "preact": 0.0,
    "beta2": 0.5, "eps": 0.01, "lr_at_width": 80, "controller": Controller.fixed, "decoder_start": 0.5,
    "decoder_norm": DecoderNorm.renormalised,
}  # fmt: skip


def trained(config: SaeConfig) -> torch.Tensor:
    from saerl_cli.sae.train import SaeTrainer

    trainer = SaeTrainer(10, config)
    for step in range(config.steps()):
        x = torch.randn(config.batch_size, 10, generator=torch.Generator().manual_seed(step)).relu() - 0.3
        trainer.step(x)
    return torch.cat([p.flatten() for p in trainer.finish().parameters()])


@pytest.mark.parametrize("architecture", Architecture)
def test_a_setting_that_belongs_changes_what_is_trained(architecture):
    config = active(architecture)
    usual, idle = trained(config), []
    for f in fields(SaeConfig):
        if applies(config, f.name) and f.name not in UNTRIED:
            changed = vars(config) | {f.name: CHANGED.get(f.name, other(SaeConfig, f))}
            result = trained(suited(SaeConfig, changed))
            if result.shape == usual.shape and torch.equal(result, usual):
                idle.append(f.name)
    assert not idle
