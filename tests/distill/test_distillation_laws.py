"""A student is the flow's inverse where one parallel pass a block suffices, and learns to be it where not."""

import copy

import pytest
import torch
from farmer_distill import OneStepInverse, block_errors, distillation_loss
from farmer_flow import AutoregressiveFlow
from torch import Generator

DIM, LENGTH = 3, 8


def flow_of(classes=0, blocks=3, layers=1):
    return AutoregressiveFlow(DIM, LENGTH, width=32, blocks=blocks, layers=layers, head_dim=16, classes=classes)


@pytest.fixture
def flow(disturb):
    return disturb(flow_of(classes=4), 0.1)


def latents(batch=4):
    return torch.randn(batch, LENGTH, DIM)


def labels(batch=4):
    return torch.arange(batch) % 5 - 1


def test_the_student_of_a_fresh_flow_is_the_identity():
    z = latents()
    assert torch.equal(OneStepInverse.from_flow(flow_of())(z), z)


def test_an_untrained_student_makes_one_jacobi_iteration_a_block(flow):
    """Oracle: the affine inverse of each token, with the parameters that the flow's forward pass finds in z itself."""
    z, student = latents(), OneStepInverse.from_flow(flow)
    expected = z
    for block in reversed(flow.blocks):
        forward, _ = block(expected, labels())
        ordered, mapped = block.in_order(expected), block.in_order(forward)
        shifted = ordered.clone().requires_grad_()
        found, _ = block(block.in_order(shifted), labels())
        found = block.in_order(found)
        rows = []
        for token in range(LENGTH):  # forward is (x - mu) sigma: sigma is its derivative, mu follows
            (gradient,) = torch.autograd.grad(found[:, token].sum(), shifted, retain_graph=True)
            sigma = gradient[:, token]
            mu = ordered[:, token] - mapped[:, token] / sigma
            rows.append(ordered[:, token] / sigma + mu)
        expected = block.in_order(torch.stack(rows, dim=1)).detach()
    torch.testing.assert_close(student(z, labels()), expected, atol=1e-4, rtol=1e-4)


