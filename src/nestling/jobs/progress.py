"""The progress bar of long jobs, with an estimate of the time left. Shared by both wings."""

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from nestling.visible import visible


class _Description(ProgressColumn):
    """What is being done, which may name a file: shown as it is, without markup."""

    def render(self, task: Task) -> Text:
        return Text(visible(task.description))


def progress_bar(show: bool = True) -> Progress:
    """A rich progress bar (a context manager) that disappears when it is done."""
    columns = (_Description(), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not show, transient=True)
