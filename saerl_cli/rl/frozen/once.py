"""What a rollout computes only once: the part of the model that training leaves alone, and its completions.

Mixed into trainers that write completions, below what they record.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer

from saerl_cli.rl.evaluation.measure import left_padded
from saerl_cli.rl.frozen.head import add_frozen_head
from saerl_cli.rl.frozen.prefix import Prefix, Recorded, chunk, find_prefix, joined, leave_inputs_alone
from saerl_cli.rl.frozen.sampling import compact, sample
from saerl_cli.rl.trainers.exact import ExactTrainer, derived_seed
from saerl_cli.run import shards

Base = GRPOTrainer if TYPE_CHECKING else object
"""What the classes here are mixed into."""

PREFIX = "prefix/"
"""How the names of recorded outputs begin in TRL's dictionary of a rollout."""


class OnceTrainer(ExactTrainer, Base):
    """Mixed in before GRPOTrainer or RLOOTrainer: own sampling, and frozen outputs kept for all passes of a phase."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        leave_inputs_alone(self.model)
        if not getattr(self, "_entropy_bonus_enabled", False):  # its gradient is only in TRL's own head
            base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            add_frozen_head(base, self.temperature)
        self.prefix: Prefix | None = None  # found before the first rollout: subclasses still change the model
        self.prefix_sought = not self.args.prefix_cache
        self.order: Tensor | None = None  # [B], while a rollout is being scored: of its rows in TRL's shuffle
        self.recorded: Recorded = {}  # of the rollout that is being scored
        self.until_backward = ExitStack()  # what must last until the backward pass of a micro-batch is done

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        if not self.prefix_sought:
            self.prefix, self.prefix_sought = self.frozen_prefix(), True
        rows = len(inputs)
        shuffle_seed = derived_seed(self.args.seed, self.phase, self.accelerator.process_index, 1)
        self.order = torch.arange(rows)
        if self.model.training:
            self.order = torch.randperm(rows, generator=torch.Generator().manual_seed(shuffle_seed))
        self.recorded = {}
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self.order = None
        if self.model.training:
            torch.default_generator.manual_seed(shuffle_seed)  # TRL shuffles next, with these numbers
        return batch | {PREFIX + name: tensor for name, tensor in self.recorded.items()}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        settings = self.generation_config
        if self.args.use_vllm or self.args.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        pad: Any = self._tokenizer.pad_token_id
        ids, mask = left_padded(prompt_ids, pad)
        device, temperature = self.accelerator.device, settings.temperature if settings.do_sample else None
        unwrapped = unwrap_model_for_generation(  # with checkpointing off, under which no keys and values are kept
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with unwrapped as model, compact(model), shards.whole_for_sampling(model):
            completions = sample(
                model, ids.to(device), mask.to(device), settings.max_new_tokens, self.eos_token_ids, temperature
            )
            shards.meet()
        return (completions, None) if isinstance(self, GRPOTrainer) else completions

    # --- what is computed once a rollout ------------------------------------------------------------------------------

    def frozen_prefix(self) -> Prefix | None:
        """The part of the model that training leaves alone; None with dropout, under which no two passes agree."""
        if not self.args.disable_dropout:
            return None
        model = self.accelerator.unwrap_model(self.model)
        ids = torch.arange(6, device=model.device).view(2, 3)

        def call() -> list[Tensor]:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
            return [out[name] for name in ("log_probs", "state_values") if out.get(name) is not None]

        was_training = model.training
        model.eval()
        try:
            return find_prefix(model, call, (2, 3))
        finally:
            model.train(was_training)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """TRL's. A rollout is scored in the micro-batches in which it is learned from.

        The same rows at the same places of the same tensors: only then are two results equal to the bit (kernels treat
        the end of a tensor, or of a thread's share, otherwise than its middle), those of a replay included.
        """
        if self.order is None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        order = self.order.to(input_ids.device)
        through = model if self.prefix is None else self.once_a_rollout(model)
        result = super()._get_per_token_logps_and_entropies(
            through, input_ids[order], attention_mask[order], *args, **kwargs
        )
        if self.prefix is not None and not self.recorded:
            self.recorded = {name: self.in_order(rows) for name, rows in joined(self.parts).items()}
        logps, entropies, auxiliary = result
        return self.in_order(logps), None if entropies is None else self.in_order(entropies), auxiliary

    def in_order(self, rows: Tensor) -> Tensor:
        """Rows of a scoring pass, [B, ...], in the order of the rollout's completions."""
        return rows if self.order is None else rows[self.order.argsort().to(rows.device)]

    def once_a_rollout(self, model: Any) -> Callable[..., Any]:
        """The model, recording its frozen part at the first pass over a rollout and replaying it at the next.

        TRL only ever calls it, with consecutive rows in the order of scoring.
        """
        prefix, replayed, done = self.prefix, self.recorded, 0
        assert prefix is not None and self.order is not None
        replayed = {name: rows[self.order.to(rows.device)] for name, rows in replayed.items()}
        self.parts: list[Recorded] = []

        def call(**inputs: Any) -> Any:
            nonlocal done
            rows = len(inputs["input_ids"])
            done += rows
            if replayed:
                with prefix.replay(chunk(replayed, done - rows, rows)):
                    return model(**inputs)
            with prefix.record() as recorded:
                out = model(**inputs)
            self.parts.append(recorded)
            return out

        return call

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        recorded = {name.removeprefix(PREFIX): rows for name, rows in inputs.items() if name.startswith(PREFIX)}
        if recorded:
            assert self.prefix is not None
            self.until_backward.enter_context(self.prefix.replay(recorded))
        return super()._compute_loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's; what is replayed stays so for the recomputations of activation checkpointing."""
        with self.until_backward:
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's."""
        with self.until_backward:
            return super().prediction_step(*args, **kwargs)

    def replaying(self, batch: dict[str, Any], rows: Tensor) -> AbstractContextManager[Any]:
        """For a pass over some rows of a rollout, [n] indices, outside training."""
        if self.prefix is None:
            return nullcontext()
        recorded = {n.removeprefix(PREFIX): kept[rows] for n, kept in batch.items() if n.startswith(PREFIX)}
        return self.prefix.replay(recorded)
