"""Recomputation keeps less and changes nothing; compilation of blocks gives the same step."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from openvision.models.layers import Block
from openvision.models.openvision2 import build_model
from openvision.training.setup import compile as execution
from openvision.training.setup.compile import EXPENSIVE, prepare_blocks
from tests.training.small_step import randomness_of, recipe_of, run


class Watch(TorchDispatchMode):
    """Counts the expensive operations."""

    def __init__(self) -> None:
        super().__init__()
        self.expensive = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.expensive += func in EXPENSIVE
        return func(*args, **(kwargs or {}))


def held_bytes(model: nn.Module) -> int:
    """Bytes that autograd holds on to after a block, beside the block's output and parameters."""
    x = torch.randn(4, 20, 32, requires_grad=True)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    known = [x, output, *model.parameters()]
    return sum(size for pointer, size in held.items() if pointer not in {t.data_ptr() for t in known})


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2", "genlip"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_nothing(kind, mode):
    recipe = recipe_of(kind)
    torch.manual_seed(0)
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, randomness_of(0.5))
    prepare_blocks(model, mode)
    again, recomputed = run(model, recipe, 1, randomness_of(0.5))
    assert again == terms
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_prepared_blocks_are_blocks_and_no_method_of_an_instance_is_replaced():
    plain, prepared = (build_model(recipe_of("openvision").model) for _ in range(2))
    prepare_blocks(prepared, "full")
    assert prepared.state_dict().keys() == plain.state_dict().keys()
    blocks = [module for module in prepared.modules() if isinstance(module, Block)]
    assert len(blocks) == 7
    assert all(not {"forward", "forward_rows", "forward_prefix", "forward_queries"} & vars(b).keys() for b in blocks)
    assert len({type(block) for block in blocks}) == 2


def test_selective_keeps_half_of_the_mlp_on_a_cpu():
    plain, recomputing = Block(32, 4, 64, "tanh"), Block(32, 4, 64, "tanh")
    prepare_blocks(recomputing, "selective")
    # The output of the norm, and of the GELU.
    assert held_bytes(plain) - held_bytes(recomputing) == 4 * 4 * 20 * (32 + 64)


def test_full_keeps_nothing_of_a_block_and_selective_computes_no_product_again(monkeypatch):
    recipe = recipe_of("openvision")
    products = {}
    # What an accelerator does; on a CPU blocks have a function of their own.
    monkeypatch.setattr(execution, "_except_on_cpu", lambda method, on_cpu: method)
    for mode in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = build_model(recipe.model).train()
        prepare_blocks(model, mode)
        for block in model.modules():
            if isinstance(block, Block):
                block.recompute_mlp = False
        with Watch() as watch:
            run(model, recipe, 1, randomness_of())
        products[mode] = watch.expensive
    assert products["none"] == products["selective"] < products["full"]

    plain, wrapped = Block(32, 4, 64, "tanh"), nn.Sequential(Block(32, 4, 64, "tanh"))
    prepare_blocks(wrapped, "full")
    assert held_bytes(plain) > 10 * 4 * 20 * 32
    assert held_bytes(wrapped) == 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_step():
    recipe = recipe_of("openvision")
    torch.manual_seed(0)
    model = build_model(recipe.model).train()
    terms, gradients = run(model, recipe, 1, randomness_of())
    prepare_blocks(model, "selective", compiled=True)
    again, compiled = run(model, recipe, 1, randomness_of())
    assert abs(again["loss"] - terms["loss"]) < 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
