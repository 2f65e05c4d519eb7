"""Assignment of objects to priors: recorded, replayed, shared, batched."""

from .mixture import Mixtures, fit_mixtures, positive_samples
from .paa import Candidates, assigned_by, own_costs
from .replay import record_assignments, replayed

__all__ = [
    'Candidates',
    'Mixtures',
    'assigned_by',
    'fit_mixtures',
    'own_costs',
    'positive_samples',
    'record_assignments',
    'replayed',
]
