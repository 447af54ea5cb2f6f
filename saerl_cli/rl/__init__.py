"""PPO: its mathematics, a trainer on TRL's GRPOTrainer, prompts, measurement, and the jobs `rlhf` and `evaluate`."""
