"""Forks of a Python that has imported torch, which takes seconds, where a test needs a new process.

`Python` starts such a Python, this file, once, and asks it for one fork after another that runs `-m module` or a
script. Each runs by the call that the interpreter itself makes for -m, and ends as the interpreter ends; none of our
modules is imported before it. `torchrun` does without the interpreter's part: it calls a function.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import uuid

# What multiprocessing's own server imports, from which torchrun() forks. It starts once: later packages come too late.
OF_TORCH = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.distributed.tensor.debug"]


def torchrun(function, *arguments, output, packages=OF_TORCH):
    """Call the function in two processes that start as with torchrun, but are forks; return what the first prints."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.get_context("forkserver").set_forkserver_preload(packages)
    name = uuid.uuid4().hex
    rendezvous = {"rdzv_backend": "static", "rdzv_configs": {"rank": 0}}  # without --standalone: that takes seconds
    rendezvous |= {"rdzv_endpoint": f"localhost:{get_free_port()}", "run_id": name}
    logs = DefaultLogsSpecs(log_dir=str(output), redirects=Std.ALL)
    config = LaunchConfig(1, 1, 2, logs, max_restarts=0, start_method="forkserver", **rendezvous)
    elastic_launch(config, function)(*arguments)
    (first,) = output.glob(f"{name}_*/attempt_0/0/stdout.log")
    return first.read_text(encoding="utf-8")


class Python:
    """A Python with one thread that has imported torch, and these packages."""

    def __init__(self, *packages, warnings="error"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self._server = subprocess.Popen([sys.executable, "-W", warnings, __file__, *packages], env=environment, **pipes)

    def run(self, arguments, directory, **options):
        """Return what subprocess.run returns; the output passes through two files in the directory."""
        out, err = (str(directory / name) for name in ("stdout of the fork", "stderr of the fork"))
        status = self.run_on(os.devnull, out, err, arguments, **options)
        texts = []
        for path in (out, err):
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
        return subprocess.CompletedProcess(arguments, status, *texts)

    def run_on(self, stdin, stdout, stderr, arguments, cwd=None, env=None):
        """Return the exit status; the streams are paths, `env` has what is added to the environment."""
        request = {"arguments": [*map(str, arguments)], "cwd": str(cwd or os.getcwd()), "env": env or {}}
        request["streams"] = [stdin, stdout, stderr]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return os.waitstatus_to_exitcode(int(self._server.stdout.readline()))

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def next_request():
    """Return a request, in a fork; the process itself answers with its status and ends when there is no other."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(os.waitpid(pid, 0)[1], flush=True)
    sys.exit()


def redirect(streams):
    for number, path in enumerate(streams):
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC if number else os.O_RDONLY
        file = os.open(path, flags | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)


if __name__ == "__main__":
    import gc
    import importlib
    import runpy
    import warnings

    import click  # noqa: F401
    import rich.console
    import rich.table  # noqa: F401
    import torch._dynamo  # noqa: F401  (which the first optimizer imports)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages say, and that a process of more than one thread forks
        for package in sys.argv[1:]:
            importlib.import_module(package)
        gc.freeze()  # else each fork would go through all that at its end
        request = next_request()
    redirect(request["streams"])
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    first, *sys.argv = request["arguments"]
    if first == "-m":
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(sys.argv[0])
    else:
        sys.path[0] = os.path.dirname(first)
        sys.argv = [first, *sys.argv]
        runpy.run_path(first, run_name="__main__")
