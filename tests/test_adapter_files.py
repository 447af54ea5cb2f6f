"""Adapter folders: what is in them, how their SAEs are found, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_fixtures import FEATURES, coefficients_on, random_sae, randomise, sae_folder, tiny_llama, tiny_neox, tokens
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from saerl_cli.adapter import (
    SparseCoeffConfig,
    check_adapter,
    deltas,
    load_adapter,
    read_deltas,
    save_adapter,
    site_layers,
    sparse_coeffs,
)
from saerl_cli.models import folder_sha256
from saerl_cli.sae.files import save_sae

ROOT = Path(__file__).parents[1]
KEY = "base_model.model.gpt_neox.layers.{}.mlp.sparse_coeffs_delta.weight"
SITES = ("mlp_out.1", "mlp_out.2")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with two SAEs in `sae/` and an adapter on them in `adapter/`."""
    policy = coefficients_on(tiny_neox(), tmp_path / "run" / "sae", SITES, seed=1)
    return save_adapter(policy, tmp_path / "run" / "adapter")


def edit(folder: Path, **fields) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error_preserving", "pre_activation", "reconstruct"])
def test_the_file_holds_exactly_the_coefficients(tmp_path, kind):
    policy = coefficients_on(tiny_neox(), tmp_path, SITES, kind, seed=1)
    policy.add_adapter("ref", policy.peft_config["default"])
    save_adapter(policy, tmp_path / "ours")
    policy.save_pretrained(tmp_path / "peft", selected_adapters=["default"])
    keys = {KEY.format(layer) for layer in (1, 2)}
    if kind == "pre_activation":
        keys |= {key.replace("delta", "bias") for key in keys}
    for folder in (tmp_path / "ours", tmp_path / "peft"):
        state = load_file(folder / WEIGHTS)
        assert set(state) == keys
        assert all(value.shape == (FEATURES,) and value.dtype == torch.float32 for value in state.values())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_the_config_names_saes_by_hash_and_relative_path(saved):
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "SPARSE_COEFFS"
    assert config["sites"] == {"gpt_neox.layers.1.mlp": "mlp_out.1", "gpt_neox.layers.2.mlp": "mlp_out.2"}
    assert config["relative_saes"]["gpt_neox.layers.1.mlp"] == "../sae/mlp_out.1"
    assert all(len(value) == 64 for value in config["sae_sha256"].values())
    assert config["target_modules"] == sorted(config["saes"])
    assert config["inference_mode"] is True


def test_equal_adapters_are_equal_files(saved, tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path / "run" / "sae", SITES, seed=1)
    again = save_adapter(policy, tmp_path / "run" / "again")
    assert (again / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (again / CONFIG).read_bytes() == (saved / CONFIG).read_bytes()


@pytest.mark.parametrize("kind", ["error_preserving", "pre_activation", "reconstruct"])
@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
def test_saved_and_loaded_is_the_same_policy_to_the_bit(tmp_path, make, kind):
    policy = coefficients_on(make(), tmp_path, (*SITES, "resid_post.2"), kind, k=5, seed=1)
    want = logits(policy)
    for name, write in {"ours": save_adapter, "peft": lambda model, folder: model.save_pretrained(folder)}.items():
        write(policy, tmp_path / name)
        back = PeftModel.from_pretrained(make(), str(tmp_path / name))  # warnings would fail the test
        assert torch.equal(logits(back.eval()), want)
        assert not any(p.requires_grad for p in back.parameters())
    again = load_adapter(make(), tmp_path / "ours", is_trainable=True)
    assert torch.equal(logits(again), want)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, _ in again.named_parameters() if "sparse_coeffs_" in name
    }


def test_a_value_head_stays_out_of_the_policy(tmp_path):
    def with_head() -> nn.Module:
        model = tiny_neox()
        model.v_head = nn.Linear(16, 1)
        return model

    policy = coefficients_on(with_head(), tmp_path, modules_to_save=["v_head"], seed=1)
    policy.base_model.model.v_head.modules_to_save["default"].bias.data.fill_(7.0)
    want = logits(policy)
    policy.save_pretrained(tmp_path / "checkpoint")
    back = PeftModel.from_pretrained(with_head(), str(tmp_path / "checkpoint"))
    assert back.base_model.model.v_head.modules_to_save["default"].bias.item() == 7
    save_adapter(policy, tmp_path / "adapter")
    assert policy.peft_config["default"].modules_to_save == ["v_head"]
    assert list(load_file(tmp_path / "adapter" / WEIGHTS)) == [KEY.format(1)]
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["modules_to_save"] is None
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_neox(), str(tmp_path / "adapter"))), want)


