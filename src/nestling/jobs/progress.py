"""The progress bar of long jobs, with an estimate of the time left. Shared by both wings."""

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from nestling.visible import visible

BAR = 20  # characters


class _Description(ProgressColumn):
    """What is being done, which may name files or losses: one line without markup, cut where the console ends.

    The bar, the count and the times keep their places.
    """

    def __init__(self, progress: Progress):
        super().__init__(Column(no_wrap=True))
        self.progress = progress

    def render(self, task: Task) -> Text:
        others = BAR + len(_count(task)) + 2 * len("0:00:00") + 4  # with a space between columns
        text = Text(visible(task.description))
        text.truncate(max(8, self.progress.console.width - others), overflow="ellipsis")
        return text


class _Count(ProgressColumn):
    """How much is done, and of how much where that is known."""

    def __init__(self):
        super().__init__(Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        return Text(_count(task))


def _count(task: Task) -> str:
    done = f"{task.completed:,.0f}"
    return done if task.total is None else f"{done}/{task.total:,.0f}"


def progress_bar(show: bool = True) -> Progress:
    """A rich progress bar (a context manager) that disappears when it is done; a task's total may be None."""
    progress = Progress(disable=not show, transient=True)
    times = (TimeElapsedColumn(Column(no_wrap=True)), TimeRemainingColumn(table_column=Column(no_wrap=True)))
    bar = BarColumn(BAR, table_column=Column(no_wrap=True, min_width=BAR))
    progress.columns = (_Description(progress), bar, _Count(), *times)
    return progress
