"""Files of results, as `nestling.report.page.write_json` writes them: flat rows, and how they were made."""

import os
from typing import Any

from nestling.errors import NestlingError
from nestling.files.fields import Fields
from nestling.files.reading import read_object, short


def read_rows(path: str | os.PathLike[str], error: type[NestlingError]) -> list[dict[str, Any]]:
    """The rows of a results file.

    Raises:
        error: it cannot be read, or has no flat rows.
    """
    rows = Fields(path, read_object(path, error), error).objects("rows")
    found = [dict(row.values) for row in rows]
    for number, row in enumerate(found, 1):
        if nested := [name for name, value in row.items() if isinstance(value, list | dict)]:
            raise error(f"{path}, row {number}: {short(nested[0])} must be one value, got {short(row[nested[0]])}")
    return found
