"""For the API page: what docstrings have under `Example:` is set as code, which griffe does for `Examples:` alone."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section as a docstring is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of a class, a function, an attribute or a module."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
