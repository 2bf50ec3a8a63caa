"""Learned rotations: orthogonal, function-preserving, and better than where they began."""

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes
from models import tiny_llama, tiny_tokens

import lowbit
from lowbit.distribution import Distribution, _activations, fit_rotations, whip
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.formats import QuantFormat
from lowbit.models import adapter_for
from lowbit.nn.online_map import OnlineMap
from lowbit.progress import Progress
from lowbit.recipes import overridden, recipe_named
from lowbit.rounding import RTN
from lowbit.rounding.grid import fake_quantize
from lowbit.rounding.learned import _Largest
from lowbit.training import Training, _quantized, _trainable, learn_rotations
from lowbit.transforms import FoldNorms, LearnedRotation, LearnRotation, Rotate, fit
from lowbit.transforms.cayley import CayleySGD, cayley_step, nearest_orthogonal
from lowbit.transforms.learned import Learner
from lowbit.transforms.online import OnlineTransform

SPINQUANT = recipe_named("spinquant").transforms
SHORT = Training(steps=6, batch=2, length=24)
W4A4KV4 = QuantFormat.parse("w4a4kv4")


def learned(model, transforms, training=SHORT, seed=0, folder=None):
    fitted = fit(transforms, adapter_for(model.config), seed)
    windows = tiny_tokens(4, 24)
    saved = Progress(folder, {})
    return learn_rotations(model, fitted, training, W4A4KV4, (1.0, 1.0), windows, saved, False)


def is_orthogonal(matrix: torch.Tensor, error: float) -> bool:
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return (matrix @ matrix.T - eye).abs().max().item() < error


@pytest.mark.parametrize("lr", [0.1, 1.5, 100.0])
def test_a_cayley_step_stays_orthogonal_and_goes_downhill(lr):
    generator = torch.Generator().manual_seed(0)
    x = nearest_orthogonal(torch.randn(3, 16, 16, generator=generator, dtype=torch.float64))
    target = nearest_orthogonal(torch.randn(3, 16, 16, generator=generator, dtype=torch.float64))
    gradient = x - target  # of |x - target|^2 / 2
    moved = cayley_step(x, gradient, lr)
    assert all(is_orthogonal(m, 1e-12) for m in moved)
    assert ((moved - target).square().sum((1, 2)) < (x - target).square().sum((1, 2))).all()


