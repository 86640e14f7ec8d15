"""Run every ```python block of the given Markdown files, each in a namespace of its own."""

import re
import sys
import textwrap
from pathlib import Path

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)  # indented, too: in a list, say


def main(paths: list[str]) -> None:
    """Execute the blocks in order; the first error ends the run with a traceback that names file and line."""
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        blocks = list(BLOCK.finditer(text))
        for block in blocks:
            line = text.count("\n", 0, block.start(2))
            exec(compile("\n" * line + textwrap.dedent(block[2]), path, "exec"), {"__name__": "__main__"})
        print(f"{path}: {len(blocks)} blocks ran")


if __name__ == "__main__":
    main(sys.argv[1:])
