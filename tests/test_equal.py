"""The policy of equality: it accepts rounding, and it rejects everything else that it is told to reject."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.experts import FFN, ffn_backward, ffn_forward, ffn_keys
from reference.proof.cases import CASES, Case, draw, get, small
from reference.proof.equal import MANTISSA_BITS, Tolerance, assert_equal, compare, compare_all, rms, round_to
from reference.proof.parity import assert_experts_equal, cancellation_scales, experts_truth, layer_truth
from reference.proof.teeth import assert_teeth, layer_mutations, tensor_mutations

LOW_PRECISION = ["float32", "tf32", "bfloat16", "float16"]


def _products(dtype: str, seed: int = 0, shape: tuple[int, int, int] = (65, 48, 40)):
    """(candidate, truth, eager) of a product in `dtype`: truth exact, eager and candidate rounded, the candidate in another order."""
    rng = np.random.default_rng(seed)
    rows, inner, columns = shape
    a = round_to(rng.standard_normal((rows, inner)), dtype)
    b = round_to(rng.standard_normal((inner, columns)) / np.sqrt(inner), dtype)
    halves = round_to(a[:, ::2] @ b[::2], dtype), round_to(a[:, 1::2] @ b[1::2], dtype)
    return round_to(halves[0] + halves[1], dtype), a @ b, round_to(round_to(a, dtype) @ b, dtype)


def _fails(report, *words: str) -> None:
    assert not report.passed
    for word in words:
        assert word in report.failures[0], report.failures


def test_eps_is_finfos():
    for dtype in ("float64", "float32", "float16"):
        assert Tolerance(dtype).eps == np.finfo(dtype).eps
    torch = pytest.importorskip("torch")
    assert Tolerance("bfloat16").eps == torch.finfo(torch.bfloat16).eps
    with pytest.raises(ValueError, match=r"'int8'.*bfloat16"):
        Tolerance("int8")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_round_to_keeps_representable_values_and_moves_the_others_by_half_an_ulp_at_most(dtype):
    values = np.random.default_rng(1).standard_normal(4000)
    once = round_to(values, dtype)
    assert np.array_equal(round_to(once, dtype), once)
    assert 0 < np.max(np.abs(once - values) / np.abs(values)) <= 2.0 ** -(MANTISSA_BITS[dtype] + 1) * (1 + 1e-6)
    assert np.array_equal(np.isnan(round_to([np.nan, np.inf, 1.0], dtype)), [True, False, False])


def test_round_to_bfloat16_is_pytorchs():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(2).standard_normal(4000) * np.logspace(-30, 30, 4000)
    values = np.concatenate([values, [0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf]])
    assert np.array_equal(round_to(values, "bfloat16"), torch.from_numpy(values).to(torch.bfloat16).double().numpy())


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_another_order_of_rounding_passes_with_teeth(dtype):
    candidate, truth, eager = _products(dtype)
    report = compare("y", candidate, truth, eager, dtype)
    assert report.passed, report.failures
    assert 0 < report.rms_error < report.max_error < 1
    assertion = partial(assert_equal, truth={"y": truth}, eager={"y": eager}, dtype=dtype)
    assert len(assert_teeth(assertion, {"y": truth}, tensor_mutations({"y": truth}, dtype))) == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(LOW_PRECISION), st.floats(1e-6, 1e4))
def test_verdict_does_not_depend_on_the_unit(seed, dtype, unit):
    candidate, truth, eager = _products(dtype, seed, (9, 12, 10))
    for wrong in (0.0, 0.5):
        tensors = candidate + wrong * np.eye(9, 10), truth, eager
        reports = [compare("y", *(k * tensor for tensor in tensors), dtype) for k in (1.0, unit)]
        assert reports[0].passed == reports[1].passed
        assert reports[0].rms_error == pytest.approx(reports[1].rms_error, rel=1e-9)


def test_one_bad_row_among_thousands_fails_by_the_largest_error_alone():
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((4000, 16))
    candidate = truth.copy()
    candidate[1234, 5] += 0.2
    _fails(compare("y", candidate, truth, round_to(truth, "bfloat16"), "bfloat16"), "y: max error 0.2", "[1234, 5]", "bfloat16")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_an_element_far_above_the_scale_may_be_wrong_by_its_own_roundings_and_no_more(dtype):
    truth = np.random.default_rng(9).standard_normal((128, 64))
    truth[5, 7] = 32.0
    eager = round_to(truth, dtype)
    neighbour, far = truth.copy(), truth.copy()
    neighbour[5, 7] += 32.0 * Tolerance(dtype).eps
    far[5, 7] += 5 * 32.0 * Tolerance(dtype).eps
    assert compare("y", neighbour, truth, eager, dtype).passed
    failures = compare("y", far, truth, eager, dtype).failures
    assert any("max error" in failure and "[5, 7]" in failure for failure in failures), failures


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_a_correctly_rounded_scalar_passes_and_a_wrong_one_does_not(dtype):
    eps = Tolerance(dtype).eps
    truth = np.asarray(1 + eps / 2 - eps / 100)
    assert compare("loss", round_to(truth, dtype), truth, truth, dtype).passed
    _fails(compare("loss", truth * (1 + 5 * eps), truth, truth, dtype), "loss: max error")


def test_a_scalar_has_no_place_to_name():
    inexact, exact = compare("loss", 0.5, 1.0, 1.0, "float32"), compare("count", 4, 3, None, "float32")
    assert inexact.failures[0].endswith("(float32, scale 1); 0.5 instead of 1")
    assert exact.failures == ("count: 4 instead of 3 (1 of 1 differ)",)


def test_two_percent_scale_fails_by_rms_alone():
    truth = np.random.default_rng(4).uniform(0.9, 1.1, (50, 16))
    report = compare("y", 1.02 * truth, truth, truth, "bfloat16")
    assert len(report.failures) == 1
    _fails(report, "RMS error 0.02")


def test_stacked_weights_are_judged_expert_by_expert():
    truth = np.random.default_rng(5).standard_normal((3, 20, 20))
    truth[1] *= 1e-9
    candidate = truth.copy()
    candidate[1] = 0
    assert compare("w", candidate, truth, truth, "float32").passed
    _fails(compare("w", candidate, truth, truth, "float32", stacked=True), "w[expert 1]: RMS error", "scale 1")
    outputs = {"experts.down_proj": truth}
    with pytest.raises(AssertionError, match=r"experts\.down_proj\[expert 1\]"):
        assert_equal({"experts.down_proj": candidate}, outputs, outputs, "float32")


@pytest.mark.parametrize(
    ("truth", "index", "stacked", "words"),
    [
        (np.zeros((3, 4)), (2, 1), False, "y must be exactly 0 but is 1e-30 at [2, 1]"),
        (np.diag([1.0, 0.0, 1.0]), (1, 2), False, "y must be exactly 0 but is 1e-30 at [1, 2]"),
        (np.ones((2, 3, 3)) * np.array([1.0, 0.0])[:, None, None], (1, 0, 2), True, "y[expert 1] must be exactly 0 but is 1e-30 at [0, 2]"),
    ],
    ids=["tensor", "token", "expert"],
)
def test_exact_zeros(truth, index, stacked, words):
    candidate = truth.copy()
    assert compare("y", -candidate * -1.0, truth, truth, "bfloat16", stacked=stacked).passed
    candidate[index] = 1e-30
    _fails(compare("y", candidate, truth, truth, "bfloat16", stacked=stacked), words)


def test_substitute_scale_where_the_truth_vanishes_by_cancellation():
    rng = np.random.default_rng(6)
    plain = rng.standard_normal((5, 8))
    plain[3] = 0
    truth, eager, candidate = (1e-17 * rng.standard_normal((5, 8)) * (plain != 0) for _ in range(3))
    eager, candidate = eager * 1e9, candidate * 1e9
    assert not compare("router.weight", 1e4 * candidate, truth, eager, "float32").passed
    assert compare("router.weight", candidate, truth, eager, "float32", scale=plain).passed
    assert compare("router.weight", candidate, truth, eager, "float32", scale=rms(plain)).passed
    _fails(compare("router.weight", 1e3 * candidate, truth, eager, "float32", scale=plain), "RMS")
    candidate[3, 2] = 1e-12
    _fails(compare("router.weight", candidate, truth, eager, "float32", scale=plain), "exactly 0", "[3, 2]")
    assertion = partial(assert_equal, truth={"w": truth}, eager={"w": eager}, dtype="float32", scales={"w": plain})
    mutants = list(tensor_mutations({"w": truth}, "float32"))
    assert assert_teeth(assertion, {"w": truth}, mutants, scales={"w": plain}, least=0) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["candidate", "truth", "eager"])
def test_what_is_not_finite_fails(which, bad):
    arrays = {name: np.ones((2, 3)) for name in ("candidate", "truth", "eager")}
    arrays[which][1, 2] = bad
    _fails(compare("y", *arrays.values(), "float16"), f"{which} is {bad} at [1, 2]")


def test_wrong_shapes_and_names_are_failures_with_a_reason():
    one = {"y": np.ones((2, 3))}
    _fails(compare("y", np.ones((3, 2)), one["y"], one["y"], "float32"), "shape (3, 2) instead of (2, 3)")
    _fails(compare("y", one["y"], one["y"], None, "float32"), "no yardstick")
    _fails(compare("y", one["y"], one["y"], one["y"], "float32", scale=np.ones(3)), "substitute")
    for candidate, words in (({}, "y: missing"), ({**one, "z": 1.0}, "z: the truth has no such tensor")):
        with pytest.raises(AssertionError, match=words):
            assert_equal(candidate, one, one, "float32")
    with pytest.raises(AssertionError, match="nothing was compared"):
        assert_equal({}, {}, {}, "float32")


def test_integers_are_exact():
    truth = np.arange(6).reshape(2, 3)
    assert compare("expert", truth.astype(np.int32), truth, None, "bfloat16").passed
    _fails(compare("expert", truth + (truth == 4), truth, None, "bfloat16"), "5 at [1, 1] instead of 4 (1 of 6 differ)")
    _fails(compare("expert", truth.astype(float), truth, None, "bfloat16"), "float64 instead of int64")
    _fails(compare("keep", truth, truth > 0, None, "bfloat16"), "int64 instead of bool")


def test_every_failure_is_listed():
    truth = {"y": np.ones((2, 2)), "dx": np.ones((2, 2))}
    with pytest.raises(AssertionError) as caught:
        assert_equal({"y": np.zeros((2, 2)), "dx": -np.ones((2, 2))}, truth, truth, "float32")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["y", "y", "dx", "dx"]
    assert [report.name for report in compare_all(truth, truth, truth, "float32")] == ["y", "dx"]


def _mixture(params, gate_TK, expert_TK, x_TD):
    """A layer of linear experts, enough to be mutated."""
    per_slot = np.einsum("td,tkfd->tkf", x_TD, params["experts.weight"][expert_TK])
    return {"y": np.einsum("tk,tkf->tf", gate_TK, per_slot)}


def test_mutated_layers_are_rejected_and_harmless_mutations_skipped():
    rng = np.random.default_rng(7)
    params = {"experts.weight": rng.standard_normal((4, 6, 5)), "shared.weight": np.ones(2)}
    expert_TK, x_TD = np.array([[0, 2], [2, 3], [3, 0]]), rng.standard_normal((3, 5))

    def rejected(gate_TK, slots):
        evaluate = partial(_mixture, expert_TK=expert_TK[:, :slots], x_TD=x_TD)
        truth = evaluate(params, gate_TK)
        assertion = partial(assert_equal, truth=truth, eager=truth, dtype="bfloat16")
        return assert_teeth(assertion, truth, layer_mutations(evaluate, params, expert_TK[:, :slots], gate_TK), least=0)

    assert rejected(np.array([[0.3, 0.7], [0.9, 0.1], [0.8, 0.2]]), 2) == ["expert zeroed: 2", "gates shifted: by one slot"]
    assert rejected(np.full((3, 2), 0.5), 2) == ["expert zeroed: 0"]
    assert rejected(np.ones((3, 1)), 1) == ["expert zeroed: 0"]


def test_teeth_reject_a_blind_assertion_a_strict_one_and_an_empty_list():
    truth = {"y": np.random.default_rng(8).standard_normal((4, 3)) * 1e-4}

    def fixed_tolerance(outputs):
        assert np.allclose(outputs["y"], truth["y"], atol=2e-2)

    with pytest.raises(AssertionError, match=r"no teeth; it accepts: zero: y; negated: y; scaled by 1\.02: y; two rows swapped: y"):
        assert_teeth(fixed_tolerance, truth, tensor_mutations(truth, "float16"))
    honest = partial(assert_equal, truth=truth, eager=truth, dtype="float16")
    with pytest.raises(AssertionError, match="only 0 kinds"):
        assert_teeth(honest, truth, [("zero: y", truth)])
    with pytest.raises(AssertionError, match="y: RMS"):
        assert_teeth(partial(assert_equal, truth={"y": -truth["y"]}, eager={"y": -truth["y"]}, dtype="float32"), truth, [])
    with pytest.raises(ZeroDivisionError):
        assert_teeth(lambda outputs: 1 / (outputs is truth), truth, tensor_mutations(truth, "float16"))


def test_cases_cover_what_the_policy_lists():
    cases = CASES
    assert len({case.name for case in cases}) == len(cases)
    assert len({case.reason for case in cases}) == len(cases)
    assert {0, 1, 7, 63, 64, 65, 1000} <= {case.T for case in cases}
    assert any(case.E > 8 and all(case.E % d for d in range(2, case.E)) for case in cases)
    assert {case.K == 1 for case in cases} == {case.K == case.E for case in cases} == {True, False}
    assert (
        {case.contiguous for case in cases} == {case.padded > 0 for case in cases} == {case.dropped > 0 for case in cases} == {True, False}
    )
    assert {"relu", "gelu", "swiglu"} == {case.activation for case in cases}
    assert {0, 1, 7, 63, 64, 65} <= {case.T for case in small()} and set(small()) < set(cases)
    with pytest.raises(ValueError, match=r"no case is called 'big'.*no-tokens"):
        get("big")
    with pytest.raises(ValueError, match=r"'x' has the load 'odd'; known: even"):
        Case("x", "", 1, 2, 3, 4, 1, load="odd")
    with pytest.raises(ValueError, match="'x' has E = 4; with K = 2 the load 'few' needs at least 5"):
        draw(Case("x", "", 3, 2, 3, 4, 2, load="few"))
    with pytest.raises(ValueError, match=r"'x' has padded = 1\.5"):
        Case("x", "", 1, 2, 3, 4, 1, padded=1.5)
    with pytest.raises(ValueError, match="'tile' has D = 32, the config 8"):
        draw(get("tile"), MoEConfig(8, experts=ExpertsConfig(count=4), gating=GatingConfig(top_k=2)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_drawn_inputs_are_what_the_case_says(case):
    inputs, again = draw(case), draw(case)
    routing = inputs.routing
    assert np.array_equal(inputs.x, again.x) and np.array_equal(routing.gate, again.routing.gate)
    assert all(np.array_equal(inputs.params[name], again.params[name]) for name in inputs.params)
    assert inputs.x.shape == inputs.dy.shape == (case.T, case.D) and routing.expert.shape == routing.gate.shape == (case.T, case.K)
    assert inputs.x.flags.c_contiguous == inputs.dy.flags.c_contiguous == (case.contiguous or case.T <= 1)
    assert all(len(set(chosen)) == case.K for chosen in routing.expert.tolist())
    assert routing.expert.min(initial=0) >= 0 and routing.expert.max(initial=0) < case.E
    assert not routing.keep[inputs.pad_mask].any() and not routing.gate[~routing.keep].any() and routing.gate[routing.keep].all()
    assert routing.load.sum() == case.K * (~inputs.pad_mask).sum()
    assert all(np.any(tensor) for tensor in inputs.params.values())
    if case.T:
        assert rms(experts_truth(inputs)["y"]) == pytest.approx(1, abs=1e-12)
    rounded = inputs.rounded(partial(round_to, dtype="bfloat16"))
    assert np.array_equal(rounded.x, round_to(inputs.x, "bfloat16")) and rounded.x.strides == inputs.x.strides


def test_loads_are_what_they_are_called():
    assert draw(get("one-takes-all")).routing.load.tolist() == [0, 0, 0, 65, 0, 0]
    one = draw(get("one-in-all")).routing
    assert one.load[3] == 48 and set(np.nonzero(one.expert == 3)[1]) == {0, 1}
    empty = np.flatnonzero(draw(get("empty-experts")).routing.load == 0)
    assert {0, 8} < set(empty) and len(empty) == 6
    assert (~draw(get("drops")).routing.keep.any(1)).any()


def _in_precision(inputs, dtype, order):
    """The layer again, every intermediate array rounded to `dtype`, experts one by one in the given order: an eager track in NumPy."""
    to = partial(round_to, dtype=dtype)
    config, routing = inputs.config.experts, inputs.routing
    out = {name: np.zeros_like(value) for name, value in experts_truth(inputs).items()}
    keys = ffn_keys("experts", config)[: 4 if config.bias else 2]
    for e in order:
        token_N, slot_N = np.nonzero((routing.expert == e) & routing.keep)
        ffn = FFN(*(inputs.params[key][e] for key in keys), *[None] * (4 - len(keys)))
        gate_N1, dy_ND = routing.gate[token_N, slot_N][:, None], inputs.dy[token_N]
        out_ND, cache = ffn_forward(inputs.x[token_N], ffn, config.activation)
        cache = cache._replace(hidden_NF=to(cache.hidden_NF))
        out_ND = to(out_ND)
        dx_ND, dffn = ffn_backward(to(gate_N1 * dy_ND), ffn, cache, config.activation)
        out["dgate"][token_N, slot_N] = to((dy_ND * out_ND).sum(1))
        out["y"][token_N] = to(out["y"][token_N] + to(gate_N1 * out_ND))
        out["dx"][token_N] = to(out["dx"][token_N] + to(dx_ND))
        for key, gradient in zip(keys, dffn, strict=False):
            out[key][e] = to(gradient)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_every_case_accepts_another_order_of_summation_and_has_teeth(case, dtype):
    inputs = draw(case).rounded(partial(round_to, dtype=dtype))
    eager, candidate = (_in_precision(inputs, dtype, order) for order in (range(case.E), reversed(range(case.E))))
    reports = assert_experts_equal(inputs, candidate, eager, dtype)
    assert [report.name for report in reports] == list(experts_truth(inputs))
    if case.T:
        wrong = {**candidate, "y": candidate["y"] * Tolerance(dtype).scale_mutation}
        with pytest.raises(AssertionError, match="y: RMS error"):
            assert_experts_equal(inputs, wrong, eager, dtype)


def test_router_gradient_that_cancels_is_judged_on_the_scale_of_plain_gates():
    case = get("top-1")
    config = dataclasses.replace(case.config(), gating=GatingConfig(top_k=1, normalize="sum", eps=1e-20), scores=ScoresConfig("sigmoid"))
    inputs = draw(case, config)
    truth, scales = layer_truth(inputs), cancellation_scales(inputs)
    assert list(scales) == ["router.weight"] and rms(truth["router.weight"]) < 1e-12 * rms(scales["router.weight"])
    noisy = {**truth, "router.weight": truth["router.weight"] + 1e-8 * scales["router.weight"]}
    assert_equal(noisy, truth, truth, "float32", scales=scales)
    with pytest.raises(AssertionError, match=r"router\.weight"):
        assert_equal(noisy, truth, truth, "float32")
    with pytest.raises(AssertionError, match=r"router\.weight"):
        assert_equal({**truth, "router.weight": 1e-3 * scales["router.weight"]}, truth, truth, "float32", scales=scales)
    assert cancellation_scales(draw(case)) == {}
