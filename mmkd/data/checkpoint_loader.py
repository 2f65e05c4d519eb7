"""What MMEngine and MMDetection load passes through mmkd's reader, too."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine
from mmengine.fileio import get_file_backend
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    _get_mmengine_home,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch.hub import get_dir

from mmkd.errors import CheckpointError, ConfigError
from mmkd.utils import ATTACHED

from .checkpoint_file import download_checkpoint, local_checkpoint
from .checkpoint_reader import read_checkpoint
from .files import read_json

OPT_IN = 'in the config (--cfg-options trust_checkpoint=True)'
MODELS_OF_TORCHVISION = 'hub/torchvision_0.12.json'
"""MMEngine's list of models and their URLs."""
PRETRAINED = 'backbone.'
"""The start of the names in classifiers of which MMEngine takes backbones."""


def trusts(cfg: Mapping[str, Any]) -> bool:
    """Return whether a config lets checkpoints run code.

    Raises:
        ConfigError: If ``trust_checkpoint`` is no boolean.
    """
    trust = cfg.get('trust_checkpoint', False)
    if not isinstance(trust, bool):
        raise ConfigError(
            'trust_checkpoint must be True or False, got '
            f'{trust!r}. True lets the checkpoints of load_from, resume and '
            'init_cfg run any code.'
        )
    return trust


@contextmanager
def safe_checkpoints(trust: bool = False) -> Iterator[None]:
    """Let MMEngine load checkpoints by :func:`.read_checkpoint`.

    That is all that goes through its ``CheckpointLoader``: ``load_from`` and
    ``resume`` of a runner, ``init_cfg`` and ``pretrained`` of a network,
    ``init_detector``; from files, URLs, and names such as
    ``torchvision://resnet50``. Loaders that others have registered stay.

    Args:
        trust: Whether to unpickle whatever these files hold.
    """
    former = CheckpointLoader._schemes
    CheckpointLoader._schemes = OrderedDict({**former, **_schemes(trust)})
    try:
        yield
    finally:  # what was registered in the meantime stays
        CheckpointLoader._schemes = OrderedDict(
            (start, former.get(start, loader))
            for start, loader in CheckpointLoader._schemes.items()
        )


def _schemes(trust: bool) -> dict[str, Callable[..., Any]]:
    """Return loaders by the starts of their addresses, as MMEngine names them.

    MMEngine's log has what follows ``load_from_`` in their names.
    """

    def load_from_local(name: str, map_location: Any = None) -> Any:
        content = read_checkpoint(
            local_checkpoint(name),
            trust=trust,
            opt_in=OPT_IN,
            map_location='cpu' if map_location is None else map_location,
        )
        return _checked(content, name)

    def load_from_http(url: str, map_location: Any = None) -> Any:
        return load_from_local(_downloaded(url), map_location)

    def load_from_ceph(name: str, map_location: Any = None) -> Any:
        backend = get_file_backend(name, backend_args={'backend': 'petrel'})
        with backend.get_local_path(name) as path:
            return load_from_local(str(path), map_location)

    def load_from_torchvision(name: str, map_location: Any = None) -> Any:
        url = _known(name, _torchvision_models(name))
        return load_from_http(url, map_location)

    def load_from_openmmlab(name: str, map_location: Any = None) -> Any:
        start, _, model = name.partition('://')
        model = get_deprecated_model_names().get(model, model)
        source = _known(f'{start}://{model}', get_external_models())
        if source.startswith(('http://', 'https://')):
            return load_from_http(source, map_location)
        path = os.path.join(_get_mmengine_home(), source)
        return load_from_local(path, map_location)

    def load_from_mmcls(name: str, map_location: Any = None) -> Any:
        url = _known(name, get_mmcls_models())
        content = load_from_http(url, map_location)
        state = content.get('state_dict', content)
        backbone = OrderedDict(
            (key.removeprefix(PRETRAINED), value)
            for key, value in state.items()
            if key.startswith(PRETRAINED)
        )
        return dict(state_dict=backbone)

    def load_from_pavi(name: str, map_location: Any = None) -> Any:
        raise CheckpointError(
            f'{name} is not read by mmkd, because its client reads any '
            'pickle. Download the file and give its path.'
        )

    return {
        '': load_from_local,
        'http://': load_from_http,
        'https://': load_from_http,
        r'(\S+\:)?s3://': load_from_ceph,
        r'(\S+\:)?petrel://': load_from_ceph,
        'modelzoo://': load_from_torchvision,
        'torchvision://': load_from_torchvision,
        'open-mmlab://': load_from_openmmlab,
        'openmmlab://': load_from_openmmlab,
        'mmcls://': load_from_mmcls,
        'pavi://': load_from_pavi,
    }


def _checked(content: Any, name: str) -> dict[str, Any]:
    """Check that a checkpoint is a dict; leave out the config in its meta.

    MMEngine runs the text of that config when it resumes, to look for a
    setting of MMDetection 2.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f'{name} is no checkpoint: expected a dict, got a '
            f'{type(content).__name__}.'
        )
    for key in ('state_dict', 'meta', 'message_hub', ATTACHED):
        if not isinstance(content.get(key, {}), dict):
            raise CheckpointError(
                f'{name} is no checkpoint: expected a dict as its "{key}", '
                f'got a {type(content[key]).__name__}.'
            )
    content.get('meta', {}).pop('config', None)
    return content


def _downloaded(url: str) -> str:
    """Return the file of a URL, which MMEngine may have downloaded before."""
    name = os.path.basename(urlparse(url).path)
    path = Path(get_dir(), 'checkpoints', name)
    if path.is_file():
        return str(path)
    return download_checkpoint(url, verified=False)


def _torchvision_models(name: str) -> Mapping[str, str]:
    """Return the URLs of torchvision's models, one of which is wanted.

    MMEngine imports torchvision even for the models whose URLs it has itself,
    and torchvision may be absent or made for another PyTorch.
    """
    known = read_json(Path(mmengine.__file__).parent / MODELS_OF_TORCHVISION)
    if name.partition('://')[2] in known:
        return known
    try:
        return get_torchvision_models()
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(
            f'{name} is not among the checkpoints whose URLs MMEngine has, '
            'and torchvision, which may know it, cannot be imported '
            f'({error}). Correct the name, or download the file and give its '
            'path.'
        ) from error


def _known(name: str, sources: Mapping[str, str]) -> str:
    model = name.partition('://')[2]
    if model not in sources:
        raise CheckpointError(
            f'MMEngine knows no checkpoint {name}. Give its path or URL.'
        )
    return sources[model]