def test_another_adapter_than_the_default(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, seed=1)
    policy.add_adapter("other", policy.peft_config["default"])
    randomise(policy, seed=8, adapter="other")
    save_adapter(policy, tmp_path / "adapter", "other")
    assert torch.equal(read_deltas(tmp_path / "adapter")["mlp_out.1"], deltas(policy, "other")["mlp_out.1"])


def test_a_second_adapter_is_loaded_beside_the_first(saved, tmp_path):
    first = coefficients_on(tiny_neox(), saved.parent / "sae", SITES, seed=5)
    want = logits(load_adapter(tiny_neox(), saved))
    before = logits(first)
    first.load_adapter(str(saved), "second")
    assert torch.equal(logits(first), before)
    first.set_adapter("second")
    assert torch.equal(logits(first), want)


def test_an_existing_folder_is_replaced_whole(saved):
    (saved / "old.txt").write_text("old")
    save_adapter(load_adapter(tiny_neox(), saved), saved)
    assert not (saved / "old.txt").exists()
    check_adapter(saved)


def test_deltas_are_read_without_model_and_saes(saved):
    want = deltas(load_adapter(tiny_neox(), saved))
    shutil.rmtree(saved.parent / "sae")
    found = read_deltas(saved)
    assert set(found) == set(SITES)
    assert all(torch.equal(found[site], want[site]) for site in SITES)


def test_low_memory_loading_is_refused_for_the_first_adapter(saved):
    refuses("leave out low_cpu_mem_usage", PeftModel.from_pretrained, tiny_neox(), str(saved), low_cpu_mem_usage=True)


def test_low_memory_loading_of_a_second_adapter_keeps_float32(tmp_path):
    module = "gpt_neox.layers.1.mlp.dense_4h_to_h"  # has a weight, to whose dtype PEFT would cast
    model = tiny_neox(torch.bfloat16)
    policy = get_peft_model(model, sparse_coeffs(model, {module: sae_folder(tmp_path, "mlp_out.1")})).eval()
    randomise(policy)
    save_adapter(policy, tmp_path / "adapter")
    policy.load_adapter(str(tmp_path / "adapter"), "second", low_cpu_mem_usage=True)
    assert torch.equal(deltas(policy, "second")[module], deltas(policy)[module])
    want = logits(policy)
    policy.set_adapter("second")
    assert torch.equal(logits(policy), want)


# --- through PEFT alone ----------------------------------------------------------------------------------------------


def run_python(code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_plain_peft_in_another_process_and_directory(saved, tmp_path):
    policy = load_adapter(tiny_neox(), saved)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    base = tmp_path / "base"
    tiny_neox().save_pretrained(base)
    moved = shutil.move(saved.parent, tmp_path / "moved")  # the run moves with its SAEs
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "try:\n    PeftModel.from_pretrained(base, sys.argv[2])\n"
        "except KeyError as error:\n    print('unknown', error)\n"
        "import saerl_cli.adapter\n"
        "policy = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "ids = torch.tensor(eval(sys.argv[3]))\n"
        "torch.save(policy(ids).logits.detach(), 'logits.pt')\n"
    )
    ran = run_python(
        code, elsewhere, str(base), os.path.relpath(Path(moved) / "adapter", elsewhere), str(tokens().tolist())
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("unknown 'SPARSE_COEFFS'")  # the reason for the README in the folder
    assert torch.equal(torch.load(elsewhere / "logits.pt", weights_only=True), logits(policy))


def test_peft_finds_our_config_and_our_model_class(saved, tmp_path):
    assert type(PeftConfig.from_pretrained(str(saved))) is SparseCoeffConfig
    base = tmp_path / "base"
    tiny_neox().save_pretrained(base)
    edit(saved, base_model_name_or_path=str(base))
    auto = AutoPeftModelForCausalLM.from_pretrained(str(saved)).eval()
    assert torch.equal(logits(auto), logits(load_adapter(tiny_neox(), saved)))


# --- finding SAEs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../sae", "sae"])
def test_saes_beside_the_adapter_are_found(saved, tmp_path, place):
    want = logits(load_adapter(tiny_neox(), saved))
    target = tmp_path / "far" / "away"
    shutil.copytree(saved, target)
    shutil.move(saved.parent / "sae", Path(os.path.normpath(target / place)))
    shutil.rmtree(saved.parent)
    edit(target, relative_saes=None)
    assert torch.equal(logits(load_adapter(tiny_neox(), target)), want)


def test_an_sae_that_moved_alone_is_named_with_the_places_looked_at(saved, tmp_path):
    shutil.move(saved.parent / "sae", tmp_path / "lost")
    for load in (check_adapter, lambda folder: PeftModel.from_pretrained(tiny_neox(), str(folder))):
        with pytest.raises(
            ValueError, match=r"no SAE for mlp_out\.1; put the folder of its SAE in one of these"
        ) as refused:
            load(saved)
        message = str(refused.value)
        assert "\n" not in message
        assert str(saved.parent / "sae" / "mlp_out.1") in message
        assert str(saved / "sae" / "mlp_out.1") in message


def test_the_right_sae_is_taken_where_another_one_took_its_place(saved, tmp_path):
    want = logits(load_adapter(tiny_neox(), saved))
    moved = tmp_path / "moved"
    shutil.copytree(saved.parent, moved)
    sae_folder(saved.parent / "sae", "mlp_out.1", seed=1)
    assert torch.equal(logits(load_adapter(tiny_neox(), moved / "adapter")), want)
    with pytest.raises(ValueError, match="is not the one this adapter was trained with"):
        load_adapter(tiny_neox(), saved)


def test_a_configuration_may_be_pointed_elsewhere(saved, tmp_path):
    want = logits(load_adapter(tiny_neox(), saved))
    shutil.move(saved.parent / "sae", tmp_path / "lost")
    config = SparseCoeffConfig.from_pretrained(str(saved))
    config.saes = {module: str(tmp_path / "lost" / site) for module, site in config.sites.items()}
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_neox(), str(saved), config=config)), want)


