"""Muon (https://kellerjordan.github.io/posts/muon) in float32. Matrices of one shape are orthogonalised as one batch.

torch.optim.Muon iterates in bfloat16, one matrix at a time. On a CPU without bfloat16 units this took a fifth of each
step (60 matrices of 128x128, one thread: 233 ms). The update is the same, scaled to the size of AdamW's updates
(0.2 * sqrt(longer side)).
"""

from collections import defaultdict

import torch

# Of the quintic iteration in the post above. They bring singular values near 1 in few steps, but not exactly to 1.
_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalize(matrices, steps=5):
    """Nearly orthogonal matrices with the singular vectors of `matrices` [n, rows, columns], by Newton-Schulz steps."""
    # The transposition makes the Gram matrices as small as possible. Singular values must be at most 1 at the start,
    # and the Frobenius norm bounds them.
    x = matrices
    flip = x.shape[-2] > x.shape[-1]
    if flip:
        x = x.transpose(-1, -2)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if flip else x


class Muon(torch.optim.Optimizer):
    """Optimizer with orthogonalised momentum and decoupled weight decay, for 2-D parameters only."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                # Nesterov momentum: the update mixes the gradient in once more.
                buffer.lerp_(p.grad, 1 - group["momentum"])
                by_shape[p.shape].append((p, torch.lerp(p.grad, buffer, group["momentum"])))
            for shape, entries in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in entries]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for (p, _), update in zip(entries, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
        return loss
