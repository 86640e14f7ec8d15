"""The shape of the house: what imports what, how long the one file is, that every public name is documented."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import mechanic_pytorch
import mechanic_pytorch.optim

PACKAGE = Path(mechanic_pytorch.__file__).parent
ALLOWED = {
    "__main__": {"scripts"},
    "__init__": {"_classes", "mechanic", "optim", "scripts"},
    "_auto": {"_config", "_numbers", "kernels"},
    "_base_step": {"_buckets", "_config", "_torch", "kernels"},
    "_buckets": {"_torch", "_config", "distributed", "kernels"},
    "_checkpoint": {"_auto", "_buckets", "_config", "_tuner", "distributed"},
    "_classes": {"_config", "_overloads", "mechanic"},
    "_config": set(),
    "_fused": {"_base_step", "_buckets", "_torch", "distributed", "kernels"},
    "_numbers": set(),
    "_torch": set(),
    "_tuner": {"_auto", "_base_step", "_buckets", "_config", "_numbers", "_torch"},
    "_watch": {"_buckets", "_config", "_torch", "_tuner", "distributed"},
    "distributed": set(),
    "integrations": {"_classes", "mechanic", "telemetry"},
    "kernels": {"_torch"},
    "mechanic": {
        *("_base_step", "_buckets", "_checkpoint", "_config", "_fused", "_numbers", "_torch", "_tuner", "_watch"),
        "distributed",
    },
    "optim": {"_classes"},
    "scripts": {"_classes", "_config", "_torch", "_tuner", "_watch", "mechanic", "telemetry"},
    "telemetry": {"_config", "_torch", "_tuner", "kernels", "mechanic"},
}
# What may be missing, and where alone it is imported. numpy comes with most builds of torch; extras bring the rest, and
# nothing but the command or the user imports these files.
OPTIONAL = {
    "_numbers.py": {"numpy"},
    "axolotl.py": {"axolotl"},
    "cli.py": {"click"},
    "live.py": {"rich"},
    "report.py": {"matplotlib", "rich"},
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
        "import sys, mechanic_pytorch; assert 'torch' not in sys.modules\n"
        "import torch; before = set(sys.modules)\n"
        "for name in mechanic_pytorch.__all__: getattr(mechanic_pytorch, name)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new == {'mechanic_pytorch'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_that_are_imported_when_they_are_asked_for_look_like_others():
    assert set(mechanic_pytorch.__all__) <= set(dir(mechanic_pytorch))
    assert not hasattr(mechanic_pytorch, "mechanise")
    code = "from mechanic_pytorch import *; optim.AdamW, Mechanic, is_mechanized, mechanize, patched"
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


def lines_of_code(node):
    """Count lines without blank ones, comments and docstrings; of a function, those of its body."""
    for each in ast.walk(node):
        if isinstance(each, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(each):
            each.body = each.body[1:] or [ast.Pass()]
    return sum(len(ast.unparse(statement).splitlines()) for statement in node.body)


def test_the_file_that_teaches_the_algorithm_is_short():
    tree = ast.parse((PACKAGE / "mechanic.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert lines_of_code(tree) <= 172
    assert lines_of_code(functions["step"]) <= 32
    assert lines_of_code(functions["tune"]) <= 12


def test_an_optimizer_is_an_object_with_a_type():
    """No function is a method that was cut off, with `optimizer: Any` for `self`."""
    annotated = [
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arg | ast.AnnAssign)
        and getattr(node, "arg", getattr(getattr(node, "target", None), "id", None)) == "optimizer"
        and isinstance(node.annotation, ast.Name)
        and node.annotation.id == "Any"
    ]
    assert len(annotated) <= 1, annotated


def test_the_class_is_not_handed_down():
    """A function that needs `Mechanic` imports it, or is a method of it."""
    handed_down = [
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id not in ("isinstance", "issubclass", "super")
        if any(isinstance(argument, ast.Name) and argument.id == "Mechanic" for argument in node.args)
    ]
    assert not handed_down, handed_down


def test_nobody_reaches_into_what_is_private_to_another_file():
    of_named_tuples = {"_asdict", "_fields", "_make", "_replace"}
    theirs = {*of_named_tuples, "_getframe", "_logger_connector", "_values"}
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        own = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch."):
                is_private = node.attr.startswith("_") and not node.attr.endswith("__")
                assert not is_private or node.attr in own | theirs, f"{path.name}:{node.lineno}: {node.attr}"
        for name in imports(path):
            last = name.split(".")[-1]
            is_private = name.startswith("mechanic_pytorch.") and last.startswith("_")
            assert not is_private or last in ALLOWED, f"{path.name} imports {name}"


def test_type_checkers_are_silenced_only_about_torchs_own_functions():
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert "type: ignore" not in line or re.search(r"\b(torch\.|_(un)?flatten_dense)", line), f"{path}:{number}"


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
