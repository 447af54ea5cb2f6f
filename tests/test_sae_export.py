"""`saerl export`, and SAEs found and opened by path or name whatever their format."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saerl_cli.cli import app
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.export import export_saes
from saerl_cli.sae.files import FORMATS, check_source, find_saes, find_sources, open_sae, save_sae

D, M, K = 6, 16, 3


def make(architecture="topk", site="mlp_out.1", d_out=None) -> SAE:
    g = torch.Generator().manual_seed(len(site))
    sae = SAE(D, M, architecture, K if architecture == "topk" else None, d_out)
    for parameter in sae.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=g))
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    sae.site, sae.target = site, "mlp_out.9" if d_out else None
    sae.metadata = {"saerl": {"model_name": "tiny", "module": f"gpt_neox.layers.{site[-1]}"}}
    return sae


def run_directory(path: Path, *saes: SAE) -> Path:
    for number, sae in enumerate(saes):
        save_sae(sae, path / "sae" / f"{number}_{sae.site}")
    (path / "run.json").write_text("{}")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the command -----------------------------------------------------------------------------------------------------


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `saerl export`."""
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_a_run_is_written_beside_it_with_a_line_an_sae_and_a_recipe(tmp_path):
    run = run_directory(tmp_path / "run", make(site="resid_post.0"), make(site="resid_post.1"))
    code, out, err = call(run, "--to", "sparsify")
    folder = tmp_path / "run-sparsify"
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"resid_post.0: topk k=3, 6 -> 16 -> {folder}/layers.0",
        f"resid_post.1: topk k=3, 6 -> 16 -> {folder}/layers.1",
        "",
        "from sparsify import SparseCoder",
        f'sae = SparseCoder.load_from_disk("{folder}/layers.0")',
        "values, indices, _ = sae.encode(activations)",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "layers.0", "layers.1"]
    manifest = json.loads((folder / "export.json").read_text())
    assert {*manifest["files"], "export.json"} == set(files(folder))
    again = dict(files(folder))
    assert call(run, "--to", "sparsify")[0] == 0  # what it made itself, it makes anew
    assert files(folder) == again


def test_the_whole_circle_ends_where_it_began(tmp_path):
    """saelens -> dictionary_learning -> sparsify -> saelens: the same numbers, the same provenance."""
    save_sae(make(), tmp_path / "a")
    for number, kind in enumerate(("dictionary_learning", "sparsify", "saelens")):
        export_saes(str(tmp_path / "abc"[number]), kind, tmp_path / "bcd"[number])
    first, last = open_sae(tmp_path / "a"), open_sae(tmp_path / "d")
    assert all(torch.equal(last.state_dict()[name], value) for name, value in first.state_dict().items())
    assert (last.site, last.k, last.metadata) == (first.site, first.k, first.metadata)


def test_one_site_of_several(tmp_path):
    run = run_directory(tmp_path / "run", make("jumprelu", "resid_post.0"), make(site="resid_post.1"))
    assert call(run, "--to", "sparsify")[0] == 2
    code, out, _ = call(run, "--to", "sparsify", "--site", "resid_post.1", "--out", tmp_path / "deep" / "out")
    assert code == 0
    assert (tmp_path / "deep" / "out" / "layers.1" / "sae.safetensors").is_file()
    assert len(out.splitlines()) == 5


def test_several_saes_of_one_site_keep_their_own_names(tmp_path):
    run = run_directory(tmp_path / "run", make("topk"), make("standard"))
    lines = export_saes(str(run), "dictionary_learning", tmp_path / "out")
    assert [line.rpartition(" -> ")[2] for line in lines[:2]] == [
        f"{tmp_path}/out/{number}_mlp_out.1/trainer_0" for number in (0, 1)
    ]
    assert open_sae(tmp_path / "out" / "1_mlp_out.1").architecture == "standard"


