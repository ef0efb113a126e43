"""The contrastive loss: symmetric InfoNCE of images against each kind of text, apart (spec section 5).

- The alt-texts and the synthetic sentences form two problems of their own; one is never a negative of the other.
- Small batches hold all logits. Larger ones never do: a first pass over chunks of rows leaves the maximum and the sum
  of exponentials of every row and column, a second one makes each chunk's logits again and turns them into gradients.
  That is four matrix products, where the plain form with two matrices of logits needs six.
- With several processes each keeps its own images as rows and sees the texts of all as columns. Sums over columns are
  completed by exchanging two numbers a column, so images are never gathered.
- Texts that are equal need nothing: they are one vector, and a target that is spread evenly over them has the same loss
  and gradient as each text's own image.
- Beyond the paper: all captions of an image in one problem (`joint_info_nce`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openvision.objectives.gather import gather, world_size

# Logits held at a time; a batch whose square is no larger takes the plain form. At 32,768 pairs on one thread 2^22 is
# 9 % slower than 2^23 and 2^24 2 % faster, for 34 MiB less and 62 MiB more.
CHUNK_LOGITS = 2**23


def info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    chunk: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean of both cross-entropies of `scale * image_embeds @ text_embeds.T` against its diagonal.

    In float32 (float64 stays float64), whatever autocast says.

    One process: the plain form while B * B <= chunk, else chunks of rows with O(chunk + B E) memory and a gradient that
    cannot be differentiated again.

    Several processes: B is the number of pairs on each, the same on all. A rank's value is the mean over ITS pairs
    against the negatives of all ranks, so:
    - the MEAN over ranks of the values is the loss of the whole batch; log `all_sum(value, group) / ranks`;
    - the gradient on a rank is that of the SUM over ranks of the values, through this rank's inputs. DDP and FSDP
      average gradients over ranks, and the average is the gradient of the loss of the whole batch: call backward on the
      value as it is, with no factor of the number of ranks;
    - all ranks must call this and its backward together and multiply the value by the same number.

    Args:
        image_embeds: (B, E) unit vectors, float32.
        text_embeds: (B, E) unit vectors, float32; row i belongs to image i.
        scale: exp of the learned temperature, shape ().
        chunk: logits held at a time; two such buffers exist.
        group: the processes whose pairs form the batch; None for this one alone.

    Returns:
        Scalar loss, nats.
    """
    # Under autocast the logits would be bfloat16, whose steps near 30 are an eighth: float32, as the spec has it.
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = (x if x.dtype == torch.float64 else x.float() for x in (image_embeds, text_embeds))
        if group is None or world_size(group) == 1:
            if len(images) ** 2 <= chunk:
                return _plain(images, texts, scale)
            group = None
        columns, scale = gather(texts, group), scale.to(images.dtype)
        loss: Tensor = _ChunkedInfoNCE.apply(images, columns, scale, chunk, group, None)  # pyright: ignore[reportAssignmentType]
    return loss


def contrastive_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    chunk: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One `info_nce` for each of the K kinds of text, (K,); the objective is their mean.

    Args:
        image_embeds: (B, E) unit vectors.
        text_embeds: (K, B, E) unit vectors.
        scale: exp of the learned temperature, shape (), or of that of each kind of text, (K,).
        chunk: logits held at a time, see `info_nce`.
        group: the processes whose pairs form the batch, see `info_nce` for what each one's values mean.
    """
    kinds = zip(text_embeds, scale if scale.ndim else [scale] * len(text_embeds), strict=True)
    return torch.stack([info_nce(image_embeds, texts, own, chunk, group) for texts, own in kinds])


def joint_info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    chunk: int = CHUNK_LOGITS,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """One softmax over the K * B texts of all kinds, of which K are right for an image and share its target evenly.

    An image has all other texts as negatives, a text all other images. Precision, processes, memory and the meaning of
    a rank's value are as in `info_nce`, which this is for K = 1.

    Args:
        image_embeds: (B, E) unit vectors.
        text_embeds: (K, B, E) unit vectors; text i of each kind belongs to image i.
        scale: exp of the learned temperature, shape (), or of that of each kind of text, (K,).
        chunk: logits held at a time.
        group: the processes whose pairs form the batch; None for this one alone.

    Returns:
        Scalar loss, nats: the mean of the cross-entropies of images and of texts.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        images, texts = (x if x.dtype == torch.float64 else x.float() for x in (image_embeds, text_embeds))
        group = None if world_size(group) == 1 else group
        kinds, scale = len(texts), scale.to(images.dtype)
        if scale.ndim:
            # A factor on a text is a factor on all its logits.
            texts, scale = texts * scale[:, None, None], torch.ones_like(scale[0])
        own = torch.arange(len(images), device=images.device)
        if group is not None:
            own = own + dist.get_rank(group) * len(images)
        both = (own, gather(own.repeat(kinds), group))
        columns = gather(texts.flatten(0, 1), group)
        loss: Tensor = _ChunkedInfoNCE.apply(images, columns, scale, chunk, group, both)  # pyright: ignore[reportAssignmentType]
    return loss


def text_groups(ids: Tensor) -> Tensor:
    """A number for each text, the same for texts of the same ids: int64 (..., L) -> int64 (...).

    A hash modulo 2^64, computed where the ids are: two different texts share one once in 10^19 pairs.
    """
    factors = torch.arange(1, ids.shape[-1] + 1, device=ids.device) * 0x1E3779B97F4A7C15
    factors = (factors ^ (factors >> 29)) * 0x3F58476D1CE4E5B9
    return (ids * (factors ^ (factors >> 32))).sum(-1)


