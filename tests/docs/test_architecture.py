"""docs/architecture.md: the printed tree is the tree."""

import re

from tests.docs.pages import ROOT

SOURCE = ROOT / "src" / "nestling"


def printed() -> set[str]:
    """The Python files that the page lists, by their indentation; the command line is listed as one."""
    block = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("src/nestling/\n", 1)[1].split("\n\n", 1)[0]
    above: list[tuple[int, str]] = []
    files = set()
    for line in block.splitlines():
        match = re.match(r"( +)([\w.-]+/?)(?:\s|$)", line)
        if not match or not match[2].endswith(("/", ".py")):
            continue  # the rest of the remark above
        indent, name = len(match[1]), match[2]
        above = [entry for entry in above if entry[0] < indent]
        if name.endswith("/"):
            above.append((indent, name))
        else:
            files.add("".join(folder for _, folder in above) + name)
    return files


def test_the_tree_of_the_page_has_every_file_and_no_other():
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    assert printed() == {name for name in there if not name.startswith("cli/")}
