"""Random streams: a seed for every purpose, from the run's seed and numbers that say what it is for."""


def derived_seed(*numbers: int) -> int:
    """Give a 32-bit seed that depends on every one of the numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
