"""A right solution of exercise 2, unlike the reference: a product of exact fractions."""
from fractions import Fraction


def pass_at_k(n, c, k):
    if c < 0 or c > n:
        raise ValueError("c correct of n")
    if k < 1 or k > n:
        raise ValueError("k of n")
    if n - c < k:
        return 1.0
    miss = Fraction(1)
    for i in range(k):
        miss *= Fraction(n - c - i, n - i)
    return float(1 - miss)
