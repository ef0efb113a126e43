"""A batch in chunks gives the losses and gradients of the batch at once, whatever is random in it."""

import copy

import pytest
import torch
from torch import nn

from openvision.data.loader import Batch
from openvision.models.openvision2 import build_model
from openvision.training.draws import Draws
from openvision.training.objective import build_objective
from openvision.training.optimizer import Adam
from openvision.training.recipe import Recipe, parse_recipe
from openvision.training.step import Step

SAMPLES = 8


def recipe_of(kind: str) -> Recipe:
    decoder = {"width": 16, "depth": 2, "mlp_dim": 32, "heads": 2, "vocab_size": 40, "caption_length": 9}
    text = {"width": 24, "depth": 2, "mlp_dim": 32, "heads": 2, "vocab_size": 40, "context_length": 7}
    vision = {"width": 32, "depth": 3, "mlp_dim": 48, "heads": 2, "patch_size": 8, "image_size": 32}
    stage = {"resolution": 32, "samples": SAMPLES, "batch_size": SAMPLES, "base_learning_rate": 0.01}
    data = {"train": "train", "vocab_size": 40}
    v2 = {"kind": "openvision2", "vision": vision, "decoder": decoder, "keep_ratio": 0.5}
    clip = {"embed_dim": 16, "vision": vision, "text": text}
    model, loss = {
        "openvision": (clip | {"decoder": decoder}, {}),
        "clip": (clip, {"caption": 0, "texts": ["alt"]}),
        "openvision2": (v2, {"contrastive": 0, "texts": []}),
    }[kind]
    return parse_recipe({"name": kind, "model": model, "loss": loss, "data": data, "stages": [stage]}, kind)


def batch_of(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, 40, (SAMPLES, length), generator=generator)

    # Captions of very different lengths, one of them empty: chunks differ in their number of target tokens.
    lengths = torch.tensor([0, 1, 9, 2, 9, 9, 3, 1])
    return Batch(
        images=torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=generator).to(torch.uint8),
        alt_ids=ids(7),
        sentence_ids=ids(7),
        labels=ids(9),
        label_mask=torch.arange(9) < lengths[:, None],
        positions=torch.arange(100, 100 + SAMPLES),
        keys=[str(number) for number in range(SAMPLES)],
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


class Watched(Adam):
    """Leaves the parameters alone, so that gradients can be compared."""

    def update(self, learning_rate: float, measure: bool = False) -> None:
        pass


def run(model: nn.Module, recipe: Recipe, parts: int, draws: Draws, dtype: torch.dtype = torch.float32):
    model.zero_grad()
    optimizer = Watched([{"params": list(model.parameters())}])
    losses = Step(model, build_objective(recipe, bos_id=1), optimizer, dtype, parts)(batch_of(), draws, 0.1)
    return losses.terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def draws_of(drop_path: float = 0.0) -> Draws:
    return Draws(seed=3, positions=torch.arange(100, 100 + SAMPLES), drop_path=drop_path)


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_chunks_equal_the_batch_in_float64(kind, parts):
    recipe = recipe_of(kind)
    model = build_model(recipe.model).double().train()
    terms, gradients = run(model, recipe, 1, draws_of(drop_path=0.6))
    chunked_terms, chunked_gradients = run(model, recipe, parts, draws_of(drop_path=0.6))
    assert terms.keys() == chunked_terms.keys()
    for name, value in terms.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(chunked_terms[name], value, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == chunked_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_chunks_equal_the_batch_in_float32():
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, draws_of())
    chunked_terms, chunked_gradients = run(model, recipe, 4, draws_of())
    assert abs(terms["loss"] - chunked_terms["loss"]) < 1e-5
    for name, gradient in gradients.items():
        assert (gradient - chunked_gradients[name]).abs().max() < 1e-5 + 1e-4 * gradient.abs().max(), name


def test_every_parameter_learns_under_autocast_in_chunks():
    """Autocast keeps the weights it casts: those cast without a gradient must not serve the second pass."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, draws_of(), torch.bfloat16)
    chunked_terms, chunked_gradients = run(model, recipe, 4, draws_of(), torch.bfloat16)
    assert gradients.keys() == chunked_gradients.keys() == dict(model.named_parameters()).keys()
    assert abs(terms["loss"] - chunked_terms["loss"]) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == chunked_gradients[name].dtype == torch.float32
        assert (gradient - chunked_gradients[name]).norm() < 0.1 * gradient.norm() + 1e-4, name


def test_the_plain_mean_over_chunks_is_another_loss():
    """What naive accumulation would do: fewer negatives, and captions weighed by chunk."""
    recipe = recipe_of("openvision")
    model = build_model(recipe.model).train()
    objective, batch = build_objective(recipe, 1), batch_of()
    embeds, _terms = objective.forward(model, batch, draws_of(), batch.label_mask.sum())
    whole = objective.coupled(model, embeds)["contrastive"]
    halves = [objective.coupled(model, tuple(e.narrow(-2, s, 4) for e in embeds))["contrastive"] for s in (0, 4)]
    assert abs(sum(halves) / 2 - whole) > 0.1


def test_stochastic_depth_is_a_function_of_seed_and_position():
    scales = draws_of(0.5).branch_scales(3)
    assert scales is not None
    assert scales.shape == (3, 2, SAMPLES)
    assert (scales[0] == 1).all()
    assert set(scales[2].flatten().tolist()) <= {0.0, 2.0}
    part, other = draws_of(0.5).part(slice(2, 5)).branch_scales(3), Draws(4, draws_of().positions, 0.5).branch_scales(3)
    assert part is not None
    assert other is not None
    assert torch.equal(part, scales[..., 2:5])
    assert not torch.equal(other, scales)
    assert draws_of(0.0).branch_scales(3) is None


def test_dropped_branches_are_left_out_and_only_in_the_step():
    recipe = recipe_of("clip")
    model = build_model(recipe.model).train()
    plain, _ = run(model, recipe, 1, draws_of(0.0))
    dropped, gradients = run(model, recipe, 1, draws_of(0.9999))
    assert plain["loss"] != dropped["loss"]
    assert gradients["vision.blocks.2.mlp.fc1.weight"].norm() == 0
    assert all(block.branch_scale is None for block in model.vision.blocks)
    again, _ = run(copy.deepcopy(model), recipe, 1, draws_of(0.0))
    assert plain["loss"] == again["loss"]
