"""The progress bar of long jobs, with an estimate of the time left. Shared by both wings."""

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(show: bool = True) -> Progress:
    """A rich progress bar (a context manager) that disappears when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not show, transient=True)
