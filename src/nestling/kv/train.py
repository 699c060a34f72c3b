"""MatryoshkaKV training (arXiv 2410.14731): rotate an adapter's bases so that every prefix of coordinates works.

The loop is transformers' Trainer. A text comes with the ranks that it is read at, drawn beforehand by its number, so
that resuming, shuffling and several processes need no state of their own. The teacher is the same model without
projections; only the rotations train, and LoRA weights where the model has them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from nestling.arguments import remove_printer, stopped
from nestling.callbacks import made, restore, stops_early
from nestling.checkpoints import begin, check_place, run
from nestling.errors import MissingExtraError, OptionError, TrainingError
from nestling.kv import attention
from nestling.kv.adapter import KVAdapter
from nestling.kv.allocate import RankTable
from nestling.kv.arguments import Recipe, recipe_of, training_arguments
from nestling.kv.bits import BitTable
from nestling.kv.budget import read_shares
from nestling.kv.calibrate import fit
from nestling.kv.exact import capacity
from nestling.kv.modes import check_weights, in_default_mode
from nestling.kv.sampling import RankedWindows, schedule
from nestling.kv.sensitivity import measure
from nestling.kv.student import Student
from nestling.options import flag, path, whole
from nestling.progress import progress_bar
from nestling.tokens import token_windows
from nestling.undo import Undo, withdrawn

BUDGETS = (0.75, 0.5, 0.375, 0.25)


@attention.leaves_as_found
