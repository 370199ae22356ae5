"""Run: python -m pytest tests/test_arcface.py

The margin heads, against a loop over single samples in float64 that knows nothing of tensors: plain
Python floats, the formula of the paper, and its gradient written with the Jacobian of normalising.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from arcface import ArcMarginHead, cosface_head, focal_loss, validate_labels

E = 16  # embedding size
C = 5  # identities
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MARGINS = {
    "arcface": {"m": 0.5},
    "easy": {"m": 0.5, "easy_margin": True},
    "cosface": {"m": 0.0, "m3": 0.35},
    "combined": {"m1": 1.0, "m": 0.3, "m3": 0.2},
    "combined m1<1": {"m1": 0.9, "m": 0.4, "m3": 0.15},
    "combined m1>1": {"m1": 1.35, "m": 0.3, "m3": 0.1},
    "combined easy": {"m1": 1.35, "m": 0.3, "m3": 0.1, "easy_margin": True},
}


# ---------------------------------------------------------------- the reference: one sample, floats


def _dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def _unit(a):
    length = math.sqrt(_dot(a, a))
    return [p / length for p in a], length


def _reference_phi(theta, m=0.5, m1=1.0, m3=0.0, easy_margin=False):
    """phi and d phi / d theta."""
    if easy_margin and theta >= math.pi / 2:
        return math.cos(theta) - m3, -math.sin(theta)
    if theta > (math.pi - m) / m1:
        rest = math.pi - (math.pi - m) / m1  # of the half circle, after the switch
        return math.cos(theta) - rest * math.sin(rest) - m3, -math.sin(theta)
    return math.cos(m1 * theta + m) - m3, -m1 * math.sin(m1 * theta + m)


def _angle(u, v):
    difference = [p - q for p, q in zip(u, v, strict=True)]
    total = [p + q for p, q in zip(u, v, strict=True)]
    return 2 * math.atan2(math.sqrt(_dot(difference, difference)), math.sqrt(_dot(total, total)))


def _reference(x, centres, label, s, upstream, margins):
    """Logits of one sample; gradients of sum(upstream * logits) for the sample and the centres."""
    u, x_length = _unit(x)
    logits, grad_x, grad_centres = [], [0.0] * len(x), []
    for k, centre in enumerate(centres):
        v, length = _unit(centre)
        theta = _angle(u, v)
        cos, sin = math.cos(theta), math.sin(theta)
        phi, slope = _reference_phi(theta, **margins) if k == label else (cos, -sin)
        logits.append(s * phi)
        # d theta / d x = -(v - cos u) / (sin |x|), and the same with the two exchanged.
        factor = -upstream[k] * s * slope / sin
        for i in range(len(x)):
            grad_x[i] += factor * (v[i] - cos * u[i]) / x_length
        grad_centres.append([factor * (u[i] - cos * v[i]) / length for i in range(len(x))])
    return logits, grad_x, grad_centres


def test_reference_gradient_by_finite_differences():
    torch.manual_seed(0)
    x, centres = torch.randn(E).double(), torch.randn(C, E).double()
    upstream = torch.randn(C).tolist()

    def total(x, centres):
        logits = _reference(x.tolist(), centres.tolist(), 2, 8.0, upstream, MARGINS["arcface"])[0]
        return _dot(logits, upstream)

    _, grad_x, grad_centres = _reference(
        x.tolist(), centres.tolist(), 2, 8.0, upstream, MARGINS["arcface"]
    )
    step = 1e-6 * torch.eye(E).double()
    for i in range(E):
        slope = (total(x + step[i], centres) - total(x - step[i], centres)) / 2e-6
        assert slope == pytest.approx(grad_x[i], abs=1e-6)
        moved = torch.zeros(C, E).double()
        moved[2] = step[i]
        slope = (total(x, centres + moved) - total(x, centres - moved)) / 2e-6
        assert slope == pytest.approx(grad_centres[2][i], abs=1e-6)


# ---------------------------------------------------------------- values and gradients, all angles


def _degrees(margin):
    # The easy margin steps at exactly 90 degrees, where rounding decides the side.
    return [d for d in range(1, 180) if d != 90 or "easy" not in margin]


def _samples_at(degrees, head, dtype=torch.float32, seed=0):
    """One embedding at each angle from the centre of its label, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(degrees)) % C
    weight = torch.randn(C, E, generator=generator).double()
    head.weight.data.copy_(weight)
    v = F.normalize(head.weight.detach().double()[labels])  # (N, E)
    side = torch.randn(len(degrees), E, generator=generator).double()
    side = F.normalize(side - (side * v).sum(1, keepdim=True) * v)
    theta = torch.tensor(degrees, dtype=torch.float64).deg2rad()[:, None]
    x = (v * theta.cos() + side * theta.sin()) * (5 + torch.rand(len(degrees), 1).double())
    return x.to(dtype), labels


