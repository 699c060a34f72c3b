"""The page: two tabs, in Gradio, that nothing is fetched for from elsewhere."""

from importlib.resources import files
from typing import Any

from nestling.integrations.libraries import library
from nestling.integrations.play.cache_tab import CacheTab
from nestling.integrations.play.finder import Finder
from nestling.integrations.play.reader import Reader
from nestling.integrations.play.search_tab import SearchTab
from nestling.integrations.play.sessions import Sessions

FONTS = ["system-ui", "sans-serif"]  # of the visitor's machine
MONO = ["ui-monospace", "monospace"]
WAITING = 32  # clicks that may wait while one is answered
KEPT = 600  # seconds that uploaded files are kept


class Page:
    """The blocks of Gradio, their sessions and their looks.

    Args:
        reader: for the tab of caches.
        finder: for the tab of encoders.

    Raises:
        MissingExtraError: Gradio is not installed.
    """

    def __init__(self, reader: Reader, finder: Finder):
        gradio = library("gradio", "play")
        self.sessions = Sessions()
        self.cache, self.search = CacheTab(reader, self.sessions), SearchTab(finder, self.sessions)
        # One click at a time, of all visitors: there is one model.
        events = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        with gradio.Blocks(title="nestling", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as self.blocks:
            gradio.Markdown(f"# One model, every size\n{reader.name} and {finder.name}, on this machine.")
            with gradio.Tabs():
                with gradio.Tab("Cache"):
                    self.cache.build(gradio, events)
                with gradio.Tab("Search"):
                    self.search.build(gradio, events)
            self.blocks.unload(_leaving(gradio, self.sessions))
        self.blocks.queue(max_size=WAITING)
        self.gradio = gradio

    def looks(self) -> dict[str, Any]:
        """Theme and style, as Gradio takes them when a page is served."""
        css = files("nestling.integrations.play").joinpath("page.css").read_text("utf-8")
        theme = self.gradio.themes.Default(primary_hue="blue", neutral_hue="gray", font=FONTS, font_mono=MONO)
        return {"theme": theme, "css": css}


def _leaving(gradio: Any, sessions: Sessions) -> Any:
    def leave(request):
        sessions.forget(request)

    leave.__annotations__ = {"request": gradio.Request}
    return leave
