"""The margin heads: embeddings and labels in, logits for a softmax cross-entropy out.

    head = ArcMarginHead(512, num_identities, s=64, m=0.5)
    loss = F.cross_entropy(head(embeddings, labels), labels)

One formula holds all three margins (ArcFace paper, Deng et al. 2019, equation 4), with theta the
angle between an embedding and the centre of its own identity:

    phi(theta) = cos(m1 * theta + m2) - m3        logits = s * (phi for the own class, else cos)

ArcFace is m1 = 1, m3 = 0; CosFace is m1 = 1, m2 = 0 (`cosface_head`). Everything is computed in
float32, whatever the autocast (float64 inputs stay float64).

The gradient is the true one of this formula. It is written out by hand for two reasons. Near 0 and
180 degrees `acos` loses the angle and its derivative is infinite; here the angle comes from the
lengths of two chords, exact to rounding. And the normalised centres, the one-hot matrix and a
second logits matrix are never made: beside the logits (N, C) and the gradients of its inputs, a
step needs one temporary of (N, C).

Legend: N batch, C identities, E embedding size; u = embedding / length, v = own centre / length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SHORT = 1e-6  # a vector shorter than this has no direction


class ArcMarginHead(nn.Module):
    """Scaled cosines to every identity's centre, with an angular margin on the own one.

    Args:
        embedding_size: E.
        num_identities: C.
        s: scale of the logits.
        m: additive angular margin m2 in radians, in [0, pi). 0.5 is the published ArcFace.
        m1: factor on the angle, > 0 (the paper's combined setting: m1=1, m=0.3, m3=0.2).
        m3: additive cosine margin.
        easy_margin: from 90 degrees on, phi is cos(theta) - m3: no angular margin where the sample
            is no nearer to its centre than by chance. It steps up at 90 degrees, as published.

    Past theta = (pi - m2) / m1, where cos(m1 * theta + m2) would rise again, phi goes on as
    cos(theta) - c - m3. For m1 = 1, c = m2 * sin(m2), as the official trainer once had it; in
    general, with d = pi - (pi - m2) / m1, c = max(d * sin(d), 1 - cos(d)): so phi never rises with
    theta (the second term only counts from d = 2.33 on, where the first would make phi jump up).

    Raises:
        ValueError: a margin outside the ranges above.
    """

    def __init__(
        self,
        embedding_size: int,
        num_identities: int,
        s: float = 64.0,
        m: float = 0.5,
        m1: float = 1.0,
        m3: float = 0.0,
        easy_margin: bool = False,
    ):
        super().__init__()
        if not (s > 0 and m1 > 0 and 0 <= m < math.pi):
            raise ValueError(f"need s > 0, m1 > 0 and 0 <= m < pi, not {s=}, {m1=}, {m=}")
        self.s, self.m, self.m1, self.m3, self.easy_margin = s, m, m1, m3, easy_margin
        self.weight = nn.Parameter(torch.empty(num_identities, embedding_size))  # the centres
        nn.init.normal_(self.weight, std=0.01)

    def extra_repr(self) -> str:
        num_identities, embedding_size = self.weight.shape
        margins = f"s={self.s}, m={self.m}, m1={self.m1}, m3={self.m3}"
        return f"{embedding_size}, {num_identities}, {margins}, easy_margin={self.easy_margin}"

    def forward(
        self, embeddings: Tensor, labels: Tensor, return_angles: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits for F.cross_entropy.

        Args:
            embeddings: (N, E), any float type, not normalised.
            labels: int64 (N,) in 0..C-1; not checked here (see ``validate_labels``).
            return_angles: also return the plain angles, detached, in degrees (N,): to the own
                centre and to the nearest other one. A sample is right where own < other; this
                costs one more read of the cosines.

        Returns:
            float32 (N, C), or that and the two angles.
        """
        rows = torch.arange(len(labels), device=labels.device)
        logits, own, other = self.margin_logits(embeddings, rows, labels, None, return_angles)
        if not return_angles:
            return logits
        return logits, own.rad2deg(), other.clamp(-1, 1).acos().rad2deg()

    def margin_logits(
        self,
        embeddings: Tensor,
        rows: Tensor,
        labels: Tensor,
        sampled: Tensor | None,
        with_angles: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits where only some rows have their own centre here, as in a shard of the identities.

        Args:
            embeddings: (N, E).
            rows: int64 (K,), the rows whose own centre is among these.
            labels: int64 (K,), which one it is, for those rows.
            sampled: int64 (S,), the centres that take part, ascending; None is all of them.
                ``labels`` then count within ``sampled``, and the gradient of the weight is sparse.
            with_angles: also return the two that follow.

        Returns:
            logits float32 (N, C), or (N, S); the angle to the own centre in radians (K,); the
            largest cosine to another one (N,). The latter two are detached.
        """
        embeddings, weight = _at_least_float32(embeddings, self.weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            return _MarginLogits.apply(
                embeddings, weight, rows, labels, sampled, self._phi, self.s, with_angles
            )

    def cosines(self, embeddings: Tensor) -> Tensor:
        """Plain cosines to every centre, float32 (N, C): no margin, no scale."""
        embeddings, weight = _at_least_float32(embeddings, self.weight)
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(F.normalize(embeddings), F.normalize(weight))

    def _phi(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Angles in radians -> phi and its downward slope -d phi / d theta, of the same shape."""
        turned = self.m1 * theta + self.m
        phi, slope = torch.cos(turned) - self.m3, self.m1 * torch.sin(turned)
        plain, plain_slope = torch.cos(theta) - self.m3, torch.sin(theta)
        d = math.pi - (math.pi - self.m) / self.m1
        drop = max(d * math.sin(d), 1 - math.cos(d)) if d > 0 else 0.0
        past = theta > math.pi - d
        phi = torch.where(past, plain - drop, phi)
        slope = torch.where(past, plain_slope, slope)
        if self.easy_margin:
            easy = theta >= math.pi / 2
            phi = torch.where(easy, plain, phi)
            slope = torch.where(easy, plain_slope, slope)
        return phi, slope


def cosface_head(
    embedding_size: int, num_identities: int, s: float = 64.0, m: float = 0.35
) -> ArcMarginHead:
    """CosFace (Wang et al. 2018): cos(theta) - m on the own class."""
    return ArcMarginHead(embedding_size, num_identities, s=s, m=0.0, m3=m)


class _MarginLogits(torch.autograd.Function):
    """logits = s * cos(u, centre), phi(theta) in place of the own cosine; gradients by hand."""

    @staticmethod
    def forward(ctx, x, weight, rows, labels, sampled, phi, s, with_angles):
        ctx.shape = weight.shape
        weight = weight if sampled is None else weight[sampled]  # (C, E), or (S, E)
        x_inv, w_inv = _inverse_length(x), _inverse_length(weight)  # (N, 1), (C, 1)
        u = x * x_inv  # (N, E)
        v = weight[labels] * w_inv[labels]  # (K, E)
        logits = (u @ weight.T).mul_(w_inv.T)  # (N, C): cosines until scaled below

        # Kahan: theta = 2 atan2(|u - v|, |u + v|) has an error of rounding size at every angle.
        mine = u[rows]  # (K, E)
        near, far = (mine - v).norm(dim=1), (mine + v).norm(dim=1)  # (K,)
        theta = 2 * torch.atan2(near, far)
        target, slope = phi(theta)  # (K,)

        own = other = None
        if with_angles:
            own = theta
            logits[rows, labels] = -1.0  # out of the running
            other = logits.amax(dim=1)
        logits[rows, labels] = target
        logits.mul_(s)
        ctx.save_for_backward(weight, rows, labels, sampled, u, v, x_inv, w_inv, slope, logits)
        ctx.s = s
        ctx.mark_non_differentiable(*(t for t in (own, other) if t is not None))
        return logits, own, other

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _own, _other):
        weight, rows, labels, sampled, u, v, x_inv, w_inv, slope, logits = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            # phi falls by `slope` per radian, so its gradient is slope times the unit vector in
            # which u (or v) has to turn.
            pull = (grad[rows, labels] * ctx.s * slope)[:, None]  # (K, 1)
            mine = u[rows]  # (K, E)
            rest = grad * (ctx.s * w_inv.T)  # (N, C)
            rest[rows, labels] = 0.0
            grad_x = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_u = rest @ weight  # (N, E)
                grad_u -= (grad_u * u).sum(dim=1, keepdim=True) * u  # a length has no effect
                grad_u[rows] += pull * _towards(mine, v)
                grad_x = grad_u * x_inv  # (N, E)
            if ctx.needs_input_grad[1]:
                grad_weight = rest.T @ u  # (C, E)
                radial = rest.mul_(logits).sum(dim=0)[:, None] * w_inv / ctx.s  # (C, 1)
                grad_weight.addcmul_(weight, radial, value=-1)
                own = pull * _towards(v, mine) * w_inv[labels]  # (K, E)
                grad_weight.index_add_(0, labels, own)
                if sampled is not None:
                    grad_weight = torch.sparse_coo_tensor(
                        sampled[None],
                        grad_weight,
                        ctx.shape,
                        check_invariants=False,
                        is_coalesced=True,
                    )
        return grad_x, grad_weight, None, None, None, None, None, None


def _inverse_length(x: Tensor) -> Tensor:
    """1 / |row|, (N, 1); 0 for a row without direction, which thus gets cosine 0 and gradient 0.

    A NaN stays a NaN: a diverged network must not look healthy.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length < _SHORT, 0.0, 1 / length)


def _towards(u: Tensor, v: Tensor) -> Tensor:
    """Unit vectors along which u turns towards v, (N, E): (v - cos(theta) u) / sin(theta).

    Written with the shorter of the chords v - u and v + u, so that it is accurate at every angle.
    At 0 and 180 degrees, where there is no such direction, it is 0.
    """
    side = torch.where((u * v).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)  # (N, 1)
    chord = v - side * u  # (N, E)
    across = chord + side * (chord**2).sum(dim=1, keepdim=True) / 2 * u  # orthogonal to u
    return across / across.norm(dim=1, keepdim=True).clamp_min(_SHORT)


def _at_least_float32(embeddings: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common type, half types raised to float32."""
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    return embeddings.to(dtype), weight.to(dtype)


def validate_labels(labels: Tensor, num_identities: int) -> None:
    """Check a data set's labels once, before training: out of range, CUDA dies without a reason.

    Raises:
        ValueError: naming the first label outside 0..num_identities-1 and its index.
    """
    bad = ((labels < 0) | (labels >= num_identities)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"label {int(labels[first])} at index {first} is outside 0..{num_identities - 1}"
        )


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """(1 - p)^gamma * cross-entropy with p of each sample itself (Lin et al. 2017), float32 (N,).

    gamma = 0 is cross-entropy. Mean over the batch is the caller's, after the factor.
    """
    return focal(F.cross_entropy(logits, labels, reduction="none"), gamma)


def focal(entropy: Tensor, gamma: float) -> Tensor:
    """The same, of cross-entropies (N,) = -log p."""
    if gamma == 0:
        return entropy
    miss = -torch.expm1(-entropy)  # 1 - p without cancellation
    return miss.clamp_min(torch.finfo(miss.dtype).tiny) ** gamma * entropy
