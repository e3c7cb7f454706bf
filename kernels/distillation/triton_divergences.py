"""The divergences of divergences.py for Triton kernels: d and s of some buckets of a row.

Which divergence it is, KIND, is compiled in, by its number in `divergences.KINDS`; the teacher's share of the mixture is an
argument, so that another beta or alpha compiles nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation import divergences

FORWARD_KL = tl.constexpr(divergences.KINDS.index("forward"))
TEACHER = tl.constexpr(divergences.KINDS.index("teacher"))
STUDENT = tl.constexpr(divergences.KINDS.index("student"))
ABSOLUTE = tl.constexpr(divergences.KINDS.index("absolute"))
LEAST_LOGPROB = tl.constexpr(divergences.LEAST_LOGPROB)
LEAST_MASS = tl.constexpr(divergences.LEAST_MASS)


def flags_of(divergence: divergences.Divergence) -> dict[str, float | int]:
    """Give what a kernel is called with: KIND and the teacher's share of the mixture."""
    return {"KIND": divergences.KINDS.index(divergence.kind), "mixture": divergence.mixture}


@triton.jit
def summand_and_slope(logp, logq, there, mixture, KIND: tl.constexpr):
    """d and s of every bucket, 0 where it is not there; of all kinds but FORWARD_KL."""
    logp, logq = tl.maximum(logp, LEAST_LOGPROB), tl.where(there, logq, 0.0)
    p, q = tl.exp(logp), tl.exp(logq)
    if KIND == ABSOLUTE:
        d = tl.abs(p - q) / 2
        s = tl.where(q > p, q, tl.where(q < p, -q, 0.0)) / 2
    else:
        of_p, of_q = logp + tl.log(mixture), logq + tl.log(1.0 - mixture)  # -inf where m is p
        top = tl.maximum(of_p, of_q)
        logm = top + tl.log(tl.exp(of_p - top) + tl.exp(of_q - top))
        above_p, above_q = logp - logm, logq - logm
        if KIND == TEACHER:
            d = p * above_p
            s = -(1.0 - mixture) * p * tl.exp(above_q)
        elif KIND == STUDENT:
            d = q * above_q
            s = q * (above_q - (1.0 - mixture) * tl.exp(above_q))
        else:
            d = mixture * p * above_p + (1.0 - mixture) * q * above_q
            s = (1.0 - mixture) * q * above_q
    return tl.where(there, d, 0.0), tl.where(there, s, 0.0)
