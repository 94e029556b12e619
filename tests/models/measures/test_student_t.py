import numpy as np
import pytest
from scipy.stats import t

from models.measures.student_t import MANY, quantile


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 29, 30, 999, MANY, MANY + 1, 10**6])
@pytest.mark.parametrize("p", [0.025, 0.5, 0.8, 0.975, 0.9995])
def test_quantiles_are_those_of_scipy(p, n):
    assert quantile(p, n) == pytest.approx(t.ppf(p, n), rel=1e-7, abs=1e-12)


def test_quantiles_grow():
    assert np.all(np.diff([quantile(p, 7) for p in np.linspace(0.001, 0.999, 99)]) > 0)
