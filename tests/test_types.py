"""What type checkers and editors see."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mypy import api

import typing_cases
from mechanic_pytorch import optim
from mechanic_pytorch._classes import _OPTIONS
from tools import stubs

CASES = Path(typing_cases.__file__)
PROJECT = CASES.parents[1] / "pyproject.toml"


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
    output, errors, _ = api.run(["--config-file", str(PROJECT), str(CASES)])  # as `make types`, which has read torch
    assert output == "Success: no issues found in 1 source file\n", output + errors


def test_pyright_accepts_right_uses_and_no_others(tmp_path):
    """Editors ask it, or what is built of it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = next(filter(None, (shutil.which(name, path=path) for name in ("pyright", "basedpyright"))), None)
    if found is None:
        pytest.skip("pip install basedpyright")
    cases = shutil.copy(CASES, tmp_path)  # where no configuration of ours counts
    config = {"extraPaths": [str(stubs.PACKAGE.parent)], "enableTypeIgnoreComments": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [found, "--outputjson", "--project", str(tmp_path), "--pythonpath", sys.executable]
    output = json.loads(subprocess.run(command, capture_output=True, check=False, text=True).stdout)
    errors = [each for each in output["generalDiagnostics"] if each["severity"] == "error"]
    lines = Path(cases).read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines) if "# type: ignore" in line}
    assert {each["range"]["start"]["line"] for each in errors} == wrong, errors


def test_right_uses_run():
    typing_cases.right([torch.zeros(3, requires_grad=True)])
