"""Commands to try, below the options of every ``--help``."""

import typer

from nestling.cli.words import CacheCommand, EncoderCommand, WordedCommand, WordedGroup

COMMANDS = {"kv": CacheCommand, "embed": EncoderCommand}
NOTES = {
    "demo": "A demo needs no network where its model is installed, and writes a page that any browser shows.",
    "": "The page is on this machine, and nothing of it is fetched from elsewhere.",
}

EXAMPLES = {
    "kv fit": (
        "nestling kv fit smollm2 --out adapter",
        "nestling kv fit smollm2 --out adapter --text book.txt --minutes 20",
    ),
    "kv train": ("nestling kv train smollm2 --out trained --text book.txt --tokens 200000",),
    "kv search": ("nestling kv search smollm2 adapter --out searched",),
    "kv eval": ("nestling kv eval smollm2 --budgets 50%,25%,12.5% --json rows.json",),
    "kv generate": ("nestling kv generate smollm2 --prompt 'The lighthouse keeper' --budget 25%",),
    "kv serve": ("nestling kv serve smollm2 --budget 25% --port 8000",),
    "kv inspect": ("nestling kv inspect smollm2 --budget 25%",),
    "embed align": ("nestling embed align minilm --out elastic --text documents.jsonl",),
    "embed train": ("nestling embed train minilm --out elastic --pairs pairs.jsonl --sts dev.jsonl",),
    "embed pretrain": ("nestling embed pretrain minilm --out pretrained --text documents.jsonl --steps 1000",),
    "embed eval": ("nestling embed eval elastic --sts dev.jsonl --html sizes.html",),
    "embed export": ("nestling embed export elastic --out small --size 2x64",),
    "embed encode": (
        "nestling embed encode minilm --text corpus.jsonl --sizes 3x256,6x384 --out vectors",
        "nestling embed encode minilm --text corpus.jsonl --sizes 3x256,6x384 --out vectors --engine processes",
        "nestling embed encode minilm --text corpus.jsonl --sizes 3x256,6x384 --out vectors --backend onnx-int8",
    ),
    "embed search": ("nestling embed search minilm --vectors vectors --query 'a young bird' --top 5",),
    "demo kv": ("nestling demo kv --out report.html",),
    "demo embed": ("nestling demo embed --keep models",),
    "play": ("nestling play", "nestling play --model MODEL --adapter adapter --encoder elastic --port 7861"),
}


def add_examples(wings: dict[str, typer.Typer]) -> None:
    """Give every command of the wings its words and examples; commands of no wing are under an empty name."""
    for wing, app in wings.items():
        app.info.cls = WordedGroup
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "")
            examples = EXAMPLES.get(f"{wing} {name}".strip(), ())
            title = "Example:" if len(examples) == 1 else "Examples:"
            command.cls = COMMANDS.get(wing, WordedCommand)
            command.epilog = "\n\n".join([*filter(None, [NOTES.get(wing)]), title, *examples])
