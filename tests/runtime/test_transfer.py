"""Arrays on their way to the device."""

from __future__ import annotations

import numpy as np
import torch

from octavo.runtime.transfer import to_device


def test_arrays_arrive_in_one_copy_as_they_were() -> None:
    arrays = [
        np.arange(5, dtype=np.int64),
        np.array([], dtype=np.int64),
        np.arange(-3, 3, dtype=np.int32),
        np.arange(21, dtype=np.int32).reshape(3, 7),
        np.array([2**40], dtype=np.int64),
    ]
    moved = to_device(arrays, torch.device("cpu"))
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.shape == array.shape
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == moved[0].data_ptr() % 16
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