# --- refusals --------------------------------------------------------------------------------------------------------


def one_line(refused: pytest.ExceptionInfo) -> str:
    message = str(refused.value)
    assert "\n" not in message
    return message


def refuses(match: str, call, *arguments, **keywords) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        call(*arguments, **keywords)
    one_line(refused)


def test_nan_can_neither_be_saved_nor_loaded(saved, tmp_path):
    policy = load_adapter(tiny_neox(), saved)
    site_layers(policy)["mlp_out.1"].sparse_coeffs_delta["default"].weight.data[3] = torch.nan
    refuses(
        "layers.1.mlp.sparse_coeffs_delta.*has NaN or infinite coefficients: not saved",
        save_adapter,
        policy,
        tmp_path / "a",
    )
    refuses("not saved", policy.save_pretrained, tmp_path / "b")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b" / WEIGHTS).exists()
    state = load_file(saved / WEIGHTS)
    state[KEY.format(2)][0] = torch.inf
    save_file(state, saved / WEIGHTS)
    refuses(
        "layers.2.*has NaN or infinite coefficients: not loaded", PeftModel.from_pretrained, tiny_neox(), str(saved)
    )
    refuses("has NaN or infinite coefficients", check_adapter, saved)
    refuses("has NaN or infinite coefficients", read_deltas, saved)


def test_a_corrupted_adapter(saved):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:50])
    refuses(f"{WEIGHTS} is corrupted", PeftModel.from_pretrained, tiny_neox(), str(saved))
    refuses(f"{WEIGHTS} is corrupted", check_adapter, saved)
    (saved / CONFIG).write_text("{")
    refuses(f"{CONFIG} is malformed JSON", check_adapter, saved)
    (saved / CONFIG).unlink()
    refuses(f"no adapter in .*: {CONFIG} is missing", check_adapter, saved)


def test_an_adapter_of_another_kind(saved):
    edit(saved, peft_type="LORA")
    refuses("is no adapter of SAE coefficients: its peft_type is 'LORA'", check_adapter, saved)


def test_a_corrupted_sae(saved):
    path = saved.parent / "sae" / "mlp_out.1" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses("is not the one this adapter was trained with", load_adapter, tiny_neox(), saved)
    edit(saved, sae_sha256=None)
    refuses("sae_weights.safetensors is corrupted", load_adapter, tiny_neox(), saved)


@pytest.mark.parametrize("change", ["lacks", "extra", "shape"])
def test_coefficients_that_do_not_fit(saved, change):
    state = load_file(saved / WEIGHTS)
    if change == "lacks":
        del state[KEY.format(2)]
        wanted = rf"layers\.2\..* is nothing in it, \({FEATURES},\) here"
    elif change == "extra":
        state[KEY.format(0)] = torch.zeros(FEATURES)
        wanted = rf"layers\.0\..* is \({FEATURES},\) in it, nothing here"
    else:
        state[KEY.format(2)] = torch.zeros(7)
        wanted = rf"layers\.2\..* is \(7,\) in it, \({FEATURES},\) here"
    save_file(state, saved / WEIGHTS)
    refuses(
        "the adapter's file does not fit this model: .*" + wanted, PeftModel.from_pretrained, tiny_neox(), str(saved)
    )
    if change != "extra":
        refuses("has no coefficients for|but its SAE has 40 features", check_adapter, saved)


