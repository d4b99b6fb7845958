"""Kernels for GPUs run under the mended interpreter here."""

from __future__ import annotations

import os

import torch

from .interpreter import mend

mend()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
