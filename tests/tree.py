"""The source tree as the tests of its rules see it: folders, files, and what a file imports and defines."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRONT, CPU, GPU, REFERENCE = ROOT / "cumoe", ROOT / "cpu", ROOT / "rawkernels", ROOT / "cumoe" / "reference"


def sources(folder):
    return sorted(path for path in folder.rglob("*.py"))


def written_files():
    for folder in ("cumoe", "cpu", "rawkernels", "tests", "benchmarks", "notebooks", ".ci"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    yield from (path for path in ROOT.iterdir() if path.is_file())


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree):
    """Yield (dotted name, at import time?) of everything that a module imports."""
    pending = [(node, True) for node in tree.body]
    while pending:
        node, at_import = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", at_import) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, at_import) for child in node.orelse]
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending += [(child, at_import and not inside) for child in ast.iter_child_nodes(node)]


def calls_of(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def signatures(source):
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = node.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            defaults = [ast.unparse(one) for one in (*arguments.defaults, *arguments.kw_defaults) if one is not None]
            found[node.name] = names, defaults
    return found
