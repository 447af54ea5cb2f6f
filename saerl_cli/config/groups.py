"""The settings that several commands share, one dataclass a config group of `conf/`, in data-flow order.

OmegaConf accepts `Enum` and refuses `Literal`, hence the enumerations. `__post_init__` refuses contradictions.
"""

from dataclasses import dataclass, field
from enum import Enum

from saerl_cli.config.settings import check_settings, setting


def refuse_unless(condition: bool, message: str) -> None:
    """Raise the `ValueError` that the command line turns into one line and exit code 2."""
    if not condition:
        raise ValueError(message)


# --- model ------------------------------------------------------------------------------------------------------------


class ModelKind(Enum):
    """Where a language model comes from."""

    planted = "planted"
    hub = "hub"
    local = "local"


class Dtype(Enum):
    """Precision in which the frozen base model is held. SAE coefficients are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class PlantedConfig:
    """The planted language and the small Pythia-architecture model trained on it; its hash names the cached model."""

    documents: int = setting(40_000, ">= 1")
    """Reviews generated for training (held-out reviews come on top)."""
    hidden_size: int = setting(128, ">= 1")
    """Width of the residual stream, d_in of an `mlp_out` SAE."""
    layers: int = setting(4, ">= 1")
    """Transformer blocks."""
    heads: int = setting(4, ">= 1")
    """Attention heads, dividing `hidden_size`."""
    context_size: int = setting(96, ">= 2")
    """Longest sequence in tokens."""
    steps: int = setting(900, ">= 1")
    """Optimiser steps."""
    batch_size: int = setting(16, ">= 1")
    """Rows of `context_size` tokens a step; a row holds about three reviews."""
    lr: float = setting(4e-3, "> 0")
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of the generated text, the initial weights and the batch order."""

    def __post_init__(self) -> None:
        check_settings(self, "model.planted")
        refuse_unless(
            self.hidden_size % self.heads == 0,
            f"model.planted.heads must divide hidden_size, got {self.heads} and {self.hidden_size}",
        )
        refuse_unless(
            self.hidden_size // self.heads % 8 == 0,
            "model.planted: hidden_size / heads must be a multiple of 8 (a quarter of each head is rotated in pairs),"
            f" got {self.hidden_size} / {self.heads}",
        )


@dataclass
class ModelConfig:
    """A causal language model: embedded, on the Hugging Face Hub, or in a folder."""

    kind: ModelKind = ModelKind.planted
    """`planted` trains and caches the embedded one; `hub` needs `name`; `local` needs `path`."""
    name: str | None = setting(None, write="OWNER/MODEL", kind=ModelKind.hub)
    """Hub id, for instance EleutherAI/pythia-70m."""
    path: str | None = setting(None, write="DIR", kind=ModelKind.local)
    """Folder with config.json, safetensors weights and a tokenizer."""
    revision: str | None = setting(None, kind=ModelKind.hub)
    """Hub branch, tag or commit; Pythia's training checkpoints are branches such as step3000."""
    dtype: Dtype = Dtype.float32
    """Precision of the frozen weights."""
    planted: PlantedConfig = field(default_factory=PlantedConfig)
    """Settings of the planted model (`kind=planted`); words of a size may stand beside any kind."""

    def __post_init__(self) -> None:
        check_settings(self, "model")


# --- data -------------------------------------------------------------------------------------------------------------


class DataKind(Enum):
    """Where text comes from."""

    planted = "planted"
    text = "text"
    hub = "hub"


WRITTEN = (DataKind.text, DataKind.hub)
"""Text that is read, and not generated."""


