"""Counting active latents, fast beside plain."""

from __future__ import annotations

import pytest
import torch

from sparsepilot.ops.count import INT8_ROWS, count_active


@pytest.mark.parametrize("rows", [0, 1, INT8_ROWS, INT8_ROWS + 1, 3 * INT8_ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_a_plain_sum(rows: int, dtype: torch.dtype) -> None:
    codes_BF = torch.randn(rows, 7, dtype=dtype)
    codes_BF[:, 0], codes_BF[:, 1], codes_BF[:, 2] = 1.0, 0.0, torch.nan  # in all rows; in none; in none, as x > 0 is
    found_F = count_active(codes_BF)
    assert found_F.dtype == torch.int64
    assert torch.equal(found_F, (codes_BF > 0).sum(dim=0))
    assert found_F[:3].tolist() == [rows, 0, 0]
