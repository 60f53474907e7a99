"""The laws of the flow: paper, Eq. 8-10."""

import math

import pytest
import torch
from farmer_flow import AutoregressiveFlow, FlowTransform
from farmer_flow.flow import LOG_SCALE_BOUND
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, TransformedDistribution

DIM, LENGTH = 3, 5


@pytest.fixture(params=[0, 4], ids=["unconditional", "conditional"])
def flow(request, disturb):
    return disturb(
        AutoregressiveFlow(DIM, LENGTH, width=16, blocks=3, layers=2, head_dim=8, classes=request.param)
    ).double()


def labels(batch):
    return torch.arange(batch) % 4 - 1


def tokens(batch=2, dtype=torch.float64):
    return torch.randn(batch, LENGTH, DIM, dtype=dtype)


def jacobian(function, x):
    size = x.numel()
    return torch.autograd.functional.jacobian(function, x).reshape(size, size)


def test_logdet_is_that_of_the_jacobian(flow):
    for x, label in zip(tokens(3).split(1), labels(3).split(1), strict=True):
        _, logdet = flow(x, label)
        expected = jacobian(lambda t, c=label: flow(t, c)[0], x).slogdet().logabsdet
        assert abs(logdet - expected).item() < 1e-8


def test_bounded_scales_keep_the_law(disturb):
    """Weights so large that log-scales saturate: the bound holds, and the law with it."""
    flow = disturb(AutoregressiveFlow(2, 4, width=16, blocks=1, layers=1, head_dim=8), deviation=4.0).double()
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    derivative = jacobian(lambda t: flow(t)[0], x)
    log_scales = derivative.diagonal()[2:].log()
    assert log_scales.abs().max() <= LOG_SCALE_BOUND
    assert log_scales.abs().max() > 0.9 * LOG_SCALE_BOUND
    z, logdet = flow(x)
    # the determinant of a triangular matrix this badly scaled is taken from its diagonal
    assert abs(logdet - log_scales.sum()).item() < 1e-8
    torch.testing.assert_close(flow.inverse(z), x, atol=1e-8, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_inverse_undoes_forward(flow, grad):
    x = tokens()
    with torch.set_grad_enabled(grad):
        z, _ = flow(x, labels(2))
        assert not torch.allclose(z, x, atol=0.1)
        torch.testing.assert_close(flow.inverse(z, labels(2)), x, atol=1e-8, rtol=0)
        torch.testing.assert_close(flow(flow.inverse(x, labels(2)), labels(2))[0], x, atol=1e-8, rtol=0)


def test_inverse_undoes_forward_in_float32_at_64_tokens(disturb):
    flow = disturb(AutoregressiveFlow(12, 64, width=64, blocks=4, layers=2), deviation=0.05)
    x = torch.randn(4, 64, 12)
    with torch.inference_mode():
        z, _ = flow(x)
        assert (flow.inverse(z) - x).abs().max() < 1e-3


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 4), st.integers(1, 3))
def test_every_shape_is_inverted(dim, length, blocks, batch):
    flow = AutoregressiveFlow(dim, length, width=8, blocks=blocks, layers=1, head_dim=4).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(batch, length, dim, dtype=torch.float64)
    z, logdet = flow(x)
    assert logdet.shape == (batch,)
    torch.testing.assert_close(flow.inverse(z), x, atol=1e-8, rtol=0)


def test_a_fresh_flow_is_the_identity():
    flow = AutoregressiveFlow(DIM, LENGTH, width=16, blocks=3, layers=1, head_dim=8)
    x = tokens(dtype=torch.float32)
    z, logdet = flow(x)
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))


def test_no_token_sees_a_later_one_in_its_blocks_order(flow):
    x = tokens(1)
    for index, block in enumerate(flow.blocks):
        blocks = jacobian(lambda t, b=block: b(t)[0], x).reshape(LENGTH, DIM, LENGTH, DIM)
        reads = blocks.abs().amax(dim=(1, 3)) > 0  # (output token, input token)
        lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        expected = lower.mT if index % 2 else lower
        assert torch.equal(reads, expected)
        for token in range(LENGTH):  # within a token each channel is only shifted and scaled
            own = blocks[token, :, token]
            assert torch.equal(own, own.diagonal().diag())
        first = -1 if index % 2 else 0
        assert torch.equal(blocks[first, :, first], torch.eye(DIM, dtype=torch.float64))


def test_density_integrates_to_one(disturb):
    flow = disturb(AutoregressiveFlow(1, 2, width=8, blocks=2, layers=1, head_dim=8), deviation=0.2).double()
    axis = torch.linspace(-15, 15, 901, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).unsqueeze(-1)
    with torch.inference_mode():
        z, logdet = flow(grid)
        density = (Normal(0.0, 1.0).log_prob(z).sum((1, 2)) + logdet).exp()
    edge = density.reshape(901, 901)
    assert max(edge[0].max(), edge[-1].max(), edge[:, 0].max(), edge[:, -1].max()) < 1e-8, "the grid is too small"
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-4)


def test_gradients_reach_every_parameter(flow):
    z, logdet = flow(tokens(4), labels(4))
    (z.square().sum() + logdet.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_inverse_is_differentiable(flow):
    z = tokens(1).requires_grad_()
    direct = jacobian(flow.inverse, z)
    expected = jacobian(lambda t: flow(t)[0], flow.inverse(z).detach()).inverse()
    torch.testing.assert_close(direct, expected)


def test_trajectory_ends_at_the_latents(flow):
    x = tokens()
    states = flow.trajectory(x, labels(2))
    assert len(states) == 4
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], flow(x, labels(2))[0])


