"""Which features caused the reward: variants of a policy, keep-only curves, controls, interactions, agreement.

A variant is the policy with each of its coefficients scaled, mostly by 0 or 1. All variants answer the same prompts
with the same random numbers, so that differences are taken prompt by prompt; standard errors are over prompts. What is
found is a `saerl_cli.rl.results.Audit`.
"""
