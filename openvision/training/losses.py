"""The loss terms of a step: kept on the device, checked before the update, read when they are logged."""

from collections.abc import Mapping

import torch
from torch import Tensor

Terms = dict[str, Tensor]


class Losses:
    """Scalars of one step by name; `total` is what is differentiated.

    Whether they are finite is sent to the host as soon as they are known, which is before the backward pass is queued:
    an accelerator works on that while the host reads the answer, so the check costs no waiting.
    """

    def __init__(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        self.total = total
        self.terms: Terms = {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()}}
        finite = torch.stack([term.isfinite() for term in self.terms.values()])
        self._finite = finite.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if finite.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def broken(self) -> list[str]:
        """The terms that are NaN or infinite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [name for name, finite in zip(self.terms, self._finite.tolist(), strict=True) if not finite]

    def values(self) -> dict[str, float]:
        """The terms as numbers; this waits for the device."""
        names, terms = list(self.terms), torch.stack([term.float() for term in self.terms.values()])
        return dict(zip(names, terms.tolist(), strict=True))
