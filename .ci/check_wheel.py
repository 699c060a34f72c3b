"""Whether a wheel holds every file under ``src/nestling``, and nothing else but its own records.

``python .ci/check_wheel.py dist/*.whl``
"""

import sys
from pathlib import Path
from zipfile import ZipFile

SRC = Path(__file__).parents[1] / "src"

packed = {name for name in ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
needed = {
    str(path.relative_to(SRC))
    for path in (SRC / "nestling").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
if packed != needed:
    sys.exit(f"missing: {sorted(needed - packed)}\nnot ours: {sorted(packed - needed)}")
sys.stdout.write(f"{len(packed)} files\n")