def test_no_sae_is_written_over_another(tmp_path):
    run = run_directory(tmp_path / "run", make(site="resid_post.1"), make(site="layers.1"))  # the same hookpoint
    with pytest.raises(ValueError, match="two of these SAEs would be written to layers.1"):
        export_saes(str(run), "sparsify")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_topk_transcoder_is_written_with_a_warning(tmp_path):
    save_sae(make(site="mlp_in.9", d_out=4), tmp_path / "x")
    assert "6 -> 16 -> 4 at mlp_out.9 (not for SAELens itself" in export_saes(str(tmp_path / "x"), "saelens")[0]


def refusals(place: Path) -> dict[str, tuple[list[object], str]]:
    run = run_directory(place / "run", make(site="resid_post.0"), make(site="resid_post.1"))
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("irreplaceable")
    (place / "file").write_text("")
    export_saes(str(run), "saelens", place / "made")
    (place / "made" / "resid_post.0" / "notes.txt").write_text("irreplaceable")
    export_saes(str(run), "saelens", place / "other")
    (place / "other" / "export.json").write_text("[1]")
    save_sae(make("standard", "mlp_in.9", D), place / "transcoder")
    return {
        "nothing there": ([place / "nowhere", "--to", "saelens"], "no such folder"),
        "no SAE": ([place / "mine", "--to", "saelens"], "no SAE in"),
        "format": (
            [run, "--to", "gguf"],
            "--to gguf: no such format; there are saelens, dictionary_learning, sparsify",
        ),
        "site": (
            [run, "--to", "saelens", "--site", "mlp_out.7"],
            "has no SAE of mlp_out.7; it has resid_post.0, resid",
        ),
        "other site": ([place / "transcoder", "--to", "saelens", "--site", "mlp_in.8"], "is an SAE of mlp_in.9"),
        "occupied": ([run, "--to", "saelens", "--out", place / "mine"], "holds files that no export made (thesis.txt)"),
        "added to": ([run, "--to", "saelens", "--out", place / "made"], "no export made (resid_post.0/notes.txt)"),
        "no manifest": ([run, "--to", "saelens", "--out", place / "other"], "no export made (export.json)"),
        "a file": ([run, "--to", "saelens", "--out", place / "file"], "exists and is no folder"),
        "itself": ([run, "--to", "saelens", "--out", run], "holds what is to be exported"),
        "kind": ([place / "transcoder", "--to", "dictionary_learning"], "has autoencoders only"),
    }


def test_refusals_are_one_line_exit_2_and_leave_everything_alone(tmp_path):
    for words, message in refusals(tmp_path).values():
        before = files(tmp_path)
        code, out, err = call(*words)
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert message in err
        assert err.startswith("saerl: ")
        assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_one_line_exit_1(tmp_path):
    save_sae(make(), tmp_path / "x")
    (tmp_path / "file").write_text("")
    code, out, err = call(tmp_path / "x", "--to", "saelens", "--out", tmp_path / "file" / "below")
    assert (code, out, err.count("\n")) == (1, "", 1)


