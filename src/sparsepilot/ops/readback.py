"""Reading a few numbers back from the device without making the training loop wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Copies a small tensor to the host in the background; `take()` returns what was last copied.

    On CPU the value is there at once. On an accelerator the copy goes to pinned memory, and `take()` waits only for a
    copy that was begun a whole step earlier.
    """

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def begin(self, values: Tensor) -> None:
        """Starts copying `values` (detached); an earlier copy that nobody took is dropped."""
        values = values.detach()
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = values.clone()
            self._event = None

    def take(self) -> list[float] | None:
        """The values of the last `begin`, or None when there was none."""
        if self._host is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        return [float(v) for v in self._host.tolist()]