def test_the_first_two_tokens_of_a_single_block_are_exact(disturb):
    flow = disturb(flow_of(blocks=1), 0.2)
    z = latents()
    found, exact = OneStepInverse.from_flow(flow)(z), flow.inverse(z)
    torch.testing.assert_close(found[:, :2], exact[:, :2])
    assert (found[:, 2:] - exact[:, 2:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_every_token_comes_from_latents_up_to_its_own(disturb):
    """As in the exact inverse of a block: no later latent can spoil a token."""
    student = OneStepInverse.from_flow(disturb(flow_of(blocks=1), 0.2))
    z = latents(1)
    jacobian = torch.autograd.functional.jacobian(student, z).abs().amax(dim=(0, 2, 3, 5)) > 0
    assert torch.equal(jacobian, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


def test_the_trajectory_ends_at_the_data(flow):
    student, z = OneStepInverse.from_flow(flow), latents()
    states = student.trajectory(z, labels())
    assert len(states) == 4
    assert torch.equal(states[-1], z)
    assert torch.equal(states[0], student(z, labels()))


def test_the_errors_are_those_of_the_states(flow):
    """Oracle: both trajectories, compared by hand; without noise the teacher's own latents are the start."""
    student, x = OneStepInverse.from_flow(flow), latents()
    teacher = flow.trajectory(x, labels())
    reached = student.trajectory(teacher[-1], labels())
    expected = [((a - b) ** 2).mean() for a, b in zip(reached[:-1], teacher[:-1], strict=True)]
    errors = block_errors(student, flow, x, labels(), max_noise=0.0)
    torch.testing.assert_close(errors, torch.stack(expected))
    torch.testing.assert_close(distillation_loss(student, flow, x, labels(), max_noise=0.0), errors.mean())


def test_the_noise_is_uniform_in_its_deviation():
    """Of a fresh flow each error is the noise itself, E[s^2] = max_noise^2 / 3, here to 4.5 standard errors."""
    flow = flow_of()
    x = torch.zeros(20000, LENGTH, DIM)
    error = block_errors(OneStepInverse.from_flow(flow), flow, x, max_noise=0.3, generator=Generator().manual_seed(0))
    # s^2 / 9e-2 has variance 1/5 - 1/9 over sequences, and a sequence's own noise adds little
    standard_error = 0.09 * (4 / 45 + 2 / 5 / (LENGTH * DIM)) ** 0.5 / 20000**0.5
    assert abs(error[-1].item() - 0.03) < 4.5 * standard_error
    same = block_errors(OneStepInverse.from_flow(flow), flow, x, max_noise=0.3, generator=Generator().manual_seed(0))
    assert torch.equal(error, same)


def test_the_teacher_stays_as_it_is_and_gets_no_gradient(flow):
    before = copy.deepcopy(flow.state_dict())
    student = OneStepInverse.from_flow(flow)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    distillation_loss(student, flow, latents(), labels()).backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in flow.parameters())
    assert all(torch.equal(flow.state_dict()[name], tensor) for name, tensor in before.items())
    after = student.state_dict().values()  # in the same order
    assert any(not torch.equal(tensor, old) for tensor, old in zip(after, before.values(), strict=True))


def test_gradients_reach_every_parameter_also_of_a_frozen_flow(flow):
    student = OneStepInverse.from_flow(flow.requires_grad_(False).eval())
    distillation_loss(student, flow, latents(), labels()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_distillation_lowers_the_error_on_latents_of_the_prior(disturb):
    """By a factor of 4 at least, on latents that are not among those whose data it learns from."""
    flow = disturb(flow_of(classes=4, blocks=2), 0.15).requires_grad_(False)
    generator = Generator().manual_seed(0)
    z = torch.randn(256, LENGTH, DIM, generator=generator)
    exact = flow.inverse(z, labels(256))
    student = OneStepInverse.from_flow(flow)

    def error():
        with torch.no_grad():
            return (student(z, labels(256)) - exact).square().mean().item()

    before = error()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for _ in range(200):
        x = flow.inverse(torch.randn(64, LENGTH, DIM, generator=generator), labels(64), method="jacobi")
        loss = distillation_loss(student, flow, x, labels(64), max_noise=0.1, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < before / 4


def test_the_weight_of_the_data_and_its_units(flow):
    """Oracle: the terms put together by hand, the last after the map."""
    student, x = OneStepInverse.from_flow(flow), latents()
    errors = block_errors(student, flow, x, labels(), max_noise=0.0)
    course = {"max_noise": 0.0, "data_weight": 5.0}
    loss = distillation_loss(student, flow, x, labels(), **course)
    torch.testing.assert_close(loss, errors.mean() + 5 * errors[0])
    loss = distillation_loss(student, flow, x, labels(), **course, decode=lambda tokens: 3 * tokens + 1)
    torch.testing.assert_close(loss, errors.mean() + 5 * 9 * errors[0])


def test_saving_and_loading_keeps_the_numbers(flow, tmp_path):
    student, z = OneStepInverse.from_flow(flow), latents()
    torch.nn.init.normal_(student.blocks[0].block.out.bias)
    torch.save(student.state_dict(), tmp_path / "student.pt")
    other = OneStepInverse.from_flow(flow)
    assert not torch.equal(other(z), student(z))
    other.load_state_dict(torch.load(tmp_path / "student.pt"))
    assert torch.equal(other(z), student(z))


def test_precisions(flow):
    student, z = OneStepInverse.from_flow(flow), latents()
    expected = student(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = student(z)
        loss = distillation_loss(student, flow, z)
    assert found.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
    assert student.double()(z.double()).dtype == torch.float64


def test_wrong_input_is_named(flow):
    student = OneStepInverse.from_flow(flow)
    with pytest.raises(ValueError, match=r"length=8, dim=3\), got \(2, 4, 3\)"):
        student(torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="below classes=4, got 4"):
        student(latents(), torch.full((4,), 4))
    for noise in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="max_noise must be at least 0"):
            distillation_loss(student, flow, latents(), max_noise=noise)
    with pytest.raises(ValueError, match="data_weight must be at least 0"):
        distillation_loss(student, flow, latents(), data_weight=-1.0)
    with pytest.raises(ValueError, match="the student has 3 blocks, and the teacher 2"):
        distillation_loss(student, flow_of(blocks=2), latents())
