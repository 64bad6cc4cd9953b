"""The orthogonal factor of matrices, by Polar Express (Amsel et al., 2025): what Muon's updates are made of.

As optim/polar_express.py: all steps on the small side.
"""

import torch
from torch import Tensor

# Polar Express' five (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X. A test holds them to be the MLX wing's.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest matrix with all singular values one (U V^T of g = U S V^T), to about 15 %, of each of a stack.

    `g` [n, rows, cols] float32 -> the same shape. With A = X X^T [n, s, s] of the small side and M = a + b A + c A^2,
    A becomes M A M at each step, and the product of all M is applied to X once.
    """
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    gram = x @ x.mT
    whole: Tensor | None = None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # M = a + inner
        if whole is None:
            whole = inner + a * torch.eye(gram.shape[-1], device=g.device)
        else:
            whole = torch.baddbmm(whole, whole, inner, beta=a)
        if i + 1 < len(POLAR_EXPRESS):
            half = torch.baddbmm(gram, gram, inner, beta=a)  # A M
            gram = torch.baddbmm(half, half, inner, beta=a)  # M A M: all of these commute
    assert whole is not None
    x = torch.bmm(whole, x)
    return x.mT if tall else x
