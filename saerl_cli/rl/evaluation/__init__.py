"""What a policy does on fresh samples, and against what: `saerl evaluate` and its parts."""
