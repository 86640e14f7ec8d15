"""The shape of the house: what imports what, how long the one file is, that every public name is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import mechanic_pytorch
import mechanic_pytorch.optim

PACKAGE = Path(mechanic_pytorch.__file__).parent
ALLOWED = {
    "__main__": {"_run"},
    "__init__": {"_patch", "mechanic", "optim"},
    "_base": set(),
    "_buckets": {"_state", "distributed", "kernels"},
    "_classes": {"_config"},
    "_config": set(),
    "_control": {"_base", "_buckets", "_state", "_steps", "distributed"},
    "_fused": {"_base", "_buckets", "distributed", "kernels"},
    "_patch": {"_base", "_state", "mechanic"},
    "_report": {"_base", "_patch", "telemetry"},
    "_run": {"_config", "_patch", "_report"},
    "_start": {"_base", "_buckets", "_control", "_state", "distributed"},
    "_state": {"_config", "distributed"},
    "_steps": {"_base", "_buckets", "_state", "_warnings"},
    "_warnings": {"_base", "_buckets", "_state", "distributed"},
    "distributed": set(),
    "integrations": {"telemetry"},
    "kernels": set(),
    "mechanic": {
        *("_base", "_buckets", "_classes", "_config", "_control", "_fused", "_start", "_state", "_steps", "_warnings"),
        "distributed",
    },
    "optim": {"_classes", "mechanic"},
    "telemetry": {"_base", "_state", "kernels", "mechanic"},
}
# What the extras bring, and where alone it is imported; nothing but the command or the user imports these files.
OPTIONAL = {
    "_report.py": {"matplotlib", "rich"},
    "_run.py": {"click"},
    "huggingface.py": {"transformers"},
    "lightning.py": {"lightning", "pytorch_lightning"},
    "triton.py": {"triton"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "mechanic_pytorch":
                assert rest[0] in ALLOWED[room] | {room}, f"{path.name} imports {name}"
            else:
                own = {"torch", *OPTIONAL.get(path.name, ())}
                assert top in own or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import torch, sys; before = set(sys.modules); import mechanic_pytorch\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new == {'mechanic_pytorch'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_may_be_built_without_distributed():
    """Its module is then almost empty, as it is in some builds for macOS and for embedded devices."""
    code = (
        "import torch, torch._dynamo, torch.distributed as dist\n"
        "for name in [name for name in vars(dist) if name[0] != '_' and name != 'is_available']: delattr(dist, name)\n"
        "dist.is_available = lambda: False\n"
        "import mechanic_pytorch\n"
        "p = torch.ones(3, requires_grad=True)\n"
        "optimizer = mechanic_pytorch.optim.SGD([p], lr=1.0)\n"
        "for _ in range(3): p.grad = torch.ones(3); optimizer.step()\n"
        "assert 0 < optimizer.scale < 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_file_that_teaches_the_algorithm_is_short():
    """Lines of code: no blank lines, comments or docstrings."""
    tree = ast.parse((PACKAGE / "mechanic.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    assert len(ast.unparse(tree).splitlines()) <= 180


def test_integrations_are_short():
    for path in (PACKAGE / "integrations").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path.name


def test_every_public_name_has_a_docstring_with_an_example():
    for name in mechanic_pytorch.__all__:
        assert "Example:\n" in getattr(mechanic_pytorch, name).__doc__, name
    public = [value for name, value in vars(mechanic_pytorch.Mechanic).items() if not name.startswith("_")]
    documented = [value for value in public if callable(value) or isinstance(value, property)]
    assert len(documented) >= 7
    assert all(value.__doc__ for value in documented)
    assert "Example:\n" in mechanic_pytorch.optim.__doc__