def test_null_class_is_any_negative_label_and_none(disturb):
    flow = disturb(AutoregressiveFlow(DIM, LENGTH, width=16, blocks=2, layers=1, head_dim=8, classes=3))
    x = tokens(1, torch.float32)
    without = flow(x)[0]
    assert torch.equal(flow(x, torch.tensor([-1]))[0], without)
    assert torch.equal(flow(x, torch.tensor([-7]))[0], without)
    assert not torch.allclose(flow(x, torch.tensor([0]))[0], without)


def test_bfloat16_autocast_keeps_float32_determinants(disturb):
    flow = disturb(AutoregressiveFlow(DIM, LENGTH, width=16, blocks=2, layers=1, head_dim=8), deviation=0.05)
    x = tokens(8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, logdet = flow(x)
        back = flow.inverse(z)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(logdet, flow(x)[1], atol=0.2, rtol=0.05)
    torch.testing.assert_close(back, x, atol=0.1, rtol=0.05)
    assert flow(x.bfloat16())[1].dtype == torch.float32


def test_bfloat16_weights_keep_float32_determinants(disturb):
    flow = disturb(AutoregressiveFlow(DIM, LENGTH, width=16, blocks=2, layers=1, head_dim=8), deviation=0.05)
    x = tokens(8, torch.float32)
    expected = flow(x)[1]
    z, logdet = flow.bfloat16()(x)
    assert z.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(logdet, expected, atol=0.2, rtol=0.05)
    torch.testing.assert_close(flow.inverse(z), x, atol=0.1, rtol=0.05)


def test_the_autocast_logdet_is_summed_in_float32():
    """A thousand scales of 1.001 add up to what bfloat16 could not hold."""
    flow = AutoregressiveFlow(25, 41, width=8, blocks=1, layers=1, head_dim=8)
    torch.nn.init.constant_(flow.blocks[0].out.bias, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        _, logdet = flow(torch.randn(1, 41, 25))
    exact = 1000 * LOG_SCALE_BOUND * math.tanh(0.5 / LOG_SCALE_BOUND)
    assert logdet.item() == pytest.approx(exact, rel=1e-6)


def test_distribution_has_the_flows_density(flow):
    base = Independent(Normal(torch.zeros(LENGTH, DIM).double(), 1.0), 2)
    density = TransformedDistribution(base, FlowTransform(flow, labels(3)))
    x = density.sample((3,))
    z, logdet = flow(x, labels(3))
    torch.testing.assert_close(density.log_prob(x), base.log_prob(z) + logdet)
    transform = density.transforms[0]
    torch.testing.assert_close(transform(z), x, atol=1e-8, rtol=0)
    assert FlowTransform(flow) == FlowTransform(flow).with_cache(1)
    assert transform != FlowTransform(flow)


def test_a_cache_lets_the_distribution_run_the_flow_once(flow):
    calls = []
    flow.register_forward_hook(lambda *_: calls.append(1))
    base = Independent(Normal(torch.zeros(LENGTH, DIM).double(), 1.0), 2)
    TransformedDistribution(base, FlowTransform(flow, cache_size=1)).log_prob(tokens())
    assert len(calls) == 1


def test_distribution_follows_the_flows_training(flow):
    """The same tensor of data is scored anew after every step."""
    base = Independent(Normal(torch.zeros(LENGTH, DIM).double(), 1.0), 2)
    density, x = TransformedDistribution(base, FlowTransform(flow)), tokens()
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    for _ in range(3):
        z, logdet = flow(x)
        log_prob = density.log_prob(x)
        torch.testing.assert_close(log_prob, base.log_prob(z) + logdet)
        (-log_prob.sum()).backward()
        optimizer.step()
    latents = density.transforms[0].inv(x)
    with torch.no_grad():
        flow.blocks[0].out.bias.add_(0.1)
    expected = flow(x)[1]
    torch.testing.assert_close(density.transforms[0].log_abs_det_jacobian(latents, x), -expected)


def test_saving_and_loading_keeps_the_numbers(flow, tmp_path):
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    other = AutoregressiveFlow(DIM, LENGTH, width=16, blocks=3, layers=2, head_dim=8, classes=flow.classes).double()
    other.load_state_dict(torch.load(tmp_path / "flow.pt"))
    x = tokens()
    assert torch.equal(other(x)[0], flow(x)[0])


def test_parameters_of_the_papers_flow():
    with torch.device("meta"):
        flow = AutoregressiveFlow(192, 1024, width=768, blocks=28, layers=4)
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(828e6, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 1}, "length must be at least 2"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"width": 12}, "multiple of head_dim"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_sizes_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AutoregressiveFlow(**{"dim": 2, "length": 4, "width": 16, "blocks": 1, "layers": 1, "head_dim": 8, **wrong})


def test_wrong_input_is_named(flow):
    with pytest.raises(ValueError, match=r"length=5, dim=3\), got \(2, 4, 3\)"):
        flow(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"\(2,\) integers, got \(3,\)"):
        flow(tokens(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequential"):
        flow.inverse(tokens(), method="magic")
    if flow.classes:
        with pytest.raises(ValueError, match="below classes=4, got 4"):
            flow(tokens(), torch.tensor([0, 4]))
