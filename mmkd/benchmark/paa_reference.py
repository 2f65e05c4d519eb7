"""PAA's separation of one object's candidates, by scikit-learn."""

import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture


def reference(row: Any, dtype: type = np.float64) -> tuple[np.ndarray, int]:
    """Find PAA's positives of one object with scikit-learn, as MMDetection.

    Args:
        row: (n,) the candidates' costs, in ascending order.
        dtype: The type that scikit-learn computes in.

    Returns:
        Which candidates are positive (n,), and the iterations of the fit.
    """
    x: np.ndarray = np.asarray(row, dtype=dtype).reshape(-1, 1)
    mixture = GaussianMixture(
        2,
        weights_init=np.array([0.5, 0.5]),
        means_init=np.array([[x.min()], [x.max()]]),
        precisions_init=np.array([[1.0], [1.0]]),
        covariance_type='diag',
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        mixture.fit(x)
    cheap = np.flatnonzero(mixture.predict(x) == 0)
    positive = np.zeros(len(x), dtype=bool)
    if len(cheap):
        best = mixture.score_samples(x)[cheap].argmax()
        positive[cheap[: best + 1]] = True
    return positive, mixture.n_iter_