def count_equal(groups: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """How many texts of the batch of all processes occur in it more than once: int64 (B,) -> int64 ()."""
    numbers = gather(groups, group).sort().values
    same = numbers[1:] == numbers[:-1]
    # Of each run of equal numbers every member has an equal neighbour on one side or the other.
    return (F.pad(same, (1, 0)) | F.pad(same, (0, 1))).sum()


def _shares(rows: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """The targets of rows over columns: an even share for each column of the row's group."""
    same = rows[:, None] == columns
    return same.to(like.dtype).div_(same.sum(1, keepdim=True))


def _plain(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image_embeds @ text_embeds.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class _Softmax:
    """What a softmax divides by, apart as maximum and sum: as one logarithm it would lose digits at a high scale."""

    maximum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, size: int, like: Tensor) -> "_Softmax":
        return cls(like.new_full((size,), -torch.inf), like.new_zeros(size))

    def add(self, logits: Tensor, dim: int, spare: Tensor) -> None:
        """Take in logits along `dim`."""
        maximum = torch.maximum(self.maximum, logits.amax(dim))
        self.total *= (self.maximum - maximum).exp_()
        self.total += torch.sub(logits, maximum.unsqueeze(dim), out=spare).exp_().sum(dim)
        self.maximum = maximum

    def add_ranks(self, group: dist.ProcessGroup) -> None:
        """Take in what the other ranks have seen."""
        own = self.maximum.clone()
        dist.all_reduce(self.maximum, dist.ReduceOp.MAX, group=group)
        self.total *= own.sub_(self.maximum).exp_()
        dist.all_reduce(self.total, group=group)

    def losses(self, targets: Tensor, start: int) -> Tensor:
        """Cross-entropies of those from `start` on, whose target has the logit `targets`."""
        of = slice(start, start + len(targets))
        return (self.maximum[of] - targets) + self.total[of].log()


class _ChunkedInfoNCE(torch.autograd.Function):
    """Mean over rows of both cross-entropies of `scale * rows @ columns.T`; row i belongs to column `first + i`.

    With `groups`, those of rows and of columns, row i belongs to all columns of its group. A column has the target of
    its own row then: the sum over all rows and columns is the same. There may be several columns to a row, one kind of
    text after the other; those of each rank are together.

    Products are written into buffers or in place, which autocast leaves in the precision of their operands.
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        chunk: int,
        group: dist.ProcessGroup | None,
        groups: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        kinds = len(columns) // (len(rows) * ranks)
        first = rank * len(rows) * kinds
        chunks = Chunks(rows, columns, scale, chunk)
        of_row, of_column = _Softmax.empty(len(rows), rows), _Softmax.empty(len(columns), rows)
        targets = rows.new_empty(len(rows))
        for part, logits, spare in chunks:
            if groups is None:
                targets[part] = logits.diagonal(first + part.start)
            else:
                targets[part] = (logits * _shares(groups[0][part], groups[1], logits)).sum(1)
            softmax = _Softmax.empty(len(logits), rows)
            softmax.add(logits, 1, spare)
            of_row.maximum[part], of_row.total[part] = softmax.maximum, softmax.total
            of_column.add(logits, 0, spare)
        if group is not None:
            of_column.add_ranks(group)
        ctx.save_for_backward(rows, columns, scale, of_row.maximum, of_row.total, of_column.maximum, of_column.total)
        ctx.chunk, ctx.first, ctx.groups, ctx.kinds = chunk, first, groups, kinds
        own_columns = of_column.losses(targets.repeat(kinds), first)
        return (of_row.losses(targets, 0) + own_columns.unflatten(0, (kinds, -1)).mean(0)).mean() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, columns, scale, *sums = ctx.saved_tensors
        of_row, of_column = _Softmax(*sums[:2]), _Softmax(*sums[2:])
        grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
        row_share, column_share = 1 / of_row.total[:, None], 1 / (ctx.kinds * of_column.total)
        for part, logits, spare in Chunks(rows, columns, scale, ctx.chunk):
            # d loss / d logits, but for a factor: both probabilities, less 2 at the target.
            grad = torch.sub(logits, of_row.maximum[part, None], out=spare).exp_().mul_(row_share[part])
            grad.addcmul_(logits.sub_(of_column.maximum).exp_(), column_share)
            if ctx.groups is None:
                grad.diagonal(ctx.first + part.start).sub_(2)
            else:
                grad.sub_(_shares(ctx.groups[0][part], ctx.groups[1], grad), alpha=2)
            torch.mm(grad, columns, out=grad_rows[part])
            grad_columns.addmm_(grad.T, rows[part])
        factor = grad_loss / (2 * len(rows))
        # d loss / d scale is the sum of (d loss / d logits) * rows @ columns.T, of which one product is at hand.
        grad_scale = (rows * grad_rows).sum() * factor
        return grad_rows.mul_(scale * factor), grad_columns.mul_(scale * factor), grad_scale, None, None, None


class Chunks:
    """Logits of some rows at a time with a second buffer of their shape, both used again for the next rows."""

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor, chunk: int):
        self.rows, self.columns, self.scale = rows, columns, scale
        self.height = min(len(rows), max(1, chunk // len(columns)))

    def __iter__(self):
        # Fresh memory for each chunk would cost a page fault for every 4 KiB of it.
        buffers = self.rows.new_empty(2, self.height, len(self.columns))
        for start in range(0, len(self.rows), self.height):
            part = slice(start, min(start + self.height, len(self.rows)))
            logits, spare = buffers[:, : part.stop - start]
            torch.mm(self.rows[part] * self.scale, self.columns.T, out=logits)
            yield part, logits, spare
