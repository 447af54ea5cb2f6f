"""The public Python API: importable by name, and enough for a notebook."""

import subprocess
import sys

import pytest
import torch

import saerl_cli
from saerl_cli.config.sae import SaeConfig


@pytest.mark.parametrize("name", saerl_cli.PUBLIC)
def test_public_names_exist(name):
    assert getattr(saerl_cli, name).__name__ == name


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = saerl_cli.nope


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, saerl_cli; sys.exit(bool({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_saes_train_on_any_iterator_of_tensors():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=-1)

    def batches():
        for _ in range(300):
            chosen = torch.rand(256, 24, generator=generator) < 0.1
            yield (chosen * torch.rand(256, 24, generator=generator)) @ directions

    config = SaeConfig(expansion=None, d_sae=64, k=4, batch_size=256, tokens=300 * 256, lr=5e-3)
    (sae,) = saerl_cli.train_saes(batches(), [config])
    x = next(batches())
    assert ((x - sae(x)) ** 2).sum() < 0.2 * ((x - x.mean(0)) ** 2).sum()
