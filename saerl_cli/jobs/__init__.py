"""One file a command: `check`, what is refused before work, and `work`.

`work` calls the stages above and hands what they found to `report/`.
"""
