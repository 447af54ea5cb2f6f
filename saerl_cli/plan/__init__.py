"""Memory and time of a job before it runs: sizes from settings alone, times from a short probe of the machine."""
