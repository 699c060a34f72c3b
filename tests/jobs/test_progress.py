"""Progress bars: whatever is said beside them, the bar, the count and the times stay."""

import io
import re

import pytest
from rich.console import Console

from nestling.jobs.progress import progress_bar

LOSSES = "training, loss " + ", ".join(f"{i}x384: 0.123" for i in range(12))


@pytest.mark.parametrize("width", [70, 80, 260])
@pytest.mark.parametrize("total", [7, 12_345_678])
def test_a_long_description_leaves_bar_count_and_times(width, total):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = progress_bar()
    bar.live.console = console
    task = bar.add_task(LOSSES, total=total)
    bar.update(task, completed=total // 2 + 1)
    console.print(bar.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert len(line) <= width and line.startswith("training") and "━" * 9 in line
    assert re.search(rf"{total // 2 + 1:,}/{total:,} 0:00:00 -:--:--", line)
    assert (LOSSES in line) == (width == 260)


def test_without_a_total_the_count_is_shown():
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    bar = progress_bar()
    bar.live.console = console
    bar.update(bar.add_task("splitting", total=None), completed=1234)
    console.print(bar.get_renderable())
    assert " 1,234 0:00:00" in console.file.getvalue()