def test_the_basis_before_the_rotation_does_not_matter_to_a_step():
    """An outlier is one channel there; steps bounded by its column were several times too short."""
    generator = torch.Generator().manual_seed(0)
    x, basis = (
        nearest_orthogonal(torch.randn(16, 16, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )
    gradient = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    gradient[3] *= 100
    for lr in (1e-4, 1.5):
        expected = basis @ cayley_step(x, gradient, lr)
        torch.testing.assert_close(cayley_step(basis @ x, basis @ gradient, lr), expected)


def test_cayley_sgd_finds_a_rotation():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    turn = nearest_orthogonal(torch.randn(8, 8, generator=generator))
    turn[:, 0] *= torch.linalg.det(turn)  # a rotation: reflections are another component
    learner = torch.nn.Parameter(torch.eye(8))
    optimizer = CayleySGD([learner], lr=1.5)
    for _ in range(200):
        optimizer.zero_grad()
        (x @ learner - x @ turn).square().mean().backward()
        optimizer.step()
    assert (learner - turn).abs().max() < 1e-3 and is_orthogonal(learner.detach(), 1e-5)


@pytest.mark.parametrize("format", ["w4a4", "w4a4-aasym"])
def test_the_gradient_follows_the_range_that_a_quantizer_takes(format):
    """Of c x a quantizer makes c times what it makes of x: so the gradient along x is known."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    weights = torch.randn(4, 16, generator=generator)
    activation = QuantFormat.parse(format).activation
    y = _quantized(x, activation, 0.9)
    assert torch.equal(y, fake_quantize(x, activation, 0.9)) and not torch.equal(y, x)
    (y * weights).sum().backward()
    torch.testing.assert_close((x.grad * x).sum(1), (y * weights).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share, sharing", [(0.9, [1, 2, 5]), (1.0, [2]), (3.0, [2])])
def test_what_a_clip_cuts_off_shares_the_gradient_of_the_range(share, sharing):
    """Else the largest had all of it, be the next as near as it may."""
    x = torch.tensor([[-1.0, 0.99, 1.0, 0.5, -0.2, 0.97, 0.0, 0.1]], requires_grad=True)
    largest = _Largest.apply(x, torch.tensor([share]))
    largest.backward(torch.tensor([2.0]))
    assert largest.item() == 1.0 and x.grad[0].nonzero().flatten().tolist() == sharing
    assert (x.grad[0, sharing] == x.grad[0, 2]).all()
    assert (x.grad * x).sum().item() == pytest.approx(2.0)


@pytest.mark.parametrize("row", [[-2.0, -1.0, -1.5], [0.0, 0.0, 0.0]])
def test_the_gradient_of_a_range_that_ends_at_zero_is_finite(row):
    x = torch.tensor([row], requires_grad=True)
    _Largest.apply(x, torch.tensor([0.9])).backward(torch.ones(1))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("clip", ["none", "weight", None])
def test_weights_in_the_loop_are_those_that_will_be_rounded(clip):
    """A twin that has not learned anything yet has the logits of the model rounded to nearest: with
    no clip named too, where there is nothing else to learn from."""
    still = replace(SHORT, steps=1, lr=1e-9, weights=clip, autocast=False)
    rounding = RTN(clip or "weight")
    recipe = replace(recipe_named("spinquant-rtn"), rounding=rounding, training=still)
    model, format = tiny_llama(), QuantFormat(QuantFormat.parse("w4a16").weight)
    fitted = fit(recipe.transforms, adapter_for(model.config), 0)
    twin, _ = _trainable(model, fitted, list(fitted.learned.values()), still, format, (1.0, 1.0))
    got, tokens = twin(tiny_tokens()).logits, tiny_tokens(4, 24)
    expected = lowbit.quantize(model, recipe, format, tokens, progress=False)(tiny_tokens()).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("format", ["w3a16g32", "w3a16g32-wasym", "w4a4kv4g32"])
def test_ranges_of_groups_are_searched_where_products_are_in_bf16(format):
    """Their scales are fp16, which autocast to bf16 does not let be put together on a CPU."""
    recipe = replace(recipe_named("spinquant-rtn"), training=replace(SHORT, weights="weight"))
    assert recipe.training.autocast
    tokens = tiny_tokens(4, 24)
    model = lowbit.quantize(tiny_llama(), recipe, QuantFormat.parse(format), tokens, progress=False)
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("local, hidden", [(None, Rotate), (16, LearnRotation)])
@pytest.mark.parametrize("bias", [False, True])
def test_learned_rotations_leave_fp64_logits_unchanged(local, hidden, bias):
    transforms = (
        FoldNorms(),
        LearnRotation("residual", local=local),
        LearnRotation("value", per_block=True),
        hidden("mlp_hidden"),
    )
    model = tiny_llama(bias=bias, tied=bias)
    fitted, report = learned(model, transforms)
    matrices = [
        matrix
        for r in fitted.rotations
        if isinstance(r, LearnedRotation)
        for i in range(len(r.rotations))
        for matrix in r.at(i).learned
    ]
    assert len(matrices) == 1 + 2 + (hidden is LearnRotation)
    assert all(is_orthogonal(m, 1e-12) for m in matrices)
    assert not torch.equal(matrices[1], matrices[2])
    model = tiny_llama(bias=bias, tied=bias, dtype=torch.float64)
    before = model(tiny_tokens()).logits
    fitted.apply(model)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_the_model_that_learns_is_the_model(monkeypatch):
    """Without quantizers its logits are those of the original."""
    model = tiny_llama(bias=True)
    fitted = fit(SPINQUANT, adapter_for(model.config), 0)
    rotations = [r for r in fitted.rotations if isinstance(r, LearnedRotation)]
    training = replace(SHORT, weights="weight")  # of which there are none
    twin, _ = _trainable(model, fitted, rotations, training, QuantFormat(None), (1.0, 1.0))
    got, expected = twin(tiny_tokens()).logits, model(tiny_tokens()).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_learning_lowers_the_loss_and_spares_the_model():
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    _, report = learned(model, SPINQUANT, replace(SHORT, steps=80, batch=4))  # one batch, again
    assert report["last_loss"] < report["first_loss"] - 0.05 and len(report["losses"]) == 80
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_learning_goes_on_after_a_kill_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.training.SAVE_EVERY", 2)
    long, folder = replace(SHORT, steps=25), tmp_path / "new" / "learning"
    _, whole = learned(tiny_llama(), SPINQUANT, long)
    steps = []

    def killed_at_seven(optimizer, *_args):
        steps.append(optimizer.steps)
        if len(steps) == 7:
            raise KeyboardInterrupt

    def on_the_way():
        return learned(tiny_llama(), SPINQUANT, long, folder=folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step = CayleySGD.step
        patch.setattr(CayleySGD, "step", lambda *args: (killed_at_seven(*args), step(*args)))
        on_the_way()
    fitted, report = on_the_way()
    assert report["losses"] == whole["losses"]
    again, report = on_the_way()  # nothing is left to learn
    assert report["losses"] == whole["losses"]
    expected, _ = learned(tiny_llama(), SPINQUANT, long)
    for result in (fitted, again):
        assert torch.equal(
            result.rotations[0].at(0).learned[0], expected.rotations[0].at(0).learned[0]
        )


def test_where_nothing_is_quantized_nothing_is_learned():
    recipe = replace(recipe_named("spinquant"), training=replace(SHORT, steps=10**6))
    model = lowbit.quantize(tiny_llama(), recipe, "w16a16", tiny_tokens(4, 24), progress=False)
    assert model.lowbit_config.report["training"] == {}


def test_same_seed_same_rotations():
    fitted = [learned(tiny_llama(), SPINQUANT, seed=seed)[0] for seed in (0, 0, 1)]
    first, second, other = (f.rotations[0].at(0).learned[0] for f in fitted)
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "name, intermediate, line",
    [
        ("spinquant-rtn", 96, "value: learned rotation of order 16, one a block"),
        ("duarot-rtn", 96, "mlp_hidden: learned rotation of order 96"),
        ("duarot-rtn", 1536, "mlp_hidden: learned rotation of order (12 (x) 128)"),
    ],
)
def test_packed_saved_and_simulated_with_what_was_learned(name, intermediate, line, tmp_path):
    recipe = overridden(
        recipe_named(name), ["training.steps=3", "training.batch=1", "training.length=24"]
    )
    model = lowbit.quantize(
        tiny_llama(64, intermediate),
        recipe,
        "w4a4kv4",
        calibration=tiny_tokens(8, 24),
        progress=False,
    )
    report = model.lowbit_config.report
    assert len(report["training"]["losses"]) == 3 and line in report["transforms"]
    learned_online = [name for name in model.state_dict() if ".rotation.matrix_" in name]
    assert len(learned_online) == {"spinquant-rtn": 0}.get(name, 2 * (2 + (intermediate > 512)))
    lowbit.save(model, tmp_path / "saved")
    loaded, expected = lowbit.load(tmp_path / "saved"), model(tiny_tokens()).logits
    assert torch.equal(loaded(tiny_tokens()).logits, expected)
    assert torch.equal(to_fake(loaded)(tiny_tokens()).logits, expected)


def test_learned_matrices_stay_fp32_and_are_checked():
    rotation = OnlineMap(OnlineTransform("learned", 12, left=3))
    assert rotation.transform.stages == ((3, 4), (4, 1))
    matrices = [nearest_orthogonal(torch.randn(n, n)) for n in (3, 4)]
    rotation.assign(matrices)
    x = torch.randn(5, 24)
    expected = x @ torch.block_diag(*[torch.kron(*matrices)] * 2)
    torch.testing.assert_close(rotation(x), expected, rtol=0, atol=1e-5)
    learner = Learner(rotation.transform, [m[None] for m in matrices], None)
    torch.testing.assert_close(learner.turn(x, 0), expected, rtol=0, atol=1e-5)
    assert {m.dtype for m in rotation.bfloat16().state_dict().values()} == {torch.float32}
    with pytest.raises(InputError, match=r"must be \[\(3, 3\), \(4, 4\)\], got \[\(4, 4\)"):
        rotation.assign(matrices[::-1])
    with pytest.raises(InputError, match="left must be a divisor of a learned order"):
        OnlineTransform("hadamard", 12, left=3)


@pytest.mark.parametrize(
    "transform, message",
    [
        (LearnRotation("heads"), "a rotation of heads cannot be learned: take Rotate"),
        (LearnRotation("attention_input"), "a rotation of attention_input cannot be learned"),
        (LearnRotation("residual", per_block=True), "residual joins all blocks"),
        (LearnRotation("mlp_hidden", local=8), "local is for rotations that are fused"),
    ],
)
def test_what_cannot_be_learned(transform, message):
    with pytest.raises(InputError, match=message):
        fit((FoldNorms(), transform), adapter_for(tiny_llama().config), 0)


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="loss must be finite, got nan at step 0"):
        learned(model, SPINQUANT)


def test_whip_flattens_what_outliers_stand_out_of():
    """Rows along one direction, which a Hadamard matrix leaves as uneven as it finds it: after the
    fit 4-bit quantization loses less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1, generator=generator) * torch.randn(32, generator=generator) * 4
    x = x + torch.randn(512, 32, generator=generator) * 0.5
    start = fit((LearnRotation("value"),), adapter_for(tiny_llama(128).config), 0)
    start = start.rotations[0].at(0).learned[0].float()
    matrix, first, last = whip(x, start, Distribution(steps=100))
    assert last < first - 0.01 and is_orthogonal(matrix, 1e-5)
    errors = []
    for m in (start, matrix):
        y = x @ m
        lost = fake_quantize(y, W4A4KV4.activation) - y
        errors.append((lost.square().sum() / y.square().sum()).item())
    assert errors[1] < 0.9 * errors[0]


def test_a_fitted_distribution_keeps_the_function():
    model = tiny_llama(bias=True)
    fitted = fit(recipe_named("dartquant").transforms, adapter_for(model.config), 0)
    spec = Distribution(steps=20, rows=64)
    fitted, report = fit_rotations(model, fitted, spec, tiny_tokens(4, 24), 0, False)
    assert report["residual"]["last_loss"] < report["residual"]["first_loss"]
    assert report["value"]["last_loss"] < report["value"]["first_loss"]
    model = tiny_llama(bias=True, dtype=torch.float64)
    before = model(tiny_tokens()).logits
    fitted.apply(model)
    after = model(tiny_tokens()).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_activations_are_those_of_the_space():
    """Rows of the residual stream have the norm's root mean square of 1: no gain is in them."""
    model = tiny_llama()
    fitted = fit(SPINQUANT, adapter_for(model.config), 0)
    wanted = [r for r in fitted.rotations if isinstance(r, LearnedRotation)]
    found = _activations(model, fitted, wanted, 32, tiny_tokens(4, 24), 0)
    assert [x.shape for x in found["residual"]] == [(32, 64)] * 2
    assert [x.shape for x in found["value"]] == [(32, 16)] * 2
    power = found["residual"][1].square().mean(1)
    torch.testing.assert_close(power, torch.ones(32), rtol=1e-3, atol=0)


def test_a_block_more_costs_its_copy_and_no_more():
    """And what enters it: neither its rotated and rounded weights nor what they made are kept."""

    def peak(blocks: int) -> int:
        model = tiny_llama(num_layers=blocks)
        with LiveBytes() as live:
            learned(model, SPINQUANT[:3], replace(SHORT, steps=1, weights="none"))
        return live.peak

    block = tiny_llama().model.layers[0]
    weights = sum(p.numel() * p.element_size() for p in block.parameters())
    assert (peak(6) - peak(2)) / 4 < 2.5 * weights
