"""Kernels for GPUs run under the mended interpreter here."""

from __future__ import annotations

import torch

from .interpreter import mend

mend()
torch.set_num_threads(2)
