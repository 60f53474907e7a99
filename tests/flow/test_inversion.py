"""All methods find the inverse, in a bounded number of iterations, and say what it took."""

import pytest
import torch
from farmer_flow import AutoregressiveFlow
from farmer_flow import inversion as inversion_module
from farmer_flow.inversion import METHODS, PATIENCE, fixed_point, segment_length
from hypothesis import given
from hypothesis import strategies as st

DIM, LENGTH = 3, 24
PARALLEL = METHODS[1:]
TOLERANCE = 1e-10


@pytest.fixture
def flow(disturb):
    return disturb(AutoregressiveFlow(DIM, LENGTH, width=16, blocks=3, layers=2, head_dim=8, classes=4), 0.1).double()


@pytest.fixture
def wild(disturb):
    """A flow whose second block is chaos: iterating it gets nowhere until its tokens are exact one by one."""
    flow = AutoregressiveFlow(DIM, LENGTH, width=16, blocks=3, layers=2, head_dim=8).double()
    disturb(flow.blocks[0], 0.05)
    disturb(flow.blocks[1], 1.5)
    return flow


def latents(batch=5):
    return torch.randn(batch, LENGTH, DIM, dtype=torch.float64)


def labels(batch=5):
    return torch.arange(batch) % 5 - 1


@pytest.mark.parametrize("method", [*PARALLEL, "auto", ["jacobi", "sequential", "gauss-seidel-jacobi"]])
def test_all_methods_agree_to_the_tolerance(flow, method):
    z = latents()
    expected = flow.inverse(z, labels())
    assert (expected - z).abs().max() > 0.5
    found = flow.inverse(z, labels(), method=method, tolerance=TOLERANCE)
    torch.testing.assert_close(found, expected, atol=100 * TOLERANCE, rtol=100 * TOLERANCE)
    torch.testing.assert_close(flow(found, labels())[0], z, atol=1e-7, rtol=0)


@given(st.integers(2, 20), st.integers(1, 3), st.integers(0, 3), st.sampled_from(PARALLEL))
def test_every_shape_is_inverted_in_at_most_length_iterations(length, blocks, batch, method):
    flow = AutoregressiveFlow(2, length, width=8, blocks=blocks, layers=1, head_dim=4).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.randn(batch, length, 2, dtype=torch.float64)
    found, reports = flow.inversion(z, method=method, tolerance=TOLERANCE)
    torch.testing.assert_close(found, flow.inverse(z), atol=1e-7, rtol=0)
    assert [report.method for report in reports] == [method] * blocks
    for report in reports:
        assert report.iterations.shape == report.fell_back.shape == (batch,)
        assert (report.iterations >= 1).all()
        assert (report.iterations <= length - 1).all()


