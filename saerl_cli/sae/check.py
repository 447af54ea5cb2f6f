"""What `saerl train-sae` refuses of its SAEs and its text before any work, without loading weights."""

from saerl_cli.config.groups import DataKind, ModelKind, refuse_unless
from saerl_cli.config.sae import Centre
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import iter_documents
from saerl_cli.models import light_tokenizer, locate
from saerl_cli.planted.documents import planted_reviews
from saerl_cli.sae.files import check_source
from saerl_cli.sae.sweep import Planned


def check_planned(planned: Planned) -> None:
    """Refuse a width, a target or a start that does not fit the site."""
    sae, site = planned.config, planned.site
    sae.width(site.width)
    if planned.target is not None:
        refuse_unless(not sae.tied, f"sae.tied belongs to autoencoders; {planned.name} is a transcoder")
    if sae.init_from is None:
        return
    refuse_unless(sae.centre is not Centre.off, "sae.init_from brings a b_dec, which sae.centre=off would ignore")
    info = check_source(sae.init_from, site.width, sae.width(site.width), site=site.name)
    wanted = None if planned.target is None else planned.target.width
    if info is not None and info.d_out != wanted:
        kind, other = ("an SAE", "a transcoder") if wanted is None else ("a transcoder", "an SAE")
        raise ValueError(f"sae.init_from={sae.init_from} does not fit: {planned.name} is to be {kind}, that is {other}")


def check_length(config: TrainSaeConfig) -> None:
    """Refuse training text shorter than one batch, without tokenizing more of it than a batch."""
    if config.data.kind is DataKind.planted:
        lengths = (len(review.words) for review in planted_reviews(config.data, config.model, "train"))
    else:
        texts = iter_documents(config.data, config.model, "train")
        tokenizer = light_tokenizer(locate(config.model)) if config.model.kind is ModelKind.local else None
        if tokenizer is None:  # nothing to count with yet
            return
        lengths = (len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    tokens, needed = 0, config.sae.batch_size
    for length in lengths:
        tokens += length
        if tokens >= needed:
            return
    raise ValueError(
        f"the training text holds {tokens} tokens, less than one batch of sae.batch_size={needed};"
        " lower it or give more text"
    )
