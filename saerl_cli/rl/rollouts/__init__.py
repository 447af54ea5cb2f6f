"""What a rollout is made of: sampling, scoring inside the forward pass, and the frozen part computed once."""
