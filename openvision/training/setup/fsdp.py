"""FSDP2: every parameter of a model, its gradient and its moments in slices, one a process.

Importing this takes a second, which only runs that shard should pay.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from openvision.models.layers import Block
from openvision.training.setup.compile import ENTRIES

# Methods beside `forward` through which the whole model runs.
_MODEL_ENTRIES = ("encode_image", "encode_text")


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model on the meta device; each block is all-gathered as it is used, the rest with the model.

    Single numbers stay replicated: FSDP2 shards the first dimension, which they do not have.
    """
    scalars = {parameter for parameter in model.parameters() if not parameter.ndim}
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
            _register(module, ENTRIES)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    _register(model, _MODEL_ENTRIES)


def make_mesh(device: str, processes: int, replicas: int) -> DeviceMesh:
    """A mesh of `replicas` groups of processes that hold a whole model each; one group needs no second axis."""
    shards = processes // replicas
    if replicas == 1:
        return init_device_mesh(device, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _register(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if name != "forward" and hasattr(module, name):
            register_fsdp_forward_method(module, name)
