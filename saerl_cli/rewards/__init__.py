"""From a completion to a score: named parts, their weighted sum, and what the scores look like before training.

To add a reward you write
  1. an entry in `KINDS` (`saerl_cli/rewards/kinds.py`): its check before work and the function that scores;
  2. for settings of its own, fields of `RewardPart` (`saerl_cli/config/reward.py`) that say they belong to it;
  3. `conf/reward/NAME.yaml` with a part of that kind.
A function of yours needs none of this: `reward=python reward.parts.function.function=module:name`.
"""
