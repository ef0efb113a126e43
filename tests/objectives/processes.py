"""Run by test_processes.py: WORLD_SIZE processes compute the losses of one batch and compare with a single process.

    python processes.py WORLD_SIZE FILE

FILE is where the processes find each other. The parent imports everything once and computes nothing, so that its
children can be forked.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from openvision.models.layers import unit
from openvision.objectives.caption import caption_loss
from openvision.objectives.contrastive import contrastive_losses, info_nce, joint_info_nce
from openvision.objectives.gather import all_sum, gather
from openvision.objectives.sigmoid import sigmoid_loss, sigmoid_losses

BATCH, WIDTH, LENGTH, VOCABULARY = 24, 10, 5, 13
CHUNK = 60


class Towers(nn.Module):
    """Linear towers, caption head and temperature: all that a loss of ours needs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.states, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, VOCABULARY, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        texts = unit(self.text(x["texts"])).transpose(0, 1)
        return unit(self.image(x["images"])), texts, self.logit_scale.exp(), self.states(x["tokens"])


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole batch; captions are of very different lengths, so that ranks count different tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.arange(BATCH)[:, None] * (LENGTH + 1) // BATCH
    return {
        "images": torch.randn(BATCH, WIDTH, generator=generator).to(dtype),
        "texts": torch.randn(BATCH, 2, WIDTH, generator=generator).to(dtype),
        "tokens": torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype),
        "labels": torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator),
        "groups": torch.arange(BATCH) % 7,
        "mask": torch.arange(LENGTH) < lengths,
    }


def losses(model: nn.Module, head: Tensor, x: dict[str, Tensor], chunk: int, group, count: Tensor | None) -> Tensor:
    """Every form of the contrastive loss and the caption loss, (10,)."""
    images, texts, scale, states = model(x)
    caption = caption_loss(states, x["labels"], x["mask"], head, chunk_logits=50, count=count)
    scales, bias = torch.stack([scale, 0.5 * scale]), -0.4 * scale
    single = [
        caption,
        joint_info_nce(images, texts, scale, chunk, group),
        joint_info_nce(images, texts, scales, chunk, group),
        sigmoid_loss(images, texts[1], scale, bias, chunk, group, x["groups"]),
    ]
    several = [
        contrastive_losses(images, texts, scale, chunk, group),
        contrastive_losses(images, texts, scales, chunk, group),
        sigmoid_losses(images, texts, scales, bias, chunk, group),
    ]
    return torch.cat([*several, torch.stack(single)])


def check_losses(dtype: torch.dtype, tolerance: float) -> None:
    """Values by their mean over ranks, gradients as DDP averages them, against one process at the whole batch."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = Towers().to(dtype)
    together = copy.deepcopy(alone)
    whole = batch(dtype)
    own = {name: tensor.chunk(ranks)[rank] for name, tensor in whole.items()}
    weights = torch.tensor([0.5, 0.5, 0.3, 0.4, 0.6, 0.2, 2.0, 0.9, 0.8, 0.35], dtype=dtype)

    expected = losses(alone, alone.head.weight, whole, 2**62, None, whole["mask"].sum())
    (expected @ weights).backward()

    count = all_sum(own["mask"].sum(), group) / ranks
    # Kept until after the backward pass, in which it averages.
    parallel = nn.parallel.DistributedDataParallel(together)
    values = losses(parallel, together.head.weight, own, CHUNK, group, count)
    (values @ weights).backward()

    close(all_sum(values, group) / ranks, expected.detach(), tolerance, "losses")
    for (name, mine), theirs in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        close(mine.grad, theirs.grad, tolerance, name)


def check_gather() -> None:
    """A part's gradient is the sum over ranks of what each made of the whole."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    own = torch.arange(6.0).view(2, 3).add(10 * rank).requires_grad_()
    whole = gather(own, group)
    assert torch.equal(whole, torch.cat([torch.arange(6.0).view(2, 3) + 10 * other for other in range(ranks)]))
    weights = torch.arange(whole.numel(), dtype=torch.float32).view_as(whole)
    (whole * weights * (rank + 1)).sum().backward()
    assert own.grad is not None
    assert torch.equal(own.grad, weights[2 * rank : 2 * rank + 2] * sum(range(1, ranks + 1)))


def check_one_process_is_none() -> None:
    """A group of one takes the plain form, to the last bit."""
    x, scale = batch(torch.float32), torch.tensor(7.0)
    images, texts = unit(x["images"]), unit(x["texts"][:, 0])
    assert torch.equal(info_nce(images, texts, scale, group=dist.group.WORLD), info_nce(images, texts, scale))


def close(mine: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    """Within `tolerance` of the largest entry."""
    error, largest = (mine - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * largest, f"{name} is off by {error:.3g} where the largest entry is {largest:.3g}"


def main(rank: int, ranks: int, file: str) -> None:
    """All checks, in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    check_gather()
    check_losses(torch.float64, 1e-13)
    check_losses(torch.float32, 1e-6)
    if ranks == 1:
        check_one_process_is_none()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    world = int(sys.argv[1])
    processes.start_processes(main, (world, sys.argv[2]), nprocs=world, start_method="fork")
