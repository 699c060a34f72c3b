"""What a distillation follows: a teacher's unit vectors of the texts, in a file that is mapped, each computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from nestling.embed.model.copies import copied_tree
from nestling.embed.model.fingerprint import checksum, reading
from nestling.errors import FileError, OptionError
from nestling.files.reading import check_regular, read_object
from nestling.files.temporary import temporary_file
from nestling.files.writing import naming, write_file

TARGETS_FILE, TEACHER_FILE = "targets.npy", "targets.json"
BATCH = 64


class Targets:
    """Unit vectors ``[N, D]`` of texts by a teacher, fp16 on the disk, computed as they are asked for.

    A row that is not computed yet is NaN. So the file can be gone on with after any kill, and one that is there
    already, of the same teacher and texts, is used by whoever comes next.

    Args:
        folder: where the file is, or is made.
        teacher: of any kind and width.
        texts: all of them; rows are their places.
        prompt: in front of each.
        autocast: a context in which the teacher runs.
    """

    def __init__(
        self, folder: Path, teacher: SentenceTransformer, texts: Sequence[str], prompt: str,
        autocast: Callable[[], AbstractContextManager[Any]],
    ):  # fmt: skip
        self.teacher, self.texts, self.prompt, self.autocast = copied_tree(teacher), texts, prompt, autocast
        width = teacher.get_embedding_dimension()
        identity = {"teacher": checksum(teacher), **reading(teacher), "prompt": prompt, "texts": checksum(list(texts))}
        self.table = _opened(folder, identity, (len(texts), int(width or 0)))

    def fill(self, rows: Sequence[int], advance: Callable[[int], None] = lambda count: None) -> None:
        """Compute the targets of some rows, all of them if one is missing: so a killed job finds the same ones.

        Raises:
            OptionError: a vector is not finite.
        """
        places = np.asarray(rows)
        if np.isnan(self.table[places]).any():
            with self.autocast():
                vectors = self.teacher.encode(
                    [self.texts[row] for row in rows], prompt=self.prompt, batch_size=BATCH, convert_to_tensor=True,
                    show_progress_bar=False,
                )  # fmt: skip
            unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
            if not unit.isfinite().all():
                raise OptionError("the teacher gives vectors that are not finite: its weights are broken")
            self.table[places] = unit.cpu().numpy()
            self.table.flush()
        advance(len(rows))

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """The targets ``[n, D]`` of rows that were filled, fp32."""
        return torch.from_numpy(self.table[np.asarray(rows)]).float()


def _opened(folder: Path, identity: dict[str, Any], shape: tuple[int, int]) -> np.memmap:
    """The file of that teacher and those texts, or a new one.

    Raises:
        FileError: it cannot be written, or the disk does not have the room for it.
    """
    path, beside = folder / TARGETS_FILE, folder / TEACHER_FILE
    identity = json.loads(json.dumps({**identity, "shape": list(shape)}))
    if beside.is_file() and path.is_file():
        check_regular(path)
        known = _known(beside)
        if known == identity and (table := _mapped(path, shape)) is not None:
            return table
    beside.unlink(missing_ok=True)
    with naming(path), temporary_file(folder) as new:
        table = np.lib.format.open_memmap(new, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, shape[0], 65536):  # written: a page for which there is no room would end the process
            table[start : start + 65536] = np.nan
        table.flush()
        new.replace(path)
    write_file(beside, json.dumps(identity, indent=1) + "\n")
    return table


def _known(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except FileError:
        return None


def _mapped(path: Path, shape: tuple[int, int]) -> np.memmap | None:
    """The file, if it has that shape; one that is damaged is made again."""
    try:
        table = np.lib.format.open_memmap(path, mode="r+")
    except (OSError, ValueError, EOFError):
        return None
    return table if table.shape == shape and table.dtype == np.float16 else None
