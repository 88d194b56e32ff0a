"The rules of the house that no general linter knows; `make lint` runs them. Each finding is one line: file, what, cure."
from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "fundamentallm"
NAME = re.compile(r"(\d\d)_([a-z0-9_.]+)\.ipynb")


def chapters() -> dict[str, int]:
    "Module name -> chapter number."
    return {m[2]: int(m[1]) for p in NBS.glob("*.ipynb") if (m := NAME.fullmatch(p.name))}


def code_cells(path: Path) -> Iterator[str]:
    "The source of each code cell, magics and shell lines left out."
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == "code": yield "\n".join("" if re.match(r"\s*[%!]", s) else s for s in c.source.splitlines())


def check_names() -> Iterator[str]:
    "Numbers are unique; each notebook exports the module of its own name."
    seen: dict[str, str] = {}
    for p in sorted(NBS.glob("*.ipynb")):
        if p.name == "index.ipynb": continue
        m = NAME.fullmatch(p.name)
        if not m: yield f"{p.name}: name it NN_module.ipynb"; continue
        if m[1] in seen: yield f"{p.name}: number {m[1]} is taken by {seen[m[1]]}; take the next free one of its decade"
        seen[m[1]] = p.name
        exported = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_cells(p)), re.M)
        if exported != [m[2]]: yield f"{p.name}: exports {exported}; it must export exactly {m[2]!r}"


def imported_modules(source: str) -> Iterator[str]:
    "The modules of the package that a cell imports, wherever the import stands."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fundamentallm":
            tail = (node.module or "").split(".")[1:]
            if tail: yield ".".join(tail)
            else: yield from (a.name for a in node.names if not a.name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".", 1)[1] for a in node.names if a.name.startswith("fundamentallm."))


def check_order() -> Iterator[str]:
    "A notebook imports only from notebooks with a lower number (its own module it may import too)."
    numbers = chapters()
    for p in sorted(NBS.glob("*.ipynb")):
        m = NAME.fullmatch(p.name)
        if not m: continue
        for source in code_cells(p):
            try: names = list(imported_modules(source))
            except SyntaxError as e: yield f"{p.name}: a cell does not parse: {e}"; continue
            for name in names:
                if name in numbers and numbers[name] > int(m[1]): yield f"{p.name}: imports {name}, which comes later ({numbers[name]}); move the code to the later chapter"
                if name not in numbers: yield f"{p.name}: imports fundamentallm.{name}, which no notebook exports"


def commented(lines: list[str], node: ast.AST) -> bool:
    "Is there a comment on the line where this argument or field ends?"
    return "#" in lines[node.end_lineno - 1][node.end_col_offset:]  # type: ignore[attr-defined]


def check_function(where: str, lines: list[str], f: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    "Docstring, and a docment for each parameter."
    if f.name != "__init__" and not ast.get_docstring(f): yield f"{where}: no docstring"
    args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
    for a in args:
        if a.arg not in ("self", "cls") and not commented(lines, a): yield f"{where}: parameter {a.arg} has no comment on its line saying what it is"


def check_class(where: str, lines: list[str], c: ast.ClassDef, inherited: set[str]) -> Iterator[str]:
    "Docstring, documented methods, and a comment or a description for each field of a dataclass or pydantic model."
    if not ast.get_docstring(c): yield f"{where}: no docstring"
    typed = any("dataclass" in ast.unparse(d) for d in c.decorator_list) or any(ast.unparse(b).endswith(("BaseModel", "Settings")) for b in c.bases)
    for n in c.body:
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and (not n.name.startswith("_") or n.name == "__init__") and n.name not in inherited:
            yield from check_function(f"{where}.{n.name}", lines, n)
        elif typed and isinstance(n, ast.AnnAssign) and not ast.unparse(n.target).startswith(("_", "model_config")) and "ClassVar" not in ast.unparse(n.annotation):
            if "description=" not in ast.unparse(n) and not commented(lines, n): yield f"{where}.{ast.unparse(n.target)}: say what it is and its unit, in a comment or Field(description=...)"


def check_documented() -> Iterator[str]:
    "Every exported public name has a docstring and documented parameters."
    for p in sorted(LIB.rglob("*.py")):
        if p.name.startswith("_"): continue
        text = p.read_text("utf-8"); lines = text.splitlines()
        body = ast.parse(text).body
        methods = {c.name: {m.name for m in c.body if isinstance(m, ast.FunctionDef)} for c in body if isinstance(c, ast.ClassDef)}
        for n in body:
            if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or n.name.startswith("_"): continue
            where = f"{p.relative_to(ROOT)}:{n.lineno} {n.name}"
            if isinstance(n, ast.ClassDef):  # a method that a documented base of the same module has inherits its documentation
                yield from check_class(where, lines, n, set().union(*(methods.get(ast.unparse(b), set()) for b in n.bases)))
            else: yield from check_function(where, lines, n)


def check_stars() -> Iterator[str]:
    "No `import *` in exported code."
    for p in sorted(LIB.rglob("*.py")):
        if re.search(r"^\s*from \S+ import \*", p.read_text("utf-8"), re.M): yield f"{p.relative_to(ROOT)}: import * hides where names come from; import them by name"


def check_sidebar() -> Iterator[str]:
    "Every chapter is in the sidebar, and nothing else is."
    listed = re.findall(r"\S+\.ipynb", (NBS / "sidebar.yml").read_text("utf-8"))
    there = {p.name for p in NBS.glob("*.ipynb")}
    for n in sorted(there ^ set(listed)): yield f"nbs/sidebar.yml: {n} is {'missing' if n in there else 'listed but does not exist'}"


def state() -> dict[Path, str]:
    "A hash of every notebook, exported file and the README."
    files = [*NBS.glob("*.ipynb"), *LIB.rglob("*.py"), ROOT / "README.md"]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}


def check_drift() -> Iterator[str]:
    "Exporting, cleaning and writing the README change nothing: notebook, module and README say the same."
    before = state()
    bin = Path(sys.executable).parent
    for cmd in ([str(bin / "nbdev_export")], [str(bin / "nbdev_clean")], [sys.executable, str(ROOT / "tools" / "build_docs.py"), "--readme"]):
        done = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True)
        if done.returncode: yield f"{cmd[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
    after = state()
    for p in sorted(before.keys() | after.keys()):
        if before.get(p) != after.get(p): yield f"{p.relative_to(ROOT)}: was out of date and has been rewritten; commit it"


def main() -> int:
    found = 0
    for check in (check_names, check_order, check_stars, check_sidebar, check_documented, check_drift):
        rows = list(check())
        print(f"{'ok    ' if not rows else 'FAILED'} {(check.__doc__ or '').splitlines()[0]}")
        for r in rows: print("  ", r)
        found += len(rows)
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
