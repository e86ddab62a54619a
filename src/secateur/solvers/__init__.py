"""The solvers: one file a method, pure functions of options, weights, Hessian and pattern.

They see no `nn.Module`, never change their arguments, and work in the dtype that they get: fp32, or fp64 as an oracle.
`solve_checked` is the way in.
"""

from __future__ import annotations

from secateur.solvers.base import Solved
from secateur.solvers.checked import solve_checked

__all__ = ["Solved", "solve_checked"]
