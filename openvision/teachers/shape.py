"""What a teacher costs, for the planner: operations, parameters, features; of a released one without its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from openvision.frozen.cost import autoencoder_cost
from openvision.models.flops import patches_of, vision_flops
from openvision.models.openvision3 import LatentVisionConfig
from openvision.models.vision import VisionConfig, VisionTransformer
from openvision.teachers.load import Library, load_teacher
from openvision.teachers.teacher import Teacher
from openvision.weights.registry import available_models, released, vision_parameters


@dataclass(frozen=True)
class TeacherShape:
    """Size and work of a teacher."""

    forward: int
    """Operations of one image."""
    parameters: int
    pooled_width: int
    patch_map: tuple[int, ...] | None
    """Channels, rows and columns of its patches; None without a map."""
    largest: int
    """Numbers in the largest result of a layer for one image: nothing is kept for a backward pass, a few of these are
    there at a time."""


def teacher_shape(source: str, library: Library = "openvision", resolution: int | None = None) -> TeacherShape:
    """The shape of the teacher `source`; arguments as of `load_teacher`.

    A teacher that is not a released name is loaded, and one of another library reads one image, whose operations are
    counted. Raises OpenVisionError as `load_teacher` does.
    """
    if library == "openvision" and source in available_models() and not Path(source).exists():
        entry = released(source)
        return _of_tower(entry.vision, entry.embed_dim, entry.parameters, resolution)
    teacher = load_teacher(source, library, resolution)
    if isinstance(teacher.module, VisionTransformer):
        tower = teacher.module
        embed_dim = None if tower.head is None else tower.head.weight.shape[0]
        return _of_tower(tower.config, embed_dim, vision_parameters(tower.config, embed_dim), resolution)
    return _counted(teacher)


def _of_tower(config: VisionConfig, embed_dim: int | None, parameters: int, resolution: int | None) -> TeacherShape:
    size = resolution or config.image_size
    forward = vision_flops(config, size, embed_dim)
    if isinstance(config, LatentVisionConfig):
        forward += autoencoder_cost(config.autoencoder, size).encode
    tokens = patches_of(config, size) + config.prefix_tokens
    patches = (config.width, *config.grid(size, size))
    return TeacherShape(forward, parameters, embed_dim or config.width, patches, tokens * config.mlp_dim)


def _counted(teacher: Teacher) -> TeacherShape:
    largest = 0

    def look(_: nn.Module, __: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    hooks = [module.register_forward_hook(look) for module in teacher.module.modules()]
    size = teacher.preprocessing.size
    with FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.numel() for parameter in teacher.module.parameters())
    return TeacherShape(counter.get_total_flops(), parameters, teacher.pooled_width, teacher.patch_map, largest)
