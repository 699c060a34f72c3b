"""The tab of caches: one document, one question, the full cache and a small one beside each other."""

from collections.abc import Iterator
from typing import Any

from nestling.data.texts import read_texts
from nestling.files.reading import read_text
from nestling.integrations.play.config import MOST_BYTES
from nestling.integrations.play.parts import Bar, html, line, of_page, shows, size_of
from nestling.integrations.play.reader import Reader, Reading
from nestling.integrations.play.sessions import Session, Sessions
from nestling.kv.document import QUESTIONS, with_story

TOKENS = 1500  # of the built-in document
ASKED = (QUESTIONS[0][0], QUESTIONS[2][0])  # that SmolLM2 answers from a full cache
START, NEXT = 25.0, 6.0  # percent of the full cache: that a document is read at first, and shrunk to
SIDES = ("full", "nested")
PARTS = ("status", *SIDES, "memory")
HELP = (
    "A language model keeps keys and values of all that it has read: its cache. Here it reads a document into a full "
    "cache, and into a nested one that may take a share of the bytes; then both answer the same question. It comes "
    "after the document, so an answer can only come from what the cache holds."
)
SHRINKING = (
    "The nested cache can be made smaller while it lives: numbers are cut off it, and the document is not read again. "
    "Go on until the answer breaks."
)


class CacheTab:
    """What its buttons do; `build` puts them on a page.

    Args:
        reader: of documents.
        sessions: of the visitors.
    """

    def __init__(self, reader: Reader, sessions: Sessions):
        self.reader, self.sessions = reader, sessions
        self.document = self.built_in()

    def built_in(self) -> str:
        """Python's help pages with a story in their midst, of `TOKENS` tokens."""
        tokenizer = self.reader.tokenizer
        ids = with_story(tokenizer, list(read_texts(None))[1::8], TOKENS)
        return tokenizer.decode(ids[0], skip_special_tokens=True).strip()

    def empty(self) -> dict[str, str]:
        """The parts before anything was read."""
        ask = line("Press Ask: the document is read first, which takes some seconds.")
        return {"status": ask, "full": _answer("full"), "nested": _answer("nested"), "memory": _memory(None)}

    @shows(*PARTS)
    def read(self, session: Session, document: str, percent: float) -> Iterator[None]:
        """Read a document anew, at a budget in percent."""
        yield from self._read(session, document, percent)
        session.shown["status"] = line(f"Read. {self._state(session.reading)} Now ask.")
        yield

    @shows(*PARTS)
    def ask(self, session: Session, document: str, percent: float, question: str) -> Iterator[None]:
        """Answer by both caches; the document is read first if it, or its budget, has changed."""
        reading = session.reading
        if reading is None or (reading.document, reading.asked) != (document, percent):
            yield from self._read(session, document, percent)
        yield from self._answers(session, question, SIDES)

    @shows(*PARTS)
    def shrink(self, session: Session, document: str, percent: float, smaller: float, question: str) -> Iterator[None]:
        """Make the live cache smaller, and answer from it again."""
        reading = session.reading
        if reading is None or reading.document != document:
            yield from self._read(session, document, percent)
            yield from self._answers(session, question, ("full",))
        reading = session.reading
        before = reading.nested.nbytes
        milliseconds = self.reader.shrink(reading, smaller)
        freed = f"Shrunk in {milliseconds:,.0f} ms, {size_of(before - reading.nested.nbytes)} given back. "
        session.shown["memory"] = _memory(reading)
        yield from self._answers(session, question, ("nested",), freed)

    def _read(self, session: Session, document: str, percent: float) -> Iterator[None]:
        session.reading = None  # before there is another one: both would be held
        session.shown |= self.empty()
        session.shown["status"] = line("Reading the document into both caches …", "working")
        yield
        session.reading = self.reader.read(document, percent)
        session.shown["memory"] = _memory(session.reading)

    def _answers(self, session: Session, question: str, sides: tuple[str, ...], before: str = "") -> Iterator[None]:
        reading: Reading = session.reading
        for side in sides:
            session.shown[side] = _answer(side, reading)
        for side in sides:
            session.shown["status"] = line(f"{before}The {side} cache answers …", "working")
            yield
            said = None
            for said in self.reader.answer(reading, getattr(reading, side), question):
                session.shown[side] = _answer(side, reading, said)
                yield
            if said is None:
                session.shown[side] = _answer(side, reading, placeholder="(it said nothing)")
        session.shown["status"] = line(before + self._state(reading))
        yield

    def _state(self, reading: Reading) -> str:
        share = reading.nested.share
        return (
            f"{reading.tokens:,} tokens are held at {reading.percent:g} %: {size_of(reading.nested.nbytes)}, "
            f"{share:.1%} of the full cache."
        )

    def load(self, file: str) -> str:
        """The text of an uploaded file."""
        return read_text(file, largest=MOST_BYTES)

    def build(self, gradio: Any, events: dict[str, Any]) -> None:
        """Put the tab's parts and events on the page that is being made.

        Args:
            events: options of every event.
        """
        empty = self.empty()
        gradio.Markdown(HELP)
        with gradio.Row(equal_height=False):
            with gradio.Column(min_width=300):
                document = gradio.Textbox(self.document, label="1. A document", lines=7, max_lines=7)
                with gradio.Row():
                    file = gradio.UploadButton("Load a .txt file", file_types=[".txt"], size="sm", min_width=100)
                    back = gradio.Button("Built-in document", size="sm", min_width=100)
                percent = gradio.Slider(2, 100, value=START, step=0.5, label="Budget, % of the full cache")
                again = gradio.Button("Read the document")
            with gradio.Column(min_width=300):
                question = gradio.Textbox(ASKED[0], label="2. A question", lines=1, max_lines=4)
                gradio.Examples([[each] for each in ASKED], question, label="Or one of these")
                ask = gradio.Button("Ask", variant="primary")
                smaller = gradio.Slider(
                    2, 100, value=NEXT, step=0.5, label="3. A smaller budget, % of the full cache", info=SHRINKING
                )
                shrink = gradio.Button("Shrink and ask again", variant="primary")
        parts = {"status": gradio.HTML(empty["status"])}
        with gradio.Row(equal_height=True):
            for name in PARTS[1:]:
                with gradio.Column(min_width=260):
                    parts[name] = gradio.HTML(empty[name])
        outputs = [parts[name] for name in PARTS]
        asked = [document, percent, question]
        again.click(of_page(gradio, self.read), [document, percent], outputs, **events)
        ask.click(of_page(gradio, self.ask), asked, outputs, **events)
        question.submit(of_page(gradio, self.ask), asked, outputs, **events)
        shrink.click(of_page(gradio, self.shrink), [document, percent, smaller, question], outputs, **events)
        back.click(lambda: self.document, None, document, queue=False)
        file.upload(self.load, file, document, queue=False)


