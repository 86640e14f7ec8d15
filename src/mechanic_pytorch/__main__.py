"""The command `mechanic`, as `python -m mechanic_pytorch`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, if what it is made of is installed."""
    try:
        from mechanic_pytorch.scripts import run
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package not in ("click", "rich"):
            raise
        sys.exit(
            f"mechanic: the command needs click and rich. Got no module named {package!r}. "
            "Remedy: pip install 'mechanic-pytorch[run]'."
        )
    run.main()


if __name__ == "__main__":
    main()