def _run(head, x, labels, upstream):
    """Logits and both gradients of sum(upstream * logits)."""
    x = x.detach().requires_grad_()
    head.zero_grad()
    logits = head(x, labels)
    (logits * upstream).sum().backward()
    return logits.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", MARGINS)
def test_row29_values_and_gradients_at_1_to_179_degrees(margin, dtype):
    head = ArcMarginHead(E, C, s=64.0, **MARGINS[margin])
    degrees = _degrees(margin)
    x, labels = _samples_at(degrees, head, dtype)
    upstream = torch.randn(len(degrees), C, generator=torch.Generator().manual_seed(1))
    logits, grad_x, grad_weight = _run(head, x, labels, upstream)
    assert logits.dtype == torch.float32 and grad_x.dtype == dtype

    centres = head.weight.detach().double().tolist()
    expected_weight = torch.zeros(C, E).double()
    for n in range(len(degrees)):
        expected, expected_x, parts = _reference(
            x[n].double().tolist(), centres, labels[n].item(), 64.0, upstream[n].tolist(),
            MARGINS[margin],
        )  # fmt: skip
        torch.testing.assert_close(logits[n].double(), torch.tensor(expected).double(), rtol=0,
                                   atol=3e-5)  # fmt: skip
        expected_x = torch.tensor(expected_x).double()
        # The gradient itself is exact in float32; it is then handed back in the input's type.
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        error = (grad_x[n].double() - expected_x).norm() / expected_x.norm()
        assert error < 5e-6 + rounding, (degrees[n], error)
        expected_weight += torch.tensor(parts).double()
    error = (grad_weight.double() - expected_weight).norm() / expected_weight.norm()
    assert error < 2e-6


@pytest.mark.parametrize("margin", MARGINS)
def test_own_gradient_alone_at_1_to_179_degrees(margin):
    # Without the other classes in the sum, an error in the margin's slope has nowhere to hide.
    head = ArcMarginHead(E, C, s=64.0, **MARGINS[margin])
    degrees = _degrees(margin)
    x, labels = _samples_at(degrees, head)
    upstream = F.one_hot(labels, C).float()
    _, grad_x, _ = _run(head, x, labels, upstream)
    centres = head.weight.detach().double().tolist()
    for n in range(len(degrees)):
        _, expected, _ = _reference(
            x[n].double().tolist(), centres, labels[n].item(), 64.0, upstream[n].tolist(),
            MARGINS[margin],
        )  # fmt: skip
        expected = torch.tensor(expected).double()
        assert (grad_x[n].double() - expected).norm() / expected.norm() < 2e-5, degrees[n]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", MARGINS)
