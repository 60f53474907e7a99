"""What is done to a model from outside changes what it costs, and nothing else."""

import copy

import farmer_ar.prior
import pytest
import torch
from farmer_ar import LatentPrior
from farmer_distill import OneStepInverse
from farmer_examples.parallel import checkpoint_activations, compile_parts
from farmer_flow import AutoregressiveFlow
from torch import nn
from torch._dynamo.utils import counters

FLOW = AutoregressiveFlow(3, 8, width=16, blocks=3, layers=2, head_dim=8, classes=2)
PRIOR = LatentPrior(3, 8, informative_dim=2, width=16, layers=6, head_dim=8, components=2, classes=2)
GRAPHS = {
    # a block in either direction, and the first block or layer, whose input has no gradient
    ("flow", True): 3,
    ("flow", False): 1,
    ("student", True): 3,
    ("student", False): 1,
    # the layers, and mixtures of 3 and 2 tokens
    ("prior", True): 3,
    ("prior", False): 3,
}
LOSSES = {
    "flow": (lambda: FLOW, lambda flow, x, y: flow(x, y)[0].square().mean() - flow(x, y)[1].mean()),
    "student": (lambda: OneStepInverse.from_flow(FLOW), lambda student, x, y: student(x, y).square().mean()),
    "prior": (lambda: PRIOR, lambda prior, x, y: -prior.log_prob(x, y).mean()),
}


def gradients(module, loss):
    module.zero_grad()
    x, y = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -1, 0])
    x = x.to(next(module.parameters()).dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = loss(module, x, y)
    value.backward()
    return value, [parameter.grad.clone() for parameter in module.parameters()], sum(saved)


@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing_keeps_value_and_gradients_and_less(disturb, name):
    make, loss = LOSSES[name]
    module = disturb(copy.deepcopy(make()), deviation=0.1)
    names = list(module.state_dict())
    value, expected, kept = gradients(module, loss)
    checkpoint_activations(module)
    same, ours, kept_now = gradients(module, loss)
    assert torch.equal(same, value)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert kept_now < 0.5 * kept
    assert [key.replace("_checkpoint_wrapped_module.", "") for key in module.state_dict()] == names


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("whole_blocks", [False, True], ids=["layers", "blocks"])
@pytest.mark.parametrize("name", LOSSES)
def test_compilation_keeps_value_and_gradients(name, whole_blocks, checkpointing, disturb, monkeypatch):
    make, loss = LOSSES[name]
    module = disturb(copy.deepcopy(make()), deviation=0.1).double()
    monkeypatch.setattr(farmer_ar.prior, "CHUNK_NUMBERS", 3 * 4 * PRIOR.informative.numbers)  # 3, 3 and 2 tokens
    value, expected, _ = gradients(module, loss)
    if checkpointing:
        checkpoint_activations(module)
    compile_parts(nn.ModuleList([module]), whole_blocks=whole_blocks)
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        same, ours, _ = gradients(module, loss)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(module, loss)
    torch.testing.assert_close(same, value)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == GRAPHS[name, whole_blocks]


@pytest.mark.slow
def test_compiled_densities_are_float32_under_autocast(disturb):
    """Kept in bfloat16, whose step from 16 to 32 is 0.125, they would be off by up to 0.06, and lie on such steps."""
    flow, prior = disturb(copy.deepcopy(FLOW), deviation=0.1), disturb(copy.deepcopy(PRIOR), deviation=0.1)
    x, y = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3 - 1

    def densities():
        with torch.autocast("cpu", torch.bfloat16):
            z, logdet = flow(x, y)
            return torch.stack([logdet, prior.log_prob(z.detach(), y)])

    plain = densities()
    compile_parts(nn.ModuleList([flow, prior]))
    torch.compiler.reset()
    compiled = densities()
    assert compiled.dtype == torch.float32
    assert not torch.equal(compiled.bfloat16().float(), compiled)
    torch.testing.assert_close(compiled, plain, rtol=0.02, atol=0.05)
