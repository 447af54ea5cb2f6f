"""Experiments as graphs of stages: planned, run by Snakemake, compared with what their cards recorded."""
