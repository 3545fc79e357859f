"""Checks the types of the package: `python tests/typecheck.py [MODULE ...]` runs mypy.

Methods that notebooks attach with `@patch` are unknown to type checkers. So a copy of the package
is checked in which each such function is in the body of its class.
"""

import ast
import os
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


def fold(source: str) -> str:
    "The module with every patched function inside its class, at the end of the body."
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    left = []
    for node in tree.body:
        if not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_patch(node)):
            left.append(node)
            continue
        first = node.args.args[0]
        owner = (
            classes.get(ast.unparse(first.annotation).strip("'\"")) if first.annotation else None
        )
        if owner is None:
            left.append(node)
            continue
        kept = []
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            if text == "patch(as_prop=True)":
                kept.append(ast.Name("property", ast.Load()))
            elif text == "patch(cls_method=True)":
                kept.append(ast.Name("classmethod", ast.Load()))
            elif text != "patch":
                kept.append(decorator)
        node.decorator_list = kept
        first.annotation = None
        owner.body.append(node)
    tree.body = left
    return ast.unparse(ast.fix_missing_locations(tree))


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
