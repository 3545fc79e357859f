"""Checks the types of the package: `python tests/typecheck.py [MODULE ...]` runs mypy.

Methods that notebooks attach with `@patch` are unknown to type checkers. So a copy of the package
is checked in which each such function is in the body of its class.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def is_patch(node: ast.AST) -> bool:
    "Whether a function is decorated with fastcore's `patch`."
    decorators = getattr(node, "decorator_list", [])
    names = [ast.unparse(d) for d in decorators]
    return any(name == "patch" or name.startswith("patch(") for name in names)


def _method(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    "The lines of a patched function as those of a method."
    kinds = {
        "patch": "",
        "patch(as_prop=True)": "@property",
        "patch(cls_method=True)": "@classmethod",
    }
    decorators = [ast.unparse(d) for d in node.decorator_list]
    head = [kinds.get(d, f"@{d}") for d in decorators]
    first = node.args.args[0]
    owner = ast.unparse(first.annotation) if first.annotation else ""
    body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    body = re.sub(rf"\b{first.arg}: ['\"]?{re.escape(owner)}['\"]?", first.arg, body, count=1)
    return ["", *(f"    {line}" for line in [*filter(None, head), *body.split("\n")])]


def fold(source: str) -> str:
    "The module with every patched function inside its class, at the end of the class's body."
    tree, lines = ast.parse(source), source.split("\n")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    methods: dict[str, list[str]] = {}
    for node in tree.body:
        if not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_patch(node)):
            continue
        annotation = node.args.args[0].annotation
        owner = ast.unparse(annotation).strip("'\"") if annotation else ""
        if owner in classes:
            methods.setdefault(owner, []).extend(_method(lines, node))
            for k in range(node.decorator_list[0].lineno - 1, node.end_lineno or 0):
                lines[k] = ""
    for name in sorted(methods, key=lambda name: -(classes[name].end_lineno or 0)):
        end = classes[name].end_lineno or 0
        lines[end:end] = methods[name]
    return "\n".join(lines)


def main(modules: list[str]) -> int:
    "mypy's exit status. Lines are those of the folded copy; names say where to look."
    with tempfile.TemporaryDirectory(prefix="musicgen-types-") as folder:
        for file in sorted((REPO / "musicgen").rglob("*.py")):
            if file.stem == "_modidx":
                continue
            copy = Path(folder) / file.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(fold(file.read_text("utf-8")), "utf-8")
        named = [arg for module in modules for arg in ("-m", module)]
        command = [sys.executable, "-m", "mypy", "--config-file", str(REPO / "pyproject.toml")]
        command += ["--cache-dir", str(REPO / ".mypy_cache"), *(named or ["-p", "musicgen"])]
        return subprocess.run(command, cwd=folder, env=os.environ | {"MYPYPATH": folder}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