@dataclass
class DataConfig:
    """Documents: a training part, and a held-out part taken from the end (from the start of a stream)."""

    kind: DataKind = DataKind.planted
    """`planted` generates the planted language; `text` reads `path`; `hub` reads the data set `name`."""
    path: str | None = setting(None, write="FILE", kind=DataKind.text)
    """A txt (a document a line), json list, jsonl or parquet file, or a glob of them; text also as .gz or .zst."""
    name: str | None = setting(None, write="OWNER/DATASET", kind=DataKind.hub)
    """Hub data set."""
    subset: str | None = setting(None, kind=DataKind.hub)
    """Configuration of the Hub data set."""
    split: str = setting("train", kind=DataKind.hub)
    """Split of the Hub data set."""
    field: str = setting("text", kind=WRITTEN)
    """Column or key that holds the text."""
    heldout: float = setting(0.1, "in (0, 0.5]", stream=False)
    """Share of documents, from the end, that training never sees."""
    stream: bool = setting(False, kind=WRITTEN)
    """Read documents as training needs them, never all in memory; for text larger than that. A json list is parsed
    whole."""
    heldout_documents: int = setting(1000, ">= 1", stream=True)
    """The first so many documents, which training never sees."""
    max_documents: int | None = None
    """Read at most so many documents, those held out included."""
    context_size: int | None = setting(None, ">= 2")
    """Tokens a sequence; the model's context (at most 512) when empty."""

    def __post_init__(self) -> None:
        check_settings(self, "data")
        refuse_unless(
            not self.stream or self.max_documents is None or self.max_documents > self.heldout_documents,
            f"data.max_documents={self.max_documents} leaves nothing beside data.heldout_documents="
            f"{self.heldout_documents}; lower the latter",
        )


# --- site -------------------------------------------------------------------------------------------------------------


@dataclass
class SiteConfig:
    """Places in the model."""

    names: list[str] = field(default_factory=lambda: ["mlp_out.[1-9]*"])
    """Aliases POSITION.LAYER with POSITION one of mlp_out, mlp_hidden, attn_out, resid_post; globs of them;
    or module paths as the model names them."""

    targets: list[str] | None = None
    """Transcoders: the site each of `names` predicts, one for one, for instance names=[mlp_in.3] targets=[mlp_out.3];
    empty for autoencoders."""

    def __post_init__(self) -> None:
        refuse_unless(len(self.names) > 0, "site.names is empty; write for instance site=mlp_out.3")
        refuse_unless(
            self.targets is None or len(self.targets) == len(self.names),
            f"site.targets names {len(self.targets or [])} sites for {len(self.names)} of site.names; one for each",
        )


# --- launch -----------------------------------------------------------------------------------------------------------


class Precision(Enum):
    """Accelerate's mixed precision."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Tracker(Enum):
    """Programs that can show metrics while a run goes on; metrics.jsonl is written always."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


class Sharding(Enum):
    """How a model is split over processes instead of being whole in each."""

    none = "none"
    fsdp2 = "fsdp2"


ALL_GPUS = -1
"""`launch.num_processes` before the checks write a number in its place."""


@dataclass
class LaunchConfig:
    """How many processes do the work; Accelerate starts them."""

    num_processes: int = 1
    """Processes on this machine; -1 for one on each visible GPU, whose number is then written down."""
    sharding: Sharding = Sharding.none
    """`none`: the model is whole in each process. `fsdp2`: weights, and what is trained of them with its gradients and
    optimiser state, are split over the processes; a block's weights are whole only while it runs."""
    gather_for_sampling: bool = setting(False, sharding=Sharding.fsdp2)
    """Have the whole model in each process while completions are sampled, as fast as without; what is
    trained of it stays split. Otherwise every token gathers every block."""
    cpu: bool = False
    """Keep every process on the CPU; otherwise a GPU is used where there is one."""
    mixed_precision: Precision = Precision.no
    """Autocast precision."""
    threads: int | None = setting(None, ">= 1")
    """CPU threads a process; cores / processes when empty."""
    trackers: list[Tracker] = field(default_factory=list)
    """Send metrics there too, through Accelerate; TensorBoard's files lie in the run directory."""

    def __post_init__(self) -> None:
        check_settings(self, "launch")
        refuse_unless(self.num_processes >= 1, f"launch.num_processes must be >= 1, got {self.num_processes}")

    @property
    def shards(self) -> int:
        """Parts that a model is split into; 1 where it is whole."""
        return self.num_processes if self.sharding is Sharding.fsdp2 else 1