def _answer(side: str, reading: Reading | None = None, said: Any = None, placeholder: str = "") -> str:
    title, about = "Full cache", []
    if side == "nested":
        title = "Nested cache" if reading is None else f"Nested cache, {reading.percent:g} %"
    if reading is not None:
        about = [f"read in {reading.seconds[SIDES.index(side)]:.1f} s"]
    if said is not None and said.milliseconds is not None:
        about.append(f"{said.milliseconds:.0f} ms a token")
    text = "" if said is None else said.text
    placeholder = placeholder or ("The answer comes here." if reading is None else "…")
    return html("answer", kind=side, title=title, text=text, placeholder=placeholder, about=about)


def _memory(reading: Reading | None) -> str:
    if reading is None:
        return html("memory", title="Memory", bars=[], note="Nothing is held yet.")
    nested = reading.nested
    full, own, bases = nested.full_nbytes, nested.nbytes, nested.shared_nbytes
    bars = [
        Bar("Full cache, 16 bits a number", size_of(full), 1.0, "full"),
        Bar(f"Nested cache, {reading.percent:g} %", size_of(own), own / full, "nested"),
        Bar("Bases, shared", size_of(bases), bases / full, "bases"),
    ]
    note = (
        f"Of {reading.tokens:,} tokens. The caches grow with the text, the bases do not: they are held once for all "
        "texts and all visitors."
    )
    return html("memory", title="Memory", bars=bars, note=note)
