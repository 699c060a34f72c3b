"""Without a GPU, kernels in Triton are interpreted: it reads this when it is first imported, by torch for one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
