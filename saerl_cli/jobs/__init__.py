"""One file a command: `check`, what is refused before work, and `work`.

`work` calls the stages above and hands what they found to `report/`.

To add a command you write
  1. `saerl_cli/jobs/NAME.py` with `check(config)` and `work(config, run, accelerator)`;
  2. `NameConfig` in `saerl_cli/config/NAME.py`, a docstring under every field, and the root config `conf/NAME.yaml`;
  3. its name in `COMMANDS` (`saerl_cli/run/jobs.py`), and in `HERE` if it starts no workers: `work(config, run)`;
  4. a function of three lines in `saerl_cli/cli.py`, and its examples in `saerl_cli/run/examples.md`.
"""
