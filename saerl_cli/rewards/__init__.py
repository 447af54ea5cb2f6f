"""From a completion to a score: named parts, their weighted sum, and what the scores look like before training."""
