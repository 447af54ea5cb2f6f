"""Sparse autoencoders: the module, its files, training, metrics and the job behind `saerl train-sae`."""
