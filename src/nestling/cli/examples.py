"""What stands below the options of every ``--help``: the words that it uses, and commands to try."""

import typer

KV_TERMS = (
    "Words: a BUDGET is a share of the full cache's bytes (0.5, 50, 50% or 8bits, of the 16 that a number has there), "
    "or a limit such as 64MiB. SINKS and WINDOW are the first and the last tokens, which stay exact. An ADAPTER holds "
    "the bases that keys and values are stored in."
)
EMBED_TERMS = (
    "Words: a SIZE, such as 2x64, is an encoder's first 2 layers and 64 numbers for each text. A LADDER is all of its "
    "sizes. A PROJECTION is a matrix that turns what a layer says into the numbers of a size."
)
DEMO_TERMS = "A demo needs no network where its model is installed, and writes a page that any browser shows."
PLAY_TERMS = "The page is on this machine, and nothing of it is fetched from elsewhere."
TERMS = {"kv": KV_TERMS, "embed": EMBED_TERMS, "demo": DEMO_TERMS, "": PLAY_TERMS}

EXAMPLES = {
    "kv fit": ("nestling kv fit smollm2 --out adapter", "nestling kv fit smollm2 --out adapter --text book.txt"),
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
    ),
    "embed search": ("nestling embed search minilm --vectors vectors --query 'a young bird' --top 5",),
    "demo kv": ("nestling demo kv --out report.html",),
    "demo embed": ("nestling demo embed --keep models",),
    "play": ("nestling play", "nestling play --model MODEL --adapter adapter --encoder elastic --port 7861"),
}


def add_examples(wings: dict[str, typer.Typer]) -> None:
    """Give every command of the wings its words and examples; commands of no wing are under an empty name."""
    for wing, app in wings.items():
        for command in app.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "")
            examples = EXAMPLES.get(f"{wing} {name}".strip(), ())
            title = "Example:" if len(examples) == 1 else "Examples:"
            command.epilog = "\n\n".join([TERMS[wing], title, *examples])
