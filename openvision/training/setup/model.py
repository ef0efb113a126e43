"""The model of a run: built, initialised, warm-started from given weights, distributed over the processes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from openvision.models.openvision2 import AnyModel, ModelConfig, build_model
from openvision.recipe.sections import Dense, Parallel, Run, WarmStart
from openvision.runtime import Processes
from openvision.text.tokenizer import Tokenizer
from openvision.training.dense import PREDICTOR, DensePredictor
from openvision.training.distillation import HEADS, Taught, TeacherHeads
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.initialize import broadcast_parameters, initialise, materialise
from openvision.training.setup.parallel import DistributedModel, distribute, shard
from openvision.training.setup.start import describe_start, start_from
from openvision.weights.sentence_encoder import read_sentence_encoder


def build_distributed_model(
    config: ModelConfig,
    run: Run,
    parallel: Parallel,
    processes: Processes,
    seed: int,
    start: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    taught: Sequence[Taught] = (),
    warm: WarmStart | None = None,
    tokenizer: Tokenizer | None = None,
    dense: Dense | None = None,
) -> DistributedModel:
    """A model on the processes of a run with its initial parameters, those of `start` where it has them.

    `say` is told what was copied from there. With `taught` it has projections to the widths of these teachers.
    `warm` says which towers are frozen and how the weights of `start` are taken; `tokenizer` is the run's. With `dense`
    it has an averaged tower and what predicts its patches.
    """
    with torch.device("meta"):
        model = _in_training(config, taught, dense)
    for parameter in [*model.untrained_parameters(), *frozen_parameters(model, warm)]:
        # DDP waits for the gradient of everything that may have one.
        parameter.requires_grad_(False)
    prepare_blocks(model, run.activation_checkpointing, run.compile)
    if parallel.mode == "fsdp" and processes.group is not None:
        shard(model, processes, parallel.replicate)
        full = None
        if processes.is_main:
            with torch.device("meta"):
                full = _in_training(config, taught, dense)
            fill(full, seed, start, say, warm, tokenizer)
        broadcast_parameters(full, model, processes)
    else:
        fill(model, seed, start, say, warm, tokenizer)
        model.to(processes.device)
    return distribute(model, processes)


def _in_training(config: ModelConfig, taught: Sequence[Taught], dense: Dense | None) -> AnyModel:
    model = build_model(config)
    if taught:
        model.add_module(HEADS, TeacherHeads(config.vision.width, taught))
    if dense is not None:
        model.add_module(PREDICTOR, DensePredictor(config.vision, dense.kind))
    return model


def fill(
    model: AnyModel,
    seed: int,
    start: str | None,
    say: Callable[[str], None],
    warm: WarmStart | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Give a model on the meta device its initial parameters, on the CPU."""
    materialise(model, torch.device("cpu"))
    initialise(model, seed)
    if start is not None:
        notes: list[str] = []
        taken = start_from(model, start, warm, tokenizer, notes.append)
        elsewhere = ("text",) if warm is not None and warm.text is not None else ()
        say(describe_start(model, start, taken, notes, elsewhere))
    if warm is not None and warm.text is not None:
        assert model.text is not None
        say(read_sentence_encoder(Path(warm.text).expanduser()).copy_into(model.text))
    for part in model.children():
        if isinstance(part, DensePredictor):
            part.follow(model.vision, 0.0)


def frozen_parameters(model: AnyModel, warm: WarmStart | None) -> Iterator[nn.Parameter]:
    """Parameters of frozen towers; the projection into the shared space is trained all the same."""
    for tower in warm.frozen if warm is not None else ():
        for name, parameter in getattr(model, tower).named_parameters():
            if not name.startswith("head."):
                yield parameter


def full_model(config: ModelConfig, state: dict[str, Tensor]) -> AnyModel:
    """A model that holds `state`, for evaluation and writing; nothing is copied, what only training has left out."""
    with torch.device("meta"):
        model = build_model(config)
    own = {name: tensor for name, tensor in state.items() if not name.startswith((f"{HEADS}.", f"{PREDICTOR}."))}
    model.load_state_dict(own, assign=True)
    return model.eval()
