"""saerl's trainer under the peers' harness: the public entry point, AuxK and dead counts on, saved and reloaded.

Run by the harness (its README says how), which puts `common` on the path; PYTHON is that of saerl's environment:
  run_all.py --only run_saelens,run_sparsify,PATH/run_saerl.py,PATH/run_saerl.py:--bf16 --python-for run_saerl=PYTHON
"""

import common  # first: switches bytecode files off
import torch

from saerl_cli import __version__
from saerl_cli.config.sae import (
    Architecture,
    Centre,
    DecoderNorm,
    EncoderDtype,
    InputScale,
    Kernel,
    Penalty,
    Resample,
    SaeConfig,
)
from saerl_cli.config.settings import suited
from saerl_cli.sae.files import load_sae, save_sae
from saerl_cli.sae.loop import training
from saerl_cli.sae.train import SaeTrainer

ARCHITECTURES = {"topk": "topk", "batchtopk": "batchtopk", "l1": "relu", "jumprelu": "jumprelu", "gated": "gated"}

p = common.parser(__doc__)
p.add_argument("--bf16", action="store_true", help="bfloat16 encoder product")
p.add_argument("--unit-norm", action="store_true", help="decoder rows held at norm 1")
p.add_argument("--no-clip", action="store_true", help="no gradient clip")
p.add_argument("--dense", action="store_true", help="dense kernel (relu, jumprelu, gated)")
p.add_argument("--resample", action="store_true", help="resample dead features instead of AuxK")
a = p.parse_args()

torch.manual_seed(a.seed)
train, held = common.load(a)
architecture = Architecture(ARCHITECTURES[a.arch])
unit = a.unit_norm or architecture is Architecture.gated
settings = dict(
    architecture=architecture,
    expansion=None,
    d_sae=a.d_sae,
    k=a.k,
    l1=a.l1,
    l0=a.l1,
    l1_warmup=0.0,
    auxk=a.auxk,
    penalty=Penalty.tanh,
    scale=InputScale.none,  # the harness has scaled the data
    centre=Centre.mean,
    decoder_norm=DecoderNorm.unit if unit else DecoderNorm.free,
    dead_after_tokens=a.dead_tokens,
    resample=Resample.loss if a.resample else Resample.none,
    tokens=a.steps * a.batch,
    batch_size=a.batch,
    lr=a.lr,
    lr_warmup=0.0,
    lr_decay=1.0,
    max_grad_norm=None if a.no_clip else 1.0,
    encoder_dtype=EncoderDtype.bfloat16 if a.bf16 else EncoderDtype.float32,
    kernel=Kernel.dense if a.dense else Kernel.auto,
)
config = suited(SaeConfig, settings)
trainer = SaeTrainer(a.d_in, config, a.device)
start = common.init_dec(a)
with torch.no_grad():
    trainer.p["decoder"].copy_(start)
    trainer.p["encoder"].copy_(start)

clock = common.Clock(a.device)
for _ in training(common.batches(train, a.batch, clock), {"SAE": trainer}, log_every=10**9):
    pass
clock.stamp()

folder = save_sae(trainer.finish(), common.out_dir(a, "saerl_" + a.arch))
sae = load_sae(folder).to(a.device)


def features_and_reconstruction(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [n, d_sae] and reconstruction [n, d_in] of the reloaded SAE."""
    f = sae.encode(x)
    return f, sae.decode(f)


notes = f"clip={config.max_grad_norm} norm={config.decoder_norm.value} encoder={config.encoder_dtype.value}"
common.report("saerl", __version__, a, clock, common.evaluate(features_and_reconstruction, held), notes)
