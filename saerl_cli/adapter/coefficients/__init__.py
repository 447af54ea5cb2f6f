"""Coefficients on the features of SAEs, laid out as PEFT's own methods are."""