def test_row29_finite_and_bounded_on_the_centre_and_opposite(margin, dtype):
    head = ArcMarginHead(E, C, s=64.0, **MARGINS[margin])
    generator = torch.Generator().manual_seed(2)
    head.weight.data.copy_(torch.randn(C, E, generator=generator).to(dtype))
    labels = torch.arange(C).repeat(4)
    # Exactly on the centre, exactly opposite, at another length, and one rounding step beside.
    scale = torch.tensor([1.0, -1.0, 4.0, -1.0]).repeat_interleave(C)[:, None]
    x = (head.weight.detach()[labels] * scale).to(dtype)
    x[-C:, 0] *= 1 + torch.finfo(dtype).eps
    logits, grad_x, grad_weight = _run(head, x, labels, F.one_hot(labels, C))
    assert logits.isfinite().all() and grad_x.isfinite().all() and grad_weight.isfinite().all()
    bound = 64 * head.m1 / x.float().norm(dim=1)  # |d phi / d theta| <= m1
    assert (grad_x.float().norm(dim=1) <= bound * 1.01).all()
    own = logits.gather(1, labels[:, None])[:, 0] / 64
    for angle, rows in ((0.0, slice(0, C)), (math.pi, slice(C, 2 * C))):
        expected, _ = _reference_phi(angle, **MARGINS[margin])
        torch.testing.assert_close(own[rows], torch.full((C,), expected), rtol=0, atol=1e-5)


def test_gradcheck_in_double():
    torch.manual_seed(0)
    for margins in MARGINS.values():
        head = ArcMarginHead(6, 4, s=8.0, **margins).double()
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(4, (7,))

        def logits(x, weight, head=head, labels=labels):
            return torch.func.functional_call(head, {"weight": weight}, (x, labels))

        assert torch.autograd.gradcheck(logits, (x, weight))


def test_gradients_of_one_input_only():
    head = ArcMarginHead(E, C)
    x, labels = _samples_at([20, 70, 130], head)
    _, grad_x, grad_weight = _run(head, x, labels, torch.ones(3, C))
    head.weight.requires_grad_(False)
    x = x.requires_grad_()
    head(x, labels).sum().backward()
    torch.testing.assert_close(x.grad, grad_x, rtol=0, atol=0)
    head.weight.requires_grad_(True)
    head.weight.grad = None
    head(x.detach(), labels).sum().backward()
    torch.testing.assert_close(head.weight.grad, grad_weight, rtol=0, atol=0)


# ---------------------------------------------------------------- the shape of phi


def _phi(degrees, **margins):
    """The head's phi at angles in degrees, float64, through the whole head with s = 1."""
    head = ArcMarginHead(E, C, s=1.0, **margins).double()
    x, labels = _samples_at(degrees, head, torch.float64)
    with torch.no_grad():
        return head(x, labels).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("m1", [0.5, 0.9, 1.0, 1.35, 2.0, 4.0])
@pytest.mark.parametrize("m2", [0.0, 0.3, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("m3", [0.0, 0.35])
def test_phi_never_rises_with_the_angle(m1, m2, m3):
    phi = _phi([k / 2 for k in range(361)], m1=m1, m=m2, m3=m3)
    assert (phi.diff() <= 1e-12).all()
    cos = torch.arange(0, 180.5, 0.5).double().deg2rad().cos()
    if m1 >= 1:
        assert (phi <= cos - m3 + 1e-12).all()  # a margin is never a gift


@pytest.mark.parametrize("margin", ["arcface", "combined", "combined m1<1", "combined m1>1"])
def test_the_branch_switches_where_the_turned_angle_reaches_180_degrees(margin):
    margins = MARGINS[margin]
    m1, m2, m3 = margins.get("m1", 1.0), margins["m"], margins.get("m3", 0.0)
    switch = math.degrees((math.pi - m2) / m1)
    before, after = switch - 0.01, switch + 0.01
    phi = _phi([before, after], **margins).tolist()
    assert phi[0] == pytest.approx(-1 - m3, abs=1e-6)
    rest = math.radians(180 - switch)
    expected = math.cos(math.radians(after)) - rest * math.sin(rest) - m3
    assert phi[1] == pytest.approx(expected, abs=1e-9)
    assert phi[1] < phi[0]


def test_plain_arcface_past_the_switch_is_the_official_one():
    phi = _phi([160, 179], m=0.5)
    official = [math.cos(math.radians(d)) - math.sin(math.pi - 0.5) * 0.5 for d in (160, 179)]
    assert phi.tolist() == pytest.approx(official, abs=1e-9)


def test_easy_margin_acts_below_90_degrees_only():
    low, high = _phi([89.9, 90.1], m=0.5, easy_margin=True).tolist()
    assert low == pytest.approx(math.cos(math.radians(89.9) + 0.5), abs=1e-9)
    assert high == pytest.approx(math.cos(math.radians(90.1)), abs=1e-9)


def test_each_of_the_three_margins_is_honoured():
    angle = math.radians(50)
    for m1, m2, m3 in ((1.3, 0, 0), (1, 0.4, 0), (1, 0, 0.2), (1.3, 0.4, 0.2)):
        (phi,) = _phi([50], m1=m1, m=m2, m3=m3).tolist()
        assert phi == pytest.approx(math.cos(m1 * angle + m2) - m3, abs=1e-9)


def test_cosface_is_the_cosine_less_the_margin():
    head = cosface_head(E, C, s=30.0, m=0.35)
    x, labels = _samples_at(list(range(0, 181, 5)), head)
    expected = 30 * (head.cosines(x) - 0.35 * F.one_hot(labels, C))
    torch.testing.assert_close(head(x, labels), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"s": 0.0}, {"m1": 0.0}, {"m1": -1.0}, {"m": -0.1}, {"m": 3.2}, {"m": math.nan}]
)
def test_impossible_margins_are_refused(options):
    with pytest.raises(ValueError, match="need s > 0"):
        ArcMarginHead(E, C, **options)


