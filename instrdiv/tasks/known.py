"""Tasks by name: the built-in ones, imported when config.json names them, and those that a user's file defines."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.task import BUILT_IN, TASKS, Task


def find_task(name: str) -> type[Task] | None:
    """The task with this name; None if it is not defined."""
    if name not in TASKS and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    return TASKS.get(name)


def load_file(path: str) -> ModuleType:
    """Imports a Python file so that the tasks it defines are registered. Raises BadInput if that fails.

    A file that was imported before, under any name, is not imported again.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"--task={path}: there is no such file; give the Python file that defines the task")
    name = str(file.resolve())  # unique, so that a task in json.py is not mistaken for the module json
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == name and known.__name__ != "__main__":
            return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BadInput(f"--task={path}: is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        said = " ".join(str(error).split())
        raise BadInput(f"--task={path}: cannot be imported ({type(error).__name__}: {said})") from error
    return module
