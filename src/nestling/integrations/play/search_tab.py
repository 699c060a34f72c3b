"""The tab of encoders: one corpus, one query, two sizes of an encoder beside each other."""

from collections.abc import Iterator
from typing import Any

from nestling.data.texts import read_texts
from nestling.embed.demo import QUERIES, opening
from nestling.files.reading import read_text
from nestling.integrations.play.config import MOST_BYTES
from nestling.integrations.play.finder import Corpus, Finder, Results
from nestling.integrations.play.parts import Bar, html, line, of_page, shows, size_of
from nestling.integrations.play.sessions import Session, Sessions

SIDES = ("left", "right")
PARTS = ("found", *SIDES)
OWN, FULL = "each size its own", "the full encoder both"
HELP = (
    "A text encoder turns texts into vectors. Here one encoder has several sizes, named layers x numbers a vector: a "
    "small one takes fewer layers, so it is quicker, and shorter vectors, so its index is smaller. Two of them search "
    "the same texts."
)


class SearchTab:
    """What its button does; `build` puts it on a page.

    Args:
        finder: by any size of an encoder.
        sessions: of the visitors.
    """

    def __init__(self, finder: Finder, sessions: Sessions):
        self.finder, self.sessions = finder, sessions
        self.built_in = Corpus([opening(page) for page in read_texts(None)])  # whose indexes all visitors share

    def empty(self) -> dict[str, str]:
        """The parts before anything was searched."""
        press = line("Press Search: the texts are encoded first, which takes some seconds.")
        return {"found": press} | {side: _results(None, None) for side in SIDES}

    @shows(*PARTS)
    def search(
        self, session: Session, text: str, query: str, left: str, right: str, queries: str = OWN
    ) -> Iterator[None]:
        """Search texts, one a line or the built-in ones, by two sizes.

        Args:
            queries: `OWN`, or `FULL`: the query is encoded by the full size for both.
        """
        corpus = self._corpus(session, text)
        asked = [self.finder.full if queries == FULL else size for size in (left, right)]
        if any(size not in corpus.indexes for size in (left, right)):
            session.shown |= self.empty()
            session.shown["found"] = line(f"Encoding {len(corpus.texts):,} texts at {left} and {right} …", "working")
            yield
        self.finder.index(corpus, (left, right))
        pairs = zip((left, right), asked, strict=True)
        first, second = (self.finder.search(corpus, query, *pair) for pair in pairs)
        for side, results, other in (("left", first, second), ("right", second, first)):
            session.shown[side] = _results(results, other)
        same = len({text for text, _ in first.hits} & {text for text, _ in second.hits})
        session.shown["found"] = line(f"{same} of the {len(first.hits)} texts that each found are the same.")
        yield

    def _corpus(self, session: Session, text: str) -> Corpus:
        """The built-in corpus, or the visitor's own, whose indexes are kept as long as its text does not change."""
        if not text.strip():
            return self.built_in
        own = Corpus.of_lines(text)
        if session.corpus is None or session.corpus.texts != own.texts:
            session.corpus = own
        return session.corpus

    def load(self, file: str) -> str:
        """The text of an uploaded file."""
        return read_text(file, largest=MOST_BYTES)

    def build(self, gradio: Any, events: dict[str, Any]) -> None:
        """Put the tab's parts and events on the page that is being made.

        Args:
            events: options of every event.
        """
        empty, sizes = self.empty(), self.finder.sizes
        gradio.Markdown(HELP)
        with gradio.Row(equal_height=False):
            with gradio.Column(min_width=300):
                query = gradio.Textbox(QUERIES[0], label="A query")
                gradio.Examples([[each] for each in QUERIES], query, label="Or one of these")
            with gradio.Column(min_width=300):
                with gradio.Row():
                    left = gradio.Dropdown(sizes, value=sizes[0], label="One size", min_width=120)
                    right = gradio.Dropdown(sizes, value=sizes[-1], label="Another size", min_width=120)
                queries = gradio.Radio(
                    [OWN, FULL], value=OWN, label="The query is encoded by", visible=self.finder.one_space
                )
                search = gradio.Button("Search", variant="primary")
        parts = {"found": gradio.HTML(empty["found"])}
        with gradio.Row(equal_height=True):
            for side in SIDES:
                with gradio.Column(min_width=300):
                    parts[side] = gradio.HTML(empty[side])
        with gradio.Accordion("Search your own texts", open=False):
            text = gradio.Textbox(
                "",
                label=f"One text a line; empty: {len(self.built_in.texts)} pages of Python's help",
                lines=6,
                max_lines=12,
            )
            file = gradio.UploadButton("Load a .txt file", file_types=[".txt"], size="sm")
        inputs, outputs = [text, query, left, right, queries], [parts[name] for name in PARTS]
        search.click(of_page(gradio, self.search), inputs, outputs, **events)
        query.submit(of_page(gradio, self.search), inputs, outputs, **events)
        file.upload(self.load, file, text, queue=False)


def _results(results: Results | None, other: Results | None) -> str:
    if results is None or other is None:
        nothing: dict[str, Any] = {"kind": "", "title": "Results", "hits": [], "bars": [], "about": []}
        return html("results", placeholder="The texts that are found come here.", **nothing)
    times, sizes = [_times(each) for each in (results, other)], [each.indexed.nbytes for each in (results, other)]
    bars = [
        Bar("Index", size_of(sizes[0]), sizes[0] / max(sizes), "nested"),
        Bar("Encoding the texts", f"{times[0]:.1f} ms a text", times[0] / max(times), "full"),
    ]
    query = "" if results.query_size == results.size else f"query by {results.query_size}"
    about = [
        query, f"query {results.encode_milliseconds:.1f} ms", f"search {results.search_milliseconds:.2f} ms",
    ]  # fmt: skip
    return html(
        "results", kind="", title=results.size, hits=results.hits, placeholder="Nothing was found.", bars=bars,
        about=about,
    )  # fmt: skip


def _times(results: Results) -> float:
    """Milliseconds a text."""
    return 1e3 * results.indexed.seconds / len(results.indexed.index)
