"""What other libraries say, asked in their environment: `PEERS_PYTHON tests/loss_peers.py defaults|losses [IN OUT]`.

`defaults` prints their default settings under saerl's names, by preset. `losses` reads parameters and data from a
safetensors file and writes their losses and gradients to another, a feature a row.
"""

import inspect
import json
import sys
from dataclasses import fields

import torch
from safetensors.torch import load_file, save_file

# --- defaults --------------------------------------------------------------------------------------------------------


def default(owner, name):
    """Default of a dataclass field or of an argument."""
    if isinstance(owner, type) and hasattr(owner, "__dataclass_fields__"):
        return {f.name: f.default for f in fields(owner)}[name]
    return inspect.signature(owner).parameters[name].default


def saelens_defaults():
    from sae_lens import LanguageModelSAERunnerConfig as Runner
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAEConfig as Jump
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig as Standard
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig as TopK

    batch = default(Runner, "train_batch_size_tokens")
    shared = {
        "lr": default(Runner, "lr"),
        "beta1": default(Runner, "adam_beta1"),
        "beta2": default(Runner, "adam_beta2"),
        "batch_size": batch,
        "lr_warmup": default(Runner, "lr_warm_up_steps"),
        "lr_decay": default(Runner, "lr_decay_steps"),
        "dead_after_tokens": default(Runner, "dead_feature_window") * batch,
        "decoder_start": default(TopK, "decoder_init_norm"),
    }
    return {
        "saelens-topk": shared | {"k": default(TopK, "k"), "auxk": default(TopK, "aux_loss_coefficient")},
        "saelens-standard": shared
        | {"l1": default(Standard, "l1_coefficient"), "l1_warmup": default(Standard, "l1_warm_up_steps")},
        "saelens-jumprelu": shared
        | {
            "l0": default(Jump, "l0_coefficient"),
            "l1_warmup": default(Jump, "l0_warm_up_steps"),
            "penalty": default(Jump, "jumprelu_sparsity_loss_mode"),
            "theta": default(Jump, "jumprelu_init_threshold"),
            "bandwidth": default(Jump, "jumprelu_bandwidth"),
            "ste_to_input": default(Jump, "jumprelu_ste_to_input"),
            "preact": default(Jump, "pre_act_loss_coefficient") or 0.0,
        },
    }


def dl_trainer(name, width=64, **more):
    from importlib import import_module

    module, kind = name.split(".")
    kind = getattr(import_module(f"dictionary_learning.trainers.{module}"), kind)
    return kind(steps=10_000, activation_dim=8, dict_size=width, layer=0, lm_name="x", device="cpu", **more)


def dl_defaults():
    kinds = {
        "dl-topk": ("top_k.TopKTrainer", {"k": 4}),
        "dl-batchtopk": ("batch_top_k.BatchTopKTrainer", {"k": 4}),
        "dl-matryoshka": ("matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", {"k": 4, "group_fractions": [0.5, 0.5]}),
        "dl-jumprelu": ("jumprelu.JumpReluTrainer", {}),
        "dl-gated": ("gdm.GatedSAETrainer", {}),
        "dl-standard": ("standard.StandardTrainer", {}),
    }
    found = {}
    for name, (kind, more) in kinds.items():
        trainer = dl_trainer(kind, **more)
        group = trainer.optimizer.param_groups[0]
        row = {
            "lr_at_64_features": trainer.lr,
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "lr_warmup": trainer.warmup_steps,
            "lr_decay": 0 if trainer.decay_start is None else None,
        }
        if hasattr(trainer, "dead_feature_threshold"):
            row["dead_after_tokens"] = trainer.dead_feature_threshold
        if hasattr(trainer, "l1_penalty"):
            row |= {"l1": trainer.l1_penalty, "l1_warmup": default(type(trainer), "sparsity_warmup_steps")}
        found[name] = row
    for name in ("dl-topk", "dl-batchtopk"):
        found[name]["auxk"] = dl_trainer(kinds[name][0], **kinds[name][1]).auxk_alpha
    jump = dl_trainer("jumprelu.JumpReluTrainer")
    found["dl-jumprelu"] |= {
        "l0": jump.sparsity_coefficient,
        "target_l0": jump.target_l0,
        "bandwidth": jump.bandwidth,
        "theta": jump.ae.threshold[0].item(),
        "l1_warmup": default(type(jump), "sparsity_warmup_steps"),
    }
    return found


def sparsify_defaults():
    from sparsify.__main__ import RunConfig
    from sparsify.config import SparseCoderConfig as Coder

    adam = {
        "expansion": default(Coder, "expansion_factor"),
        "k": default(Coder, "k"),
        "auxk": default(RunConfig, "auxk_alpha"),
        "dead_after_tokens": default(RunConfig, "dead_feature_threshold"),
        "batch_size": default(RunConfig, "batch_size") * default(RunConfig, "ctx_len"),
    }
    return {
        "sparsify-topk": adam | {"lr_warmup": default(RunConfig, "lr_warmup_steps")},
        "sparsify-signum": adam | {"optimizer": default(RunConfig, "optimizer")},
    }


