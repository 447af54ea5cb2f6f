"""The words of a command line, before Hydra sees them."""

from pathlib import Path

import pytest

from saerl_cli.run.words import as_override, expand_sites, split_words, sweep_points

CONF = Path(__file__).parents[1] / "conf"


@pytest.mark.parametrize(
    "words, flags, overrides",
    [
        (["a=1", "--cfg", "job", "b=2"], ["--cfg", "job"], ["a=1", "b=2"]),
        (["-m", "a=1,2"], ["-m"], ["a=1,2"]),
        (["--info", "a=1"], ["--info=all"], ["a=1"]),
        (["a=1", "-i", "searchpath"], ["-i", "searchpath"], ["a=1"]),
        (["--config-dir", "x", "a=1", "--config-dir=y"], ["--config-dir", "x", "--config-dir=y"], ["a=1"]),
    ],
)
def test_flags_come_first_with_their_values(words, flags, overrides):
    assert split_words(words) == (flags, overrides)


@pytest.mark.parametrize("flag", ["--nope", "--experimental-rerun", "--config-name", "--config-path=x"])
def test_flags_that_are_unknown_or_would_replace_the_command_are_refused(flag):
    with pytest.raises(ValueError, match="unknown flag"):
        split_words([flag, "x"])


def test_points_of_a_sweep_are_a_product_in_hydras_order():
    points = list(sweep_points(["a=1,2", "b=range(0,2)", "c=3", "d=interval(0,1)"]))
    assert points == [
        ["a=1", "b=0", "c=3"],
        ["a=1", "b=1", "c=3"],
        ["a=2", "b=0", "c=3"],
        ["a=2", "b=1", "c=3"],
    ]
    assert len(list(sweep_points(["seed=range(0,1000)"]))) == 32


@pytest.mark.parametrize(
    "word, becomes",
    [
        ("site=mlp_out", "site=mlp_out"),
        ("site=mlp_out.3", 'site.names=["mlp_out.3"]'),
        ("site=[mlp_out.1,mlp_out.3]", 'site.names=["mlp_out.1","mlp_out.3"]'),
        ("site=gpt_neox.layers.1.mlp", 'site.names=["gpt_neox.layers.1.mlp"]'),
        ("site=mlp_out.*", 'site.names=["mlp_out.*"]'),
        ("site=mlp_out.[1-9]*", 'site.names=["mlp_out.[1-9]*"]'),
        ("site=nope", 'site.names=["nope"]'),
        ("site.names=[a]", "site.names=[a]"),
        ("websites=x", "websites=x"),
    ],
)
def test_a_site_is_an_option_a_place_or_several(word, becomes):
    assert expand_sites([word], CONF, multirun=False) == [becomes]


def test_a_sweep_over_places_is_a_point_each():
    swept = expand_sites(["site=mlp_out.1,[mlp_out.2,mlp_out.3]"], CONF, multirun=True)
    assert swept == ['site.names=["mlp_out.1"],["mlp_out.2","mlp_out.3"]']
    assert expand_sites(["site=mlp_out,attn_out"], CONF, multirun=True) == ["site=mlp_out,attn_out"]
    with pytest.raises(ValueError, match="mixes"):
        expand_sites(["site=mlp_out,mlp_out.3"], CONF, multirun=True)


@pytest.mark.parametrize(
    "value", ["runs/a", "a b", "x=1,y", 'say "hi"', "c:\\d", "c:\\", 'c:\\"d', "[1]", "{a}", "~/é", "$x", ""]
)
def test_any_value_survives_hydras_grammar(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(as_override("hydra.run.dir", value))
    assert str(parsed.value()) == value
