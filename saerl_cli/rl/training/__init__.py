"""PPO's mathematics and the trainers: ours on TRL's GRPOTrainer, and TRL's own made exact."""
