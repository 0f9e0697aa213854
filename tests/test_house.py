"""The rooms of the package: each folder imports only from those above it in CONTRIBUTING.md, and no files import each other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports():
    """module -> the project's modules that it imports, for type checking alone left out."""
    files = {module_of(path): path for path in (ROOT / "llava").rglob("*.py")}
    files |= {f"llava.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    found = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ignored = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                ignored |= {id(inner) for inner in ast.walk(node)}
        names = set()
        for node in ast.walk(tree):
            if id(node) in ignored:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            elif isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
        # A package's own __init__ is imported with every file of it.
        found[module] = {name for name in names if name in files and name != module}
        deeper = {name for name in found[module] if any(other.startswith(f"{name}.") for other in found[module])}
        found[module] -= {name for name in deeper if files[name].name == "__init__.py"}
    return found


def order():
    """Folders in the order of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| folder | what is in it |") :].split("\n\n")[0]
    return [name for line in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", line.split("|")[1])]


def room(module, rooms):
    parts = module.split(".")[1:]
    return next((name for size in (2, 1) if (name := ".".join(parts[:size])) in rooms), None)


def test_each_folder_imports_only_from_those_above_it():
    rooms, wrong = order(), []
    assert len(rooms) == len(set(rooms)) > 20
    for module, others in imports().items():
        if module == "llava":
            continue
        assert room(module, rooms), f"{module} is in no folder of the table in CONTRIBUTING.md"
        for other in others - {"llava"}:
            if rooms.index(room(other, rooms)) > rooms.index(room(module, rooms)):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_no_files_import_each_other():
    edges, done, path = imports(), set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(edges[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in sorted(edges):
        visit(module)


def test_commands_are_what_lies_on_top():
    """A file directly in llava/eval or llava/serve can be run."""
    for folder in ("eval", "serve"):
        for path in sorted((ROOT / "llava" / folder).glob("*.py")):
            if path.name != "__init__.py":
                assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"), path
