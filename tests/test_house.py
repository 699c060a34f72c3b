"""The house: rooms without circles, wings that do not know each other, files and functions of a size that can be read.

``python -m tests.test_house`` prints it.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "nestling"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}
MOST_LINES = 350
MOST_PARAMETERS = 8
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Kernels take strides and sizes one by one: what calls them has few parameters.
KERNELS = ("kv.quantisation.triton._score", "kv.quantisation.triton._scored", "kv.quantisation.triton._weighted")
# A room may import those before it: basis, errors and the like belong to none. `cli` shows both wings.
ROOMS = ("files", "data", "jobs", "report", "kv", "embed", "integrations", "cli")
KV = ("quantisation", "allocation", "integration", "cache", "simulation", "calibration", "training", "evaluation")
EMBED = ("model", "evaluation", "export", "training", "pretraining", "corpus", "search")


def module(name: str) -> str:
    """The file that an imported name is in."""
    name = name.removeprefix("nestling").lstrip(".")
    while name and name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__".lstrip(".")


def for_types(tree: ast.Module) -> set[ast.AST]:
    """What is imported for annotations alone."""
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {node for guard in guards for node in ast.walk(guard)}


def imports() -> dict[str, set[str]]:
    """For each file those that it imports, when it is imported or later."""
    found = defaultdict(set)
    for name, tree in TREES.items():
        for node in set(ast.walk(tree)) - for_types(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nestling"):
                found[name] |= {module(f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Import):
                found[name] |= {module(alias.name) for alias in node.names if alias.name.startswith("nestling")}
    return found


def rooms(depth: int) -> dict[str, set[str]]:
    """The same between folders. An ``__init__`` belongs to those who look in from outside."""
    found = defaultdict(set)
    for name, others in imports().items():
        for other in others:
            if not name.endswith("__init__") and not other.endswith("__init__"):
                here, there = (".".join(part.split(".")[:depth]) for part in (name, other))
                if here != there:
                    found[here].add(there)
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every arrow that closes a circle."""
    closing, done, path = [], set(), []

    def walk(node: str) -> None:
        path.append(node)
        for other in graph.get(node, ()):
            if other in path:
                closing.append(f"{node} -> {other}")
            elif other not in done:
                walk(other)
        done.add(path.pop())

    for node in sorted(graph):
        if node not in done:
            walk(node)
    return closing


def upward(graph: dict[str, set[str]], order: tuple[str, ...], prefix: str = "") -> list[str]:
    """Arrows from a room to one that stands behind it."""
    floor = {f"{prefix}{room}": number for number, room in enumerate(order)}
    return [
        f"{here} -> {there}"
        for here, others in sorted(graph.items())
        for there in sorted(others)
        if here in floor and there in floor and floor[here] < floor[there]
    ]


def functions() -> dict[str, int]:
    """How many parameters each function has, without self; those of classes and functions under both names."""
    counts = {}

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs)]
                counts[inner] = len([n for n in names if n not in ("self", "cls")])
            walk(child, inner)

    for name, tree in TREES.items():
        walk(tree, name)
    return counts


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_no_circles(depth):
    assert not circles(rooms(depth))


def test_no_arrow_points_up():
    assert not upward(rooms(1), ROOMS)
    assert not upward(rooms(2), KV, "kv.")
    assert not upward(rooms(2), EMBED, "embed.")


def test_the_wings_do_not_know_each_other():
    crossing = [
        (name, other)
        for name, others in imports().items()
        for other in others
        if {name.split(".")[0], other.split(".")[0]} == {"kv", "embed"}
    ]
    assert not crossing
    for last, allowed in (("cli", ("cli", "__main__")), ("integrations", ("cli", "integrations"))):
        assert not [
            name
            for name, others in imports().items()
            if name.split(".")[0] not in allowed and any(other.split(".")[0] == last for other in others)
        ]


def test_an_integration_knows_one_wing():
    """The playground shows both, as the command line does; each of its files knows one at most."""
    rooms_of = defaultdict(set)
    for name, others in imports().items():
        if name.startswith("integrations."):
            room = name if name.startswith("integrations.play.") else name.split(".")[1]
            rooms_of[room] |= {other.split(".")[0] for other in others} & {"kv", "embed"}
    assert not {name for name, wings in rooms_of.items() if len(wings) > 1}


def test_files_can_be_read_at_one_sitting():
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_no_function_takes_many_options():
    assert {name for name, count in functions().items() if count > MOST_PARAMETERS} == set(KERNELS)


def test_public_names_have_docstrings():
    bare = []
    for name, tree in TREES.items():
        nodes = [tree, *(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_")]
        bare += [f"{name}.{getattr(node, 'name', '')}" for node in nodes if not ast.get_docstring(node)]
    assert not bare


if __name__ == "__main__":
    sizes = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    wide = {name: count for name, count in functions().items() if count > MOST_PARAMETERS}
    up = upward(rooms(1), ROOMS) + upward(rooms(2), KV, "kv.") + upward(rooms(2), EMBED, "embed.")
    largest, widest = max(sizes, key=sizes.__getitem__), max(functions(), key=functions().__getitem__)
    print(f"{len(FILES)} files, {sum(sizes.values()):,} lines; {len(rooms(1))} rooms")
    print(f"circles {len(circles(rooms(9)) + circles(rooms(2)) + circles(rooms(1)))}, arrows up {len(up)}")
    print(f"largest file {largest} ({sizes[largest]} lines), most parameters {widest} ({functions()[widest]})")
    print(f"{len(wide)} functions with more than {MOST_PARAMETERS}: {', '.join(sorted(wide))}")