def test_what_fails_half_way_leaves_no_half(tmp_path, monkeypatch):
    run = run_directory(tmp_path / "run", make(site="resid_post.0"), make(site="resid_post.1"))
    export_saes(str(run), "sparsify", tmp_path / "out")
    before = files(tmp_path)
    save, calls = FORMATS["sparsify"].save_sae, []

    def fails_at_the_second(sae, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("no space left")
        save(sae, folder)

    monkeypatch.setattr(FORMATS["sparsify"], "save_sae", fails_at_the_second)
    with pytest.raises(OSError, match="no space left"):
        export_saes(str(run), "sparsify", tmp_path / "out")
    assert files(tmp_path) == before


# --- finding and opening ---------------------------------------------------------------------------------------------


def test_every_format_is_found_where_its_library_puts_it(tmp_path):
    first, second = make(site="resid_post.0"), make(site="resid_post.1")
    for number, sae in enumerate((first, second)):
        FORMATS["dictionary_learning"].save_sae(sae, tmp_path / "dl" / f"resid_post_{number}" / "trainer_0")
        FORMATS["sparsify"].save_sae(sae, tmp_path / "coders" / f"layers.{number}")
    for place in ("dl", "coders"):
        assert [s.info.site for s in find_sources(tmp_path / place) if s.info] == ["resid_post.0", "resid_post.1"]
        sae = open_sae(tmp_path / place, site="resid_post.1")
        assert torch.equal(sae.W_enc, second.W_enc)
        with pytest.raises(ValueError, match=r"has several SAEs \(resid_post.0, resid_post.1\); name the folder"):
            open_sae(tmp_path / place)
    with pytest.raises(ValueError, match="is a sparsify folder; convert it with `saerl export"):
        find_saes(tmp_path / "coders")


def test_a_folder_of_one_sae_is_taken_at_its_word(tmp_path):
    save_sae(make(), tmp_path / "x")
    assert open_sae(tmp_path / "x", site="resid_post.5").site == "mlp_out.1"


def test_a_source_that_does_not_fit_is_refused(tmp_path):
    save_sae(make(), tmp_path / "x")
    assert check_source(tmp_path / "x", D, M).architecture == "topk"
    with pytest.raises(ValueError, match="has d_in=6, but 512 is needed"):
        check_source(tmp_path / "x", 512)
    with pytest.raises(ValueError, match="has d_sae=16, but 32 is needed"):
        check_source(tmp_path / "x", D, 32)


def test_checking_imports_no_torch(tmp_path):
    for kind, form in FORMATS.items():
        form.save_sae(make(), tmp_path / kind)
    code = (
        "import sys; from saerl_cli.sae.files import check_source;"
        "[check_source(path, 6, 16) for path in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, *(str(tmp_path / kind) for kind in FORMATS)]).returncode == 0


# --- releases of SAELens ---------------------------------------------------------------------------------------------

NAME = "sae_lens:pythia-70m/blocks.2.hook_mlp_out"
STUB = """
from saerl_cli.sae.files import load_sae, save_sae

class SAE:
    def __init__(self, folder):
        self.sae = load_sae(folder)

    @classmethod
    def from_pretrained(cls, release, sae_id, device):
        if release != "pythia-70m" or sae_id != "blocks.2.hook_mlp_out":
            raise ConnectionError("cannot reach the Hub\\nsecond line")
        return cls({folder!r})

    def save_model(self, folder):
        save_sae(self.sae, folder)
"""


def test_a_release_without_saelens_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (check_source, open_sae, lambda name: export_saes(name, "saelens", tmp_path / "out")):
        with pytest.raises(ValueError, match=r"needs SAELens: pip install sae-lens in .*save_model\(DIR\)") as error:
            use(NAME)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sae_lens:", "sae_lens:release", "sae_lens:/id"])
def test_a_release_is_named_in_full(name):
    with pytest.raises(ValueError, match="is not sae_lens:RELEASE/ID, for instance sae_lens:pythia-70m"):
        check_source(name)


def test_a_release_is_what_saelens_makes_of_it(tmp_path, monkeypatch):
    sae = make()
    sae.site, sae.metadata = None, {"hook_name": "blocks.2.hook_mlp_out"}
    save_sae(sae, tmp_path / "hub")
    (tmp_path / "packages" / "sae_lens").mkdir(parents=True)
    stub = STUB.replace("{folder!r}", repr(str(tmp_path / "hub")))
    (tmp_path / "packages" / "sae_lens" / "__init__.py").write_text(stub)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path)
    assert check_source(NAME, 512) is None  # nothing is known before it is downloaded
    found = open_sae(NAME)
    assert torch.equal(found.W_enc, sae.W_enc)
    assert found.site == "mlp_out.2"
    (line, *_) = export_saes(NAME, "dictionary_learning")
    out = "pythia-70m_blocks.2.hook_mlp_out-dictionary_learning"
    assert line == f"mlp_out.2: topk k=3, 6 -> 16 -> {out}/mlp_out.2/trainer_0"
    assert open_sae(out).site == "mlp_out.2"
    with pytest.raises(
        ValueError, match="SAELens cannot get sae_lens:pythia-70m/x: ConnectionError: cannot reach"
    ) as error:
        open_sae("sae_lens:pythia-70m/x")
    assert "\n" not in str(error.value)
    monkeypatch.delitem(sys.modules, "sae_lens")
