"""What `saerl COMMAND --help` says of a command by examples: the sections of examples.md."""

import re
from pathlib import Path


def examples() -> dict[str, str]:
    """Read the examples as Typer's epilogs, by command: paragraphs that keep their lines, commands indented."""
    _, *sections = (Path(__file__).parent / "examples.md").read_text().split("\n## saerl ")
    return {name: epilog(text) for name, text in (section.split("\n", 1) for section in sections)}


def epilog(text: str) -> str:
    """Write Markdown as an epilog: fences and table rules go, and Click leaves the lines of a paragraph as they are."""
    indented = re.sub(r"```bash\n(.*?)```", lambda block: re.sub("^", "  ", block[1], flags=re.M), text, flags=re.S)
    plain = re.sub(r"^\|---.*\n", "", indented, flags=re.M).replace("`", "")
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in re.split(r"\n\s*\n", plain.rstrip().lstrip("\n")))
