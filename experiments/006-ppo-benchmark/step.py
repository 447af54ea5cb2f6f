"""Whole PPO steps: saerl, or TRL 1.12's PPOTrainer with the same adapter on the same model, prompts and lengths.

python step.py saerl                                   # in saerl's environment
TRL112/bin/python step.py trl                          # trl 1.12.0 and saerl's package on the path
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pieces
import torch

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("which", choices=["saerl", "trl"])
p.add_argument("--layers", type=int, default=6)
p.add_argument("--at", type=int, default=3)
p.add_argument("--width", type=int, default=256)
p.add_argument("--vocabulary", type=int, default=8192)
p.add_argument("--rollouts", type=int, default=32)
p.add_argument("--micro-batch", type=int, default=8)
p.add_argument("--tokens", type=int, default=32)
p.add_argument("--phases", type=int, default=2)
a = p.parse_args()
torch.set_num_threads(1)
PROMPT, EPOCHS, MINIBATCHES = 8, 4, 4
texts = pieces.prompts(a.rollouts * a.phases, PROMPT, a.vocabulary)
model: Any = pieces.random_model(a.layers, a.width, a.vocabulary)
site = f"mlp_out.{a.at}"
marks: list[float] = []


def saerl(folder: Path) -> None:
    """Phases of rollouts, 4 minibatches and 4 epochs; reward computed by a function."""
    trainer = pieces.ppo(
        folder, model, site, texts, max_steps=a.phases * EPOCHS * MINIBATCHES,
        per_device_train_batch_size=a.micro_batch, steps_per_generation=a.rollouts // a.micro_batch,
        gradient_accumulation_steps=a.rollouts // MINIBATCHES // a.micro_batch, num_iterations=EPOCHS,
        max_completion_length=a.tokens,
    )  # fmt: skip
    trainer.on_phase = lambda metrics: marks.append(time.process_time())
    marks.append(time.process_time())
    trainer.train()


class FreeReward(torch.nn.Module):
    """What 1.12 takes for a reward model, at no cost."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, 1] out of [B, L, 1]."""
        return hidden


class Trunk(torch.nn.Module):
    """Hidden states that are the parity of the ids."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """[B, L] -> an output with hidden_states."""
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(hidden_states=((input_ids % 2 == 0).float()[..., None],))


def trl(folder: Path) -> None:
    """The same with 1.12: it needs a value model, whose trunk is frozen here so that only its head is trained."""
    from datasets import Dataset
    from transformers import GPTNeoXForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = pieces.tokenizer(a.vocabulary)
    critic = GPTNeoXForSequenceClassification(type(model.config)(**model.config.to_dict() | {"num_labels": 1}))
    critic.gpt_neox.load_state_dict(model.gpt_neox.state_dict())
    critic.gpt_neox.requires_grad_(False)

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "out"), per_device_train_batch_size=a.micro_batch, num_ppo_epochs=EPOCHS,
            gradient_accumulation_steps=a.rollouts // a.micro_batch, num_mini_batches=MINIBATCHES,
            total_episodes=a.rollouts * a.phases, response_length=a.tokens, stop_token="eos", temperature=1.0,
            local_rollout_forward_batch_size=a.micro_batch, num_sample_generations=0, learning_rate=1e-2,
            use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
            gradient_checkpointing=False, dataloader_pin_memory=False,
        ),
        processing_class=words,
        model=model,
        ref_model=None,
        reward_model=FreeReward(),
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": words(text)["input_ids"]} for text in texts]),
        peft_config=pieces.adapter(model, folder, site),
        callbacks=[Marks()],
    )  # fmt: skip
    marks.append(time.process_time())
    trainer.train()


with tempfile.TemporaryDirectory() as place:
    {"saerl": saerl, "trl": trl}[a.which](Path(place))
seconds = [after - before for before, after in zip(marks, marks[1:], strict=False)]
pieces.report(
    kind="step", seed=3, which=a.which, rollouts=a.rollouts, seconds=seconds, shape=sys.argv[2:],
    samples_per_second=a.rollouts / min(seconds),
)  # fmt: skip
