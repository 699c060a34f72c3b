"""The wing is an extra: the library imports without it, and says what is missing."""

import subprocess
import sys

from nestling import embed


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_library_does_not_import_the_wing():
    code = "import sys, nestling; print([m for m in sys.modules if 'transformers' in m])"
    assert run(code) == "[]"


def test_what_is_missing_is_named():
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "import nestling\n"
        "try: nestling.embed.ElasticEncoder\n"
        "except ImportError as error: print(error)"
    )
    assert run(code) == "nestling.embed needs sentence-transformers: pip install 'nestling[embed]'"


def test_names():
    assert all(hasattr(embed, name) for name in embed.__all__)
