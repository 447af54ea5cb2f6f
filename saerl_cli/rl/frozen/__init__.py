"""What training cannot change, computed once a rollout: the layers below the splice, completions, the head."""
