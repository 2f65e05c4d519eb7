"""What draws: it needs matplotlib, and labelling does not."""

from types import ModuleType

from mmkd.errors import PackageError


def figures() -> ModuleType:
    """Return the module that draws.

    Raises:
        PackageError: If matplotlib is not installed.
    """
    try:
        from mmkd.report import figures as module
    except ModuleNotFoundError as error:
        raise PackageError(
            f'mmkd label draws with {error.name}, which is not installed: '
            "pip install 'mmkd[report]', or leave out --against and --preview"
        ) from error
    return module