def test_a_well_behaved_flow_takes_few_iterations(flow):
    _, reports = flow.inversion(latents(), labels(), method="jacobi", tolerance=1e-5)
    for report in reports:
        assert not report.fell_back.any()
        assert (report.iterations < LENGTH // 2).all()


def test_a_looser_tolerance_takes_fewer_iterations(flow):
    taken = {
        tolerance: sum(
            int(report.iterations.sum())
            for report in flow.inversion(latents(), labels(), method="jacobi", tolerance=tolerance).blocks
        )
        for tolerance in (1e-1, 1e-3, 1e-10)
    }
    assert taken[1e-1] < taken[1e-3] < taken[1e-10]


def test_a_fresh_flow_takes_one_iteration():
    flow = AutoregressiveFlow(DIM, LENGTH, width=16, blocks=2, layers=1, head_dim=8)
    z = latents().float()
    found, reports = flow.inversion(z, method="jacobi")
    assert torch.equal(found, z)
    assert all((report.iterations == 1).all() for report in reports)


def test_samples_that_have_converged_are_not_computed(flow):
    rows = []
    flow.blocks[1].transformer.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    _, reports = flow.inversion(latents(), labels(), method="jacobi", tolerance=1e-6)
    iterations = reports[1].iterations
    assert iterations.min() < iterations.max(), "all samples took as many: the test says nothing"
    assert sum(rows) == iterations.sum()


@pytest.mark.parametrize("method", PARALLEL)
def test_a_diverging_block_falls_back_and_says_so(wild, method):
    z = latents()
    found, reports = wild.inversion(z, method=method, tolerance=TOLERANCE)
    expected = wild.inverse(z)
    assert [bool(report.fell_back.any()) for report in reports] == [False, method == "jacobi", False]
    assert (reports[1].iterations[reports[1].fell_back] < LENGTH - 1).all()
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def growing(factors):
    """A step whose tokens are each a factor times the one before, after a first that is 1e-6."""
    factors = torch.tensor(factors, dtype=torch.float64).reshape(-1, 1, 1)
    return lambda x, rows: torch.cat([torch.full_like(x[:, :1], 1e-6), factors[rows] * x[:, :-1]], dim=1)


@pytest.mark.parametrize("drop_settled", [True, False])
def test_only_the_samples_that_diverge_are_given_up(drop_settled):
    """The first sample's changes grow, from far below the tolerance; the second's shrink. The third does not matter."""
    guess, live = torch.zeros(3, 40, 1, dtype=torch.float64), torch.tensor([True, True, False])
    found, iterations, diverged = fixed_point(
        growing([3.0, 0.3, 3.0]), guess, live, tolerance=1e-5, drop_settled=drop_settled
    )
    assert diverged.tolist() == [True, False, False]
    assert iterations[0] == 1 + PATIENCE
    assert 1 < iterations[1] < 4
    assert iterations[2] == 0
    torch.testing.assert_close(found[1, :, 0], 1e-6 * 0.3 ** torch.arange(40, dtype=torch.float64), atol=1e-5, rtol=0)


def test_without_patience_an_iteration_ends_by_its_bound():
    """As many tokens as iterations: exact, though the last change is as large as any."""
    guess, live = torch.zeros(1, PATIENCE, 1, dtype=torch.float64), torch.tensor([True])
    found, iterations, diverged = fixed_point(growing([3.0]), guess, live, tolerance=1e-9, drop_settled=True)
    assert iterations.item() == PATIENCE
    assert not diverged.any()
    torch.testing.assert_close(found[0, :, 0], 1e-6 * 3.0 ** torch.arange(PATIENCE, dtype=torch.float64))


def test_long_segments_fall_back_too(disturb):
    """Segments of 15 tokens, in which a chaotic block outlasts the patience."""
    flow = disturb(AutoregressiveFlow(DIM, 121, width=16, blocks=1, layers=2, head_dim=8), 1.5).double()
    z = torch.randn(2, 121, DIM, dtype=torch.float64)
    found, (report,) = flow.inversion(z, method="gauss-seidel-jacobi", tolerance=TOLERANCE)
    assert report.fell_back.any()
    torch.testing.assert_close(found, flow.inverse(z), atol=1e-7, rtol=0)


def test_latents_that_are_no_numbers_spoil_their_own_sample_alone(flow):
    z = latents()
    expected = flow.inverse(z, labels())
    z[2, 3, 1] = torch.nan
    for method in PARALLEL:
        found, reports = flow.inversion(z, labels(), method=method, tolerance=TOLERANCE)
        assert found[2].isnan().any()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(found[others], expected[others], atol=1e-7, rtol=0)
        assert any(report.fell_back[2] for report in reports)
        assert not any(report.fell_back[others].any() for report in reports)


@pytest.mark.parametrize("method", PARALLEL)
def test_reduced_precision_agrees_to_its_rounding(flow, method):
    z = latents().float()
    flow = flow.float()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, reports = flow.inversion(z, labels(), method=method, tolerance=1e-3)
        expected = flow.inverse(z, labels())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
    assert all((report.iterations <= LENGTH - 1).all() for report in reports)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"sequential": 1e-3, "jacobi": 1.0, "gauss-seidel-jacobi": 1.0}, ["sequential"] * 3),
        ({"sequential": 1.0, "jacobi": 1.0, "gauss-seidel-jacobi": 1.0}, ["jacobi", "sequential", "jacobi"]),
        ({"sequential": 1.0, "jacobi": 100.0, "gauss-seidel-jacobi": 0.1}, ["gauss-seidel-jacobi"] * 3),
    ],
)
def test_the_fastest_method_is_that_of_least_passes_times_seconds(wild, monkeypatch, seconds, expected):
    asked = []

    def timed(_block, _z, method, batch):
        asked.append(batch)
        return seconds[method]

    monkeypatch.setattr(inversion_module, "_seconds_a_pass", timed)
    assert wild.fastest_inverse(latents(2), batch=64) == expected
    assert set(asked) == {64}


def test_the_fastest_inverse_is_measured_and_can_be_used(flow):
    methods = flow.fastest_inverse(latents(2), labels(2), batch=3)
    z = latents()
    found, reports = inversion = flow.inversion(z, labels(), method=methods)
    assert [report.method for report in reports] == inversion.methods == methods
    torch.testing.assert_close(found, flow.inverse(z, labels()), atol=1e-3, rtol=0)
    assert flow.inverse(z[:0], labels()[:0], method="auto").shape == (0, LENGTH, DIM)


def test_only_the_sequential_inverse_is_differentiable(flow):
    z = latents(1).requires_grad_()
    assert flow.inverse(z).requires_grad
    with pytest.raises(ValueError, match="only the sequential inverse is differentiable"):
        flow.inverse(z, method="jacobi")
    with torch.no_grad():
        flow.inverse(z, method="jacobi")
    assert not flow.inverse(z.detach(), method="jacobi").requires_grad


def test_segments_are_a_quarter_of_the_tokens():
    assert [segment_length(method, 63) for method in METHODS] == [1, 63, 16]
    assert segment_length("gauss-seidel-jacobi", 3) == 2


def test_wrong_methods_and_tolerances_are_named(flow):
    with pytest.raises(ValueError, match=r"one for each of 3 blocks: \['jacobi'\]"):
        flow.inverse(latents(), method=["jacobi"])
    with pytest.raises(ValueError, match=r"'sequential', 'jacobi', .*'auto', .*'magic'"):
        flow.inverse(latents(), method="magic")
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance must be positive"):
            flow.inverse(latents(), method="jacobi", tolerance=tolerance)
    with pytest.raises(ValueError, match="at least one latent"):
        flow.fastest_inverse(latents(0))
