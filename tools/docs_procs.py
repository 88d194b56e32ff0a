"""How `show_doc` cells of the docs are run: against the exported module.

nbdev's own processor runs a notebook's imports and exported cells one by one; a function whose annotation names a class
defined further down, or imported for type checking only, cannot be shown that way. Named in settings.ini under `procs`."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

from execnb.shell import CaptureShell
from nbdev.process import Processor


class show_docs_of_module(Processor):
    "Run the `show_doc` cells of a chapter with the names of its module."
    def begin(self) -> None:
        chapter = re.fullmatch(r"\d\d_(.+)", Path(self.nb.path_).stem)  # it exports the module of its own name
        self.shell = None
        if not chapter: return  # the landing page
        module = importlib.import_module(f"fundamentallm.{chapter[1]}")
        for node in ast.parse(inspect.getsource(module)).body:  # annotations are evaluated: what they name must be there
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), vars(module))
        self.shell = CaptureShell()
        self.shell.user_ns.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
        self.shell.run_cell("from nbdev.showdoc import show_doc")

    def __call__(self, cell) -> None:  # type: ignore[no-untyped-def]
        if not self.shell or cell.cell_type != "code" or not re.search(r"^show_doc\(", cell.source or "", re.M): return
        self.shell.cell(cell)
        if self.shell.exc: raise RuntimeError(f"cannot document: {cell.source}") from self.shell.exc
