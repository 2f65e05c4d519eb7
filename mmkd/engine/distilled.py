"""Find what a run distils, for hooks."""

from mmengine.runner import Runner

from mmkd.core.distiller import Distiller
from mmkd.errors import ConfigError


def distiller_of(runner: Runner) -> Distiller:
    """Return the distiller of a run.

    Raises:
        ConfigError: If the run does not distil.
    """
    distiller = getattr(runner, 'distiller', None)
    if distiller is None:
        raise ConfigError(
            'a hook of mmkd needs a run that distils: set '
            "runner_type='mmkd.DistillationRunner' and `distillation`, or "
            'take the hook out of custom_hooks.'
        )
    return distiller
