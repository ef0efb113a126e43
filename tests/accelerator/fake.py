"""A pretended accelerator: finds tensors left on the CPU, waits of the host and copies between devices, on any machine.

A device is registered with torch from Python and used under FakeTensorMode: nothing is computed, but every operation
checks its devices, and whatever would make the host wait for the device (`.item()`, `bool(tensor)`, `nonzero`, boolean
indexing, `.tolist()`) raises. Copies between devices raise nothing; a dispatch mode counts them by the module of
the package that asked for them, and says whether they go through `runtime.send` or `runtime.HostCopy`.

What it cannot see: autocast casts nothing here, and branches on "cuda" are not taken.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from openvision.runtime import HostCopy

NAME = "pretended"
PACKAGE = "/openvision/"
RUNTIME = "runtime.py"
_keep: list[object] = []


@dataclass
class Accelerator:
    """The pretended device, and the copies to and from it."""

    device: torch.device
    mode: FakeTensorMode
    to_device: Counter[str] = field(default_factory=Counter)
    """Copies from the host, by place: "training/guards.py" or, by way of the runtime, "training/guards.py, sent"."""
    to_host: Counter[str] = field(default_factory=Counter)
    """Copies to the host: each makes the host wait unless it is asynchronous."""

    def place(self, module: nn.Module) -> nn.Module:
        """Parameters of a module built on the meta device, as tensors of this device (`Module.to` cannot swap them)."""
        for each in module.modules():
            for name, parameter in list(each._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                    each._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return module

    def forget(self) -> None:
        """Reset the counts."""
        self.to_device.clear()
        self.to_host.clear()


@contextmanager
def fake_accelerator() -> Iterator[Accelerator]:
    """The device while the context lasts; tensors made inside are fake, those that come in from the host are real."""
    _register()
    before = torch._C._only_lift_cpu_tensors()
    # So that torch.tensor(..., device=...) is made on the CPU first and seen as a copy.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            accelerator = Accelerator(torch.device(NAME, 0), mode)
            with _Copies(accelerator), _arrivals():
                yield accelerator
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


class _Copies(TorchDispatchMode):
    """Counts operations whose inputs are on one device and whose output is on another."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self.accelerator = accelerator

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options: dict[str, Any] = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if torch.device(options.get("device") or "cpu").type == "cpu":
                # Work of the host on what it knows is done.
                with unset_fake_temporarily():
                    return func(*args, **options)
            args, options = tree_map_only(Tensor, self.accelerator.mode.from_tensor, (args, options))
        result = func(*args, **options)
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            kinds = source.device.type, result.device.type
            if kinds[0] != kinds[1]:
                found = self.accelerator.to_host if kinds[1] == "cpu" else self.accelerator.to_device
                found[_place()] += 1
        return result


_aten = torch.ops.aten
# In inference mode `Tensor.to` is not split into its parts before it comes here.
_COPIES = {
    *(_aten._to_copy.default, _aten.copy_.default),
    *(_aten.to.device, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.other),
}


def _place() -> str:
    """The innermost module of the package on the stack, and how it copies."""
    inside = [frame for frame, _ in traceback.walk_stack(None) if PACKAGE in frame.f_code.co_filename]
    files = [frame.f_code.co_filename.rpartition(PACKAGE)[2] for frame in inside]
    if not files:
        return "outside of the package"
    if files[0] != RUNTIME:
        return files[0]
    caller = next(file for file in files if file != RUNTIME)
    return f"{caller}, {'sent' if inside[0].f_code.co_name == 'send' else 'HostCopy'}"


@contextmanager
def _arrivals() -> Iterator[None]:
    """What arrives on the host can be read there: arrays of zeros, ones where a `HostCopy` is read."""
    numpy_before, values_before = FakeTensor.numpy, HostCopy.values

    def numpy(self: FakeTensor, *, force: bool = False) -> np.ndarray:
        assert self.device.type == "cpu", "numpy() of a tensor on the accelerator"
        return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))

    def values(self: HostCopy) -> list[float]:
        return [1.0] * self._host.numel()

    FakeTensor.numpy = numpy  # pyright: ignore[reportAttributeAccessIssue]
    HostCopy.values = values
    try:
        yield
    finally:
        FakeTensor.numpy, HostCopy.values = numpy_before, values_before


def _register() -> None:
    if _keep:
        return
    dummy = backend_registration._setup_privateuseone_for_python_backend.__globals__["_DummyBackendModule"]

    class Module(dummy):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    # Autocast's key has no kernels for this device: let operations fall through, without casts.
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)
    _keep.append(library)