def test_an_sae_of_another_width(tmp_path):
    narrow = random_sae(8)
    folder = save_sae(narrow, tmp_path / "narrow")
    refuses("d_in=8, but the site has width 16", sparse_coeffs, tiny_neox(), {"mlp_out.1": folder})
    config = SparseCoeffConfig(saes={"gpt_neox.layers.1.mlp": str(folder)})
    model = tiny_neox()
    refuses("d_in=8, but the site has width 16", get_peft_model, model, config)
    assert not site_layers(model)


def test_an_sae_of_another_model(tmp_path):
    folder = sae_folder(tmp_path, "mlp_out.1", model_sha256="a" * 64)
    refuses("was trained on other weights", sparse_coeffs, tiny_neox(), {"mlp_out.1": folder}, model_sha256="b" * 64)
    other = sae_folder(tmp_path, "mlp_out.2", model_sha256="b" * 64)
    both = {"mlp_out.1": folder, "mlp_out.2": other}
    refuses("were trained on different models", sparse_coeffs, tiny_neox(), both)
    saes = {f"gpt_neox.layers.{layer}.mlp": str(path) for layer, path in ((1, folder), (2, other))}
    refuses("were trained on different models", get_peft_model, tiny_neox(), SparseCoeffConfig(saes=saes))


def test_a_base_model_of_other_weights(tmp_path):
    base = tmp_path / "base"
    tiny_neox().save_pretrained(base)
    model = type(tiny_neox()).from_pretrained(base).eval()
    folder = sae_folder(tmp_path, "mlp_out.1", model_sha256=folder_sha256(base))
    policy = get_peft_model(model, sparse_coeffs(model, {"mlp_out.1": folder})).eval()
    randomise(policy)
    save_adapter(policy, tmp_path / "adapter")
    assert check_adapter(tmp_path / "adapter").model_sha256 == folder_sha256(base)
    again = type(tiny_neox()).from_pretrained(base)
    assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), logits(policy))
    changed = tiny_neox()
    changed.gpt_neox.final_layer_norm.weight.data[0] += 1
    changed.save_pretrained(tmp_path / "changed")
    other = type(changed).from_pretrained(tmp_path / "changed")
    refuses("these coefficients belong to another model", load_adapter, other, tmp_path / "adapter")
    assert not site_layers(other)


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ({"mlp_out.9": "mlp_out.1"}, "layer 9 is out of range"),
        ({"nowhere.at.all": "mlp_out.1"}, "no module 'nowhere.at.all'"),
        ({"mlp_out.1": "absent"}, "no SAE folder at"),
        ({"mlp_out.1": "mlp_out.1", "gpt_neox.layers.1.mlp": "mlp_out.1"}, "two SAEs for mlp_out.1"),
        ({}, "no SAE given"),
    ],
)
def test_sites_and_folders_that_are_not_there(tmp_path, saes, message):
    sae_folder(tmp_path, "mlp_out.1")
    refuses(message, sparse_coeffs, tiny_neox(), {site: tmp_path / name for site, name in saes.items()})


def test_configurations_that_make_no_sense(tmp_path):
    folder = str(sae_folder(tmp_path, "mlp_out.1"))
    refuses("unknown splice 'steering'; there are error_preserving", SparseCoeffConfig, splice="steering")
    model = tiny_neox()
    for config, message in (
        (SparseCoeffConfig(target_modules=["mlp"]), "SparseCoeffConfig has no SAEs"),
        (SparseCoeffConfig(saes={"gpt_neox.layers.9.mlp": folder}), "the model has no module 'gpt_neox.layers.9.mlp'"),
        (
            SparseCoeffConfig(saes={"gpt_neox.layers.1.mlp": folder}, target_modules=["mlp"]),
            "target_modules picks 'gpt_neox.layers.0.mlp', for which `saes` has no SAE",
        ),
        (SparseCoeffConfig(saes={"gpt_neox.layers.1.mlp": folder}, target_modules=["no"]), "not found in the base"),
    ):
        refuses(message, get_peft_model, model, config)
        assert not site_layers(model)


def test_a_run_of_train_sae_is_a_source_of_saes(tmp_path):
    for site in SITES:
        sae_folder(tmp_path / "run" / "sae", site)
    assert set(sparse_coeffs(tiny_neox(), tmp_path / "run").sites.values()) == set(SITES)
    assert set(sparse_coeffs(tiny_neox().config, tmp_path / "run" / "sae").sites.values()) == set(SITES)
    alone = sparse_coeffs(tiny_neox(), tmp_path / "run" / "sae" / "mlp_out.2")
    assert alone.sites == {"gpt_neox.layers.2.mlp": "mlp_out.2"}
