"""Settings of `saerl features`."""

from dataclasses import dataclass, field
from typing import Any

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.settings import check_settings, setting


@dataclass
class ExplainConfig:
    """Labels by a language model that is shown contexts, and how well they predict others; off when nothing is set."""

    endpoint: str | None = setting(None, model=True)
    """Address of an OpenAI-compatible service, for instance http://localhost:8000/v1; contexts are sent there."""
    model: str | None = None
    """Name of the model at `endpoint`; without one the folder of a local Hugging Face model."""
    key: str = setting("OPENAI_API_KEY", endpoint=True)
    """Environment variable that holds the key of `endpoint`; no key is sent where it is not set."""
    features: int | None = setting(None, ">= 1", model=True)
    """Explain only so many, the first of those described; all when empty."""
    shown: int = setting(10, "> 0", model=True)
    """Contexts that an explanation is made from."""
    judged: int = setting(10, ">= 0", model=True)
    """Other contexts in which the feature fires, and as many in which it does not, that the explanation must tell
    apart; 0 leaves scoring out."""
    batch: int = setting(5, "> 0", judged=True)
    """Contexts judged in one question."""
    max_tokens: int = setting(80, "> 0", model=True)
    """Tokens of an answer, at most."""
    timeout: float = setting(60.0, "> 0", endpoint=True)
    """Seconds to wait for an answer of `endpoint`."""

    def __post_init__(self) -> None:
        check_settings(self, "explain")
        refuse_unless(
            self.endpoint is None or self.endpoint.startswith(("http://", "https://")),
            f"explain.endpoint must be an address such as http://localhost:8000/v1, got {self.endpoint}",
        )

    @property
    def on(self) -> bool:
        """Whether anything is to be explained."""
        return self.model is not None


@dataclass
class FeaturesConfig:
    """What features of SAEs are, and what RLHF did to them: contexts, logits, neighbours, labels, on one page."""

    policy: str | None = None
    """Run directory of `saerl rlhf` with coefficients: its features, before and after."""
    saes: str | None = None
    """Run directory of `saerl train-sae`, its sae folder, a folder of SAE folders, or one SAE; instead of `policy`."""
    model: dict[str, Any] = setting(dict, saes=True)
    """A choice of model=…, or single settings that differ from the model of the SAEs' run."""
    data: dict[str, Any] = setting(dict, saes=True)
    """The text whose held-out part is read: a choice of data=…, or single settings that differ."""
    sites: list[str] | None = None
    """Only these sites; all that have an SAE when empty."""
    ids: list[str] | None = None
    """Features by number: SITE:FEATURE or SITE:FIRST-LAST, for instance [mlp_out.1:7,mlp_out.1:20-29]; when empty those
    with the largest effect."""
    count: int = setting(40, ">= 1", ids=False)
    """Features described: of all sites together with `policy`, of each site in turn with
    `saes`."""
    tokens: int = setting(50_000, ">= 1")
    """Held-out tokens read, at most what there is."""
    contexts: int = setting(8, ">= 1")
    """Contexts of the strongest activation shown for a feature; a quarter as many from each quantile."""
    quantiles: int = setting(5, ">= 1")
    """Equal parts that activations above 0 are cut into, from each of which contexts are shown."""
    samples: int = setting(128, ">= 0", policy=True)
    """Completions drawn from the policy and from its reference with the same seed; 0 leaves them out."""
    labels: str | None = None
    """JSON file {SITE: {FEATURE: label}}, as this command writes one; its labels take the place of automatic ones."""
    neuronpedia: bool = False
    """Write also neuronpedia/, JSON files of features in Neuronpedia's batch format."""
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    """Automatic labels by a language model."""
    cpu: bool = False
    """Stay on the CPU; otherwise a GPU is used where there is one."""
    seed: int = 0
    """Seed of the contexts drawn from quantiles and of the completions."""

    def __post_init__(self) -> None:
        refuse_unless(
            (self.policy is None) != (self.saes is None),
            "give policy=RUN, a run of `saerl rlhf`, or saes=DIR, a folder of SAEs"
            + (", not both" if self.policy is not None else ""),
        )
        check_settings(self)
        refuse_unless(self.ids is None or bool(self.ids), "ids is empty; write for instance ids=[mlp_out.1:7]")
        refuse_unless(self.sites is None or bool(self.sites), "sites is empty; write for instance sites=[mlp_out.1]")
