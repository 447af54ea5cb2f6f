"""`saerl train-reward`: a reward model from preference pairs, on TRL's RewardTrainer."""
