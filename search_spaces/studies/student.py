"""Student's t: the two-sided 95% quantile."""

from statistics import NormalDist

_BY_DF = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)
"""For 1 to 8 degrees of freedom. Source: any table of Student's t."""


def t_quantile_95(df: int) -> float:
    """How many standard errors a two-sided 95% interval reaches to each side.

    Args:
        df: degrees of freedom, >= 1.

    Source: Abramowitz and Stegun 26.7.5 above 8 degrees, within 0.001.
    """
    if df < 1:
        raise ValueError(f"df must be >= 1, got {df}; run at least two seeds")
    if df <= len(_BY_DF):
        return _BY_DF[df - 1]
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