# ---------------------------------------------------------------- precision and bad input


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    head = ArcMarginHead(E, C)
    x, labels = _samples_at(list(range(0, 181, 3)), head, dtype)
    plain = head(x.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        x_in = x.clone().requires_grad_()
        logits = head(x_in, labels)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, plain, rtol=0, atol=0)
        torch.testing.assert_close(head.cosines(x), head.cosines(x.float()), rtol=0, atol=0)
        logits.sum().backward()  # not where it belongs, and still in float32
    inside, inside_weight = x_in.grad, head.weight.grad.clone()
    _, grad_x, grad_weight = _run(head, x, labels, torch.ones_like(plain))
    torch.testing.assert_close(inside, grad_x, rtol=0, atol=0)
    torch.testing.assert_close(inside_weight, grad_weight, rtol=0, atol=0)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9])
def test_row28_zero_embedding_or_centre_is_finite_and_pulls_nothing(margin, length):
    head = ArcMarginHead(E, C, **MARGINS[margin])
    x, labels = _samples_at([10, 60, 120], head)
    x[1] *= length / x[1].norm()
    head.weight.data[labels[2]] = 0
    logits, grad_x, grad_weight = _run(head, x, labels, torch.randn(3, C))
    assert logits.isfinite().all() and grad_x.isfinite().all() and grad_weight.isfinite().all()
    others = torch.arange(C) != labels[1]
    assert (logits[1, others] == 0).all() and (grad_x[1] == 0).all()
    assert (grad_weight[labels[2]] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_embedding_stays_visible(bad):
    head = ArcMarginHead(E, C)
    x, labels = _samples_at([10, 60, 120], head)
    x[1, 3] = bad
    logits = head(x, labels)
    assert logits[1].isnan().all() and logits[[0, 2]].isfinite().all()


def test_lengths_do_not_matter():
    head = ArcMarginHead(E, C)
    x, labels = _samples_at([5, 45, 90, 135, 175], head)
    before = head(x, labels)
    scale = torch.tensor([1e-3, 0.1, 1, 10, 1e6])[:, None]
    head.weight.data *= scale
    torch.testing.assert_close(head(x * scale, labels), before, rtol=0, atol=3e-5)


def test_row30_labels_out_of_range_are_named():
    validate_labels(torch.tensor([0, 4, 2]), C)
    for bad in (-1, C):
        with pytest.raises(ValueError, match=rf"label {bad} at index 1 is outside 0\.\.4"):
            validate_labels(torch.tensor([0, bad, -7]), C)


# ---------------------------------------------------------------- angles, cosines, training


def test_angles_to_the_own_and_to_the_nearest_other_centre():
    head = ArcMarginHead(E, C)
    degrees = list(range(181))
    x, labels = _samples_at(degrees, head)
    logits, own, other = head(x, labels, return_angles=True)
    torch.testing.assert_close(logits, head(x, labels), rtol=0, atol=0)
    torch.testing.assert_close(own, torch.tensor(degrees).float(), rtol=0, atol=1e-4)
    assert not own.requires_grad and not other.requires_grad and logits.requires_grad
    centres = [_unit(centre)[0] for centre in head.weight.detach().double().tolist()]
    for n in range(len(degrees)):
        u = _unit(x[n].double().tolist())[0]
        nearest = min(_angle(u, v) for k, v in enumerate(centres) if k != labels[n])
        assert other[n].item() == pytest.approx(math.degrees(nearest), abs=1e-3)
    right = head.cosines(x).argmax(dim=1) == labels
    assert torch.equal(own < other, right)
    F.cross_entropy(logits, labels).backward()


def test_cosines_are_plain():
    head = ArcMarginHead(E, C)
    x = torch.randn(4, E)
    expected = F.cosine_similarity(x[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head.cosines(x), expected)


def test_centres_start_small_and_are_all_that_is_saved():
    torch.manual_seed(0)
    head = ArcMarginHead(128, 300)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert list(head.state_dict()) == ["weight"] and head.weight.shape == (300, 128)


def test_training_separates_the_identities():
    torch.manual_seed(0)
    head = ArcMarginHead(E, C, s=16.0)
    x = torch.randn(40, E, requires_grad=True)
    labels = torch.arange(40) % C
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=0.5, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(head(x, labels), labels).backward()
        optimizer.step()
    _, own, other = head(x, labels, return_angles=True)
    assert own.max() + 10 < other.min() and own.mean() < 45


def test_no_second_matrix_of_logits_is_kept():
    # What autograd keeps of the head: nothing of (N, C) but the logits, nothing new of (C, E).
    head = ArcMarginHead(E, 1000)
    x, labels = torch.randn(50, E, requires_grad=True), torch.arange(50)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = head(x, labels)
    new = [t for t in kept if t.data_ptr() != head.weight.data_ptr()]
    assert sum(t.shape == logits.shape for t in new) == 1
    assert not [t for t in new if t.numel() >= head.weight.numel() and t.shape != logits.shape]


# ---------------------------------------------------------------- focal loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_sample_by_sample(gamma):
    torch.manual_seed(0)
    logits = (torch.randn(20, C).double() * 3).requires_grad_()
    labels = torch.arange(20) % C
    loss = focal_loss(logits, labels, gamma)
    assert loss.shape == (20,)
    single = focal_loss(logits.float(), labels, gamma).double()
    torch.testing.assert_close(single, loss, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    for n, row in enumerate(logits.detach().double().tolist()):
        total = math.fsum(math.exp(z) for z in row)
        p = [math.exp(z) / total for z in row]
        own = p[labels[n]]
        assert loss[n].item() == pytest.approx((1 - own) ** gamma * -math.log(own), rel=1e-9)
        # d loss / d own, times the softmax's d own / d z_k = own (1[k = label] - p_k)
        by_own = -((1 - own) ** gamma) / own
        if gamma:
            by_own += gamma * (1 - own) ** (gamma - 1) * math.log(own)
        expected = [by_own * own * ((k == labels[n].item()) - p[k]) for k in range(C)]
        assert logits.grad[n].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_focal_loss_with_gamma_0_is_cross_entropy():
    logits, labels = torch.randn(20, C), torch.arange(20) % C
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(focal_loss(logits, labels, 0), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_is_finite_where_p_is_0_or_1(gamma):
    logits = torch.tensor([[200.0, 0, 0], [-200.0, 0, 0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0]), gamma)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, 200 + math.log(2)])
    assert logits.grad.isfinite().all()
