"""What RLHF did to the features: one file a question."""