# --- losses ----------------------------------------------------------------------------------------------------------


def saelens_losses(t):
    """Losses and gradients of SAELens; names are those of `test_sae_oracles.PEERS`."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    d_sae, d_in = t["encoder"].shape
    size = {"d_in": d_in, "d_sae": d_sae}
    topk = {"k": 4, "aux_loss_coefficient": 0.7}
    jump = {"jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.1}
    cases = {
        "relu": (StandardTrainingSAE, StandardTrainingSAEConfig(**size)),
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig(**size, **topk)),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(**size, **topk)),
        "matryoshka": (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig(**size, **topk, matryoshka_widths=[d_sae // 4, d_sae // 2, d_sae]),
        ),
        "gated": (GatedTrainingSAE, GatedTrainingSAEConfig(**size)),
    }
    for mode in ("step", "tanh", "quadratic"):
        for to_input in (False, True):
            more = {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": to_input, "target_l0": 5.0}
            config = JumpReLUTrainingSAEConfig(**size, **jump, **more, pre_act_loss_coefficient=0.2)
            cases[f"jumprelu-{mode}-{to_input}"] = (JumpReLUTrainingSAE, config)
    out = {}
    for name, (kind, config) in cases.items():
        sae = kind(config)
        ours = {"W_enc": t["encoder"].T, "W_dec": t["decoder"], "b_dec": t["b_dec"], "b_enc": t["b_enc"]}
        if name == "gated":
            ours |= {"b_gate": ours.pop("b_enc"), "r_mag": t["r_mag"], "b_mag": t["b_mag"]}
        if name.startswith("jumprelu"):
            ours["threshold"] = t["threshold"]
        parameters = dict(sae.named_parameters())
        assert parameters.keys() == ours.keys(), (name, parameters.keys())
        for key, value in ours.items():
            parameters[key].data.copy_(value)
        step = TrainStepInput(t["x"], {"l1": 0.5, "l0": 0.3}, t["dead"].bool(), 0, False)
        output = sae.training_forward_pass(step)
        output.loss.backward()
        out[f"saelens-{name}.loss"] = output.loss.detach()
        for key, parameter in parameters.items():
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            out[f"saelens-{name}.{key}"] = grad.T if key == "W_enc" else grad
    return out


def dl_losses(t):
    """Losses and gradients of dictionary_learning, whose decoder rows have norm 1."""
    d_sae, d_in = t["encoder"].shape
    unit = t["decoder"] / t["decoder"].norm(dim=1, keepdim=True)
    linear = {"encoder.weight": t["encoder"], "decoder.weight": unit.T}
    plain = linear | {"encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
    turned = {"W_enc": t["encoder"].T, "W_dec": unit, "b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    groups = [0.25, 0.25, 0.5]
    cases = {
        "relu": (
            ("standard.StandardTrainer", {"l1_penalty": 0.5}),
            linear | {"encoder.bias": t["b_enc"], "bias": t["b_dec"]},
        ),
        "topk": (("top_k.TopKTrainer", {"k": 4, "auxk_alpha": 0.7}), plain),
        "batchtopk": (("batch_top_k.BatchTopKTrainer", {"k": 4, "auxk_alpha": 0.7}), plain),
        "matryoshka": (
            (
                "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
                {"k": 4, "auxk_alpha": 0.7, "group_fractions": groups},
            ),
            turned,
        ),
        "gated": (
            ("gdm.GatedSAETrainer", {"l1_penalty": 0.5}),
            linear | {"gate_bias": t["b_enc"], "mag_bias": t["b_mag"], "r_mag": t["r_mag"], "decoder_bias": t["b_dec"]},
        ),
        "jumprelu": (
            ("jumprelu.JumpReluTrainer", {"sparsity_penalty": 0.3, "target_l0": 5.0, "bandwidth": 0.5}),
            turned | {"threshold": t["threshold"]},
        ),
    }
    out = {}
    for name, ((kind, more), ours) in cases.items():
        trainer = dl_trainer(kind, width=d_sae, **more) if d_in == 8 else None
        parameters = dict(trainer.ae.named_parameters())
        assert parameters.keys() == ours.keys(), (name, parameters.keys())
        for key, value in ours.items():
            parameters[key].data.copy_(value)
        if hasattr(trainer, "num_tokens_since_fired"):
            trainer.num_tokens_since_fired[t["dead"].bool()] = 20_000_000
        loss = trainer.loss(t["x"], step=9_000)
        loss.backward()
        out[f"dl-{name}.loss"] = loss.detach()
        for key, parameter in parameters.items():
            turn = key in ("W_enc", "decoder.weight")
            out[f"dl-{name}.{key}"] = parameter.grad.T if turn else parameter.grad
    return out


def main(mode, *paths):
    """What the module docstring says."""
    if mode == "defaults":
        print(json.dumps(saelens_defaults() | dl_defaults() | sparsify_defaults()))
    else:
        tensors = load_file(paths[0])
        found = saelens_losses(tensors) | dl_losses(tensors)
        save_file({name: value.contiguous().clone() for name, value in found.items()}, paths[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
