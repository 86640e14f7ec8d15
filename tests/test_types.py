"""What type checkers and editors see."""

from pathlib import Path

import pytest
import torch
from mypy import api

import typing_cases
from mechanic_pytorch import optim
from mechanic_pytorch._classes import _OPTIONS
from tools import stubs

CASES = Path(typing_cases.__file__)


def test_the_stubs_are_those_that_the_tool_writes():
    for name, text in stubs.STUBS.items():
        found = (stubs.PACKAGE / name).read_text()
        if not found.startswith(stubs.HEAD):
            pytest.skip(f"written for another torch than {torch.__version__}, whose optimizers take other arguments")
        assert found == text(), f"{name}. Remedy: python tools/stubs.py"


def test_the_stub_has_the_names_and_options_that_there_are():
    text = stubs.optim_stub()
    assert all(f"    {option}: " in text for option in _OPTIONS)
    assert all(f"\n{name} = Mechanized{name}\n" in text for name in dir(optim))
    assert all(getattr(optim, name) is getattr(optim, f"Mechanized{name}") for name in dir(optim))


def test_mypy_accepts_right_uses_and_no_others(monkeypatch):
    monkeypatch.setenv("MYPYPATH", str(stubs.PACKAGE.parent))
    output, errors, _ = api.run(["--strict", "--follow-imports=silent", "--config-file=", str(CASES)])
    assert output == "Success: no issues found in 1 source file\n", output + errors


def test_right_uses_run():
    typing_cases.right([torch.zeros(3, requires_grad=True)])
