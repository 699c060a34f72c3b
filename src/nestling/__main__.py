"""The command line without its script: ``python -m nestling kv inspect smollm2``."""

from nestling.cli import app

if __name__ == "__main__":
    app(prog_name="nestling")
