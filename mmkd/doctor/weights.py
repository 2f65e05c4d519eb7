"""What was loaded into each network, and what would be saved."""

import copy
import os.path as osp
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.backbones import SwinTransformer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.data.checkpoint_loader import OPT_IN, trusts
from mmkd.data.checkpoint_reader import read_checkpoint
from mmkd.data.foreign_weights import (
    COMPUTED,
    convert_state_dict,
    origin,
    weights_in,
)
from mmkd.detectors.source import find_in_model_index
from mmkd.detectors.state_keys import hint, stock_state
from mmkd.errors import CheckpointError
from mmkd.teachers.build import descriptions
from mmkd.utils import ATTACHED

from .patient import own_state
from .report import Report, Severity, some

SECTION = 'Weights'
COUNTER = 'num_batches_tracked'


@dataclass
class Loaded:
    """How the weights of a network relate to those of a file."""

    source: str
    total: int
    equal: list[str]
    missing: list[str]
    """In the network alone."""
    unexpected: list[str]
    """In the file alone."""
    shapes: list[str]
    """In both, of another shape: each with both shapes."""
    different: list[str]
    """In both, with other values: initialised after loading."""

    @property
    def taken(self) -> int:
        """How many tensors of the file the network has taken."""
        return len(self.equal) + len(self.different)

    def __str__(self) -> str:
        text = f'{self.source}: {len(self.equal)} of {self.total} tensors'
        if self.missing:
            text += f'; not in the file: {some(self.missing)}'
        if self.shapes:
            text += f'; {self.of_another_shape()}'
        if self.unexpected:
            text += f'; not used of it: {some(self.unexpected)}'
        return text

    def of_another_shape(self) -> str:
        more = len(self.shapes) > 1
        return (
            f'{len(self.shapes)} of another shape: {self.shapes[0]}'
            + ', for one' * more
        )


def compare(
    state: Mapping[str, Tensor],
    scratch: nn.Module,
    file: Mapping[str, Tensor],
    source: str,
) -> Loaded:
    """Compare weights with those of a file.

    Args:
        state: The weights.
        scratch: A network of that kind, into which the file is loaded,
            because it knows the names of keys in older versions.
        file: The state dict of the file.
        source: The name of the file.
    """
    # Without the counters of batches, which files of old versions lack.
    own = {k: v for k, v in scratch.state_dict().items() if COUNTER not in k}
    given = OrderedDict(
        (key.removeprefix('module.'), value)
        for key, value in file.items()
        if (name := key.removeprefix('module.')) not in own
        or own[name].shape == getattr(value, 'shape', None)
    )
    if hasattr(file, '_metadata'):
        given._metadata = file._metadata  # type: ignore[attr-defined]
    absent, unexpected = scratch.load_state_dict(given, strict=False)
    other = {k.removeprefix('module.'): v for k, v in file.items()}
    shapes = [
        f'{k} is {_shape(v)} in the file and {_shape(own[k])} here'
        for k, v in other.items()
        if k in own and k not in given
    ]
    loaded = [key for key in own if key not in absent]
    missing = [key for key in own if key in absent and key not in other]
    reference = scratch.state_dict()
    equal = [k for k in loaded if _same(state.get(k), reference[k])]
    return Loaded(
        source,
        len(own),
        equal,
        missing,
        list(unexpected),
        shapes,
        [key for key in loaded if key not in equal],
    )


def _shape(value: Any) -> str:
    shape = getattr(value, 'shape', None)
    return type(value).__name__ if shape is None else str(tuple(shape))


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a.detach().cpu(), b.cpu())


def check_loaded(runner: Any, stock: nn.Module, report: Report) -> None:
    """Report where weights come from, and whether they still have them."""
    distiller = runner.distiller
    scratch = copy.deepcopy(stock)
    student = own_state(distiller.student)
    _describe('student', distiller.student, student, scratch, runner, report)
    cfg = runner.cfg.distillation
    described = descriptions(cfg.get('teacher'))
    for name, teacher in distiller.networks.items():
        options = resolved(described[name])
        _check_file(name, teacher.model, options, report)
    for name, peer in distiller.peers.items():
        options = resolved(cfg.peers[name])
        where = f'peer {name}'
        if options.get('checkpoint'):
            _check_file(where, peer.model, options, report)
        else:
            _check_pretrained(where, peer.model, peer.model, report)


def resolved(cfg: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return a description with what the model index has for its name."""
    options = {'name': cfg} if isinstance(cfg, str) else dict(cfg)
    if 'name' in options:
        options = {**find_in_model_index(options.pop('name')), **options}
    return options


def _describe(
    role: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
    scratch: nn.Module,
    runner: Any,
    report: Report,
) -> None:
    """Report the student's weights, from ``load_from`` or its config."""
    source = runner._load_from
    if source is None:
        _check_pretrained(role, model, scratch, report)
        return
    content = CheckpointLoader.load_checkpoint(source, map_location='cpu')
    file = content.get('state_dict', content)
    loaded = compare(state, scratch, file, f'load_from={source}')
    _tell(role, model, loaded, report)
    if few := _too_few(role, loaded, content, scratch):
        report.find(*few)


@dataclass
class Start:
    """A file that a part of a network starts from, by its ``init_cfg``."""

    path: str
    """Of the part; empty for the whole network."""
    source: str
    content: Mapping[str, Any]
    prefix: str | None

    @property
    def name(self) -> str:
        return f'{self.path or "all"} from {self.source}'

    def state(self) -> Mapping[str, Tensor]:
        """Return the weights as MMEngine's initialiser takes them."""
        file = self.content.get('state_dict', self.content)
        if not self.prefix:
            return file
        start = self.prefix.rstrip('.') + '.'
        return {
            k.removeprefix(start): v
            for k, v in file.items()
            if k.startswith(start)
        }


def starts(model: nn.Module) -> list[Start]:
    """Return the files that parts of a network start from."""
    found = []
    for path, module in model.named_modules():
        if path.partition('.')[0] == ATTACHED:
            continue
        init = getattr(module, 'init_cfg', None)
        for each in init if isinstance(init, list) else [init]:
            if not each or 'checkpoint' not in each:  # PVT gives no type
                continue
            source = each['checkpoint']
            content = CheckpointLoader.load_checkpoint(
                source, map_location='cpu'
            )
            found.append(Start(path, source, content, each.get('prefix')))
    return found


def check_starts(stock: nn.Module) -> None:
    """Refuse an ``init_cfg`` from which MMEngine would fail to initialise.

    Raises:
        CheckpointError: If no weight in a file begins with its prefix.
    """
    for start in starts(stock):
        module = stock.get_submodule(start.path)
        _check_swin(module, start)
        if start.prefix and not start.state():
            keys = start.content.get('state_dict', start.content)
            fits = hint(keys, module.state_dict())
            first = Counter(key.partition('.')[0] for key in keys)
            listed = ', '.join(f'{k} ({n})' for k, n in first.most_common(6))
            raise CheckpointError(
                f'{start.source} has no key that begins with prefix='
                f'{start.prefix!r} of the init_cfg of {start.path or "model"}'
                f'. {fits or f"Its keys begin with {listed}."}'
            )


def _check_swin(module: Any, start: Start) -> None:
    """Refuse what MMDetection's Swin fails on."""
    if getattr(module, 'convert_weights', True) or not isinstance(
        module, SwinTransformer
    ):
        return
    keys = start.content.get('state_dict', start.content)
    if not any(key.startswith('backbone.') for key in keys):
        raise CheckpointError(
            f'{start.source}: the SwinTransformer of {start.path} takes '
            'nothing but keys that begin with "backbone.", and there is none. '
            f'{remedy_for(start.content, module)}'
        )


def _check_pretrained(
    role: str, model: nn.Module, scratch: nn.Module, report: Report
) -> None:
    """Report parts that start from a file (``init_cfg``), or random."""
    scratch = copy.deepcopy(scratch)
    found: dict[str, Loaded] = {}
    for start in starts(model):
        module = model.get_submodule(start.path)
        initial = scratch.get_submodule(start.path)
        own = module.state_dict()
        file = start.state()
        loaded = compare(own, initial, file, start.name)
        if not loaded.taken and _loads_itself(module):
            loaded = by_value(own, weights_in(start.content)[1], start.name)
        found[start.path] = loaded
        name = f'{role}' + f"'s {start.path}" * bool(start.path)
        if few := _too_few(name, loaded, start.content, initial):
            report.find(*few)
        if style := _other_style(module, start):
            report.find(f'the {name}: {style}', 'warns')
    for loaded in found.values():
        _tell(role, model, loaded, report)
    covered = {path.partition('.')[0] for path in found}
    parts = [
        name
        for name, child in model.named_children()
        if name != ATTACHED and any(True for _ in child.parameters())
    ]
    random = [] if '' in covered else [p for p in parts if p not in covered]
    if random:
        report.say(SECTION, f'{role:<9} random: {", ".join(random)}')


def _loads_itself(module: nn.Module) -> bool:
    """Return whether a module renames weights in ways of its own."""
    own = getattr(type(module), 'init_weights', None)
    return own is not BaseModule.init_weights


def by_value(
    state: Mapping[str, Tensor], file: Mapping[str, Tensor], source: str
) -> Loaded:
    """Compare weights with those of a file, whatever they are called."""
    known: dict[tuple, list[Tensor]] = {}
    for value in file.values():
        known.setdefault(tuple(value.shape), []).append(value)
    own = {k: v for k, v in state.items() if not COMPUTED.search(k)}
    equal = [
        key
        for key, value in own.items()
        if any(_same(value, v) for v in known.get(tuple(value.shape), ()))
    ]
    missing = [key for key in own if key not in equal]
    return Loaded(source, len(own), equal, missing, [], [], [])


FEW = 0.5
"""A smaller share of a network's tensors, taken from a file, is a warning."""


def _too_few(
    name: str, loaded: Loaded, content: Any, module: nn.Module
) -> tuple[str, Severity] | None:
    """Return a finding if a network has not taken all that it has to take."""
    if loaded.taken == loaded.total:
        return None
    count = f'{loaded.taken} of {loaded.total} tensors'
    missing = []
    if loaded.missing:
        missing.append(
            f'{len(loaded.missing)} are not in it ({some(loaded.missing)})'
        )
    if loaded.shapes:
        missing.append(loaded.of_another_shape())
    why = ', '.join(missing)
    if loaded.taken > FEW * loaded.total:
        return (
            f'the {name} has taken {count} from {loaded.source}: {why}. These '
            'start random.'
        ), 'notes'
    remedy = remedy_for(content, module)
    if not loaded.taken:
        return (
            f'the {name} has taken nothing from {loaded.source}: {count}; '
            f'{why}. {remedy}'
        ), 'stops'
    return (
        f'the {name} has taken only {count} from {loaded.source}: {why}. '
        f'{remedy}'
    ), 'warns'


def remedy_for(content: Any, module: nn.Module) -> str:
    """Say what would let a module take the weights of a file."""
    try:
        place, state = weights_in(content)
    except CheckpointError as error:
        return f'In it {error}'
    under = f'They lie under "{place}" in it. ' if place not in LOOKED else ''
    whose = origin(state)
    theirs = f'It holds the weights of {whose}. ' if whose else ''
    own = module.state_dict()
    if not under and (fits := hint(state, own)):
        return theirs + fits
    parts = {'': module, **dict(module.named_children())}
    for name, part in parts.items():
        if not any(True for _ in part.parameters()):
            continue
        with suppress(CheckpointError):
            convert_state_dict(state, part)
            where = f'{name} of this network' if name else 'this module'
            how = (
                f'{under}{theirs}They fit {where}: `mmkd convert FILE OUT '
                '--to CONFIG` writes a file with the right names'
            )
            return how + (
                f", for init_cfg=dict(type='Pretrained', checkpoint=OUT) in "
                f'model.{name}.'
                if name
                else '.'
            )
    if whose:
        return (
            f'{under}{theirs}mmkd cannot map them to this '
            f'{type(module).__name__}: give weights of this very kind, depth '
            'and width, or start without.'
        )
    return (
        f'{under}Its names are such as {some(list(state))}, those of the '
        f'{type(module).__name__} such as {some(list(own))}. Give the file '
        'of this very network.'
    )


LOOKED = ('', 'state_dict')
"""Where MMEngine looks for weights in a file."""


def _other_style(module: Any, start: Start) -> str:
    """Return what is wrong where a ResNet strides in another layer."""
    style, depth = getattr(module, 'style', None), getattr(module, 'depth', 0)
    if style not in ('caffe', 'pytorch') or depth in (18, 34):
        return ''
    name = start.source.lower()
    caffe = 'caffe' in name
    pytorch = 'torchvision' in name or (
        not start.prefix and (origin(start.state()).startswith('torchvision'))
    )
    theirs = 'caffe' if caffe else 'pytorch' if pytorch else style
    if theirs == style:
        return ''
    return (
        f'style={style!r}, but the weights of {start.source} are of '
        f'style={theirs!r}, which halves the resolution in another layer of '
        'a block: names and shapes fit, and yet it computes something else. '
        f'Set style={theirs!r}.'
    )


def _check_file(
    role: str, model: nn.Module, options: Mapping[str, Any], report: Report
) -> None:
    source = options.get('checkpoint')
    if not source:
        report.say(SECTION, f'{role:<9} {type(model).__name__}: random')
        report.find(
            f'the {role} is untrained (checkpoint=None): its weights are '
            'random, and distillation from it teaches nothing.'
        )
        return
    if options.get('fold_bn'):
        # Its tensors are no longer those of the file. When it was built, they
        # were loaded strictly, and both forms were compared on a test image.
        report.say(SECTION, f'{role:<9} {source}, batch norms folded')
        return
    trust = bool(options.get('trust_checkpoint'))
    file = load_checkpoint_file(source, trust=trust)['state_dict']
    own = model.state_dict()
    file = stock_state(file, own, source, options.get('prefix'))
    loaded = compare(own, copy.deepcopy(model), file, source)
    _tell(role, model, loaded, report)
    if loaded.missing or loaded.shapes or loaded.unexpected:
        report.find(
            f'the {role} and its checkpoint {source} do not fit exactly: '
            f'{len(loaded.missing)} tensors are missing '
            f'({some(loaded.missing)}), {len(loaded.unexpected)} are not '
            f'used ({some(loaded.unexpected)})'
            + (f', {loaded.of_another_shape()}.' if loaded.shapes else '.')
        )


def _tell(role: str, model: nn.Module, loaded: Loaded, report: Report) -> None:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    head = f'{role:<9} {type(model).__name__}, {size:.2f} M parameters, '
    report.say(SECTION, head + str(loaded))
    if loaded.different:
        report.find(
            f'the {role} was initialised again after {loaded.source} was '
            f'loaded: {len(loaded.different)} tensors have other values '
            f'({some(loaded.different)}).'
        )


def check_checkpoint_file(
    runner: Any, stock: nn.Module, folder: str, report: Report
) -> None:
    """Save as the run would, and check the file."""
    runner.save_checkpoint(folder, 'doctor.pth', meta={})
    path = osp.join(folder, 'doctor.pth')
    size = osp.getsize(path) / 2**20
    report.say('Checkpoint', f'{size:.1f} MiB with the optimiser')
    try:
        trust = trusts(runner.cfg)
        checkpoint = read_checkpoint(path, trust=trust, opt_in=OPT_IN)
    except CheckpointError as error:
        report.find(f'the run could not resume what it saves: {error}')
        return
    state = checkpoint['state_dict']
    own = stock.state_dict()
    wrong = [
        k for k in own if k not in state or state[k].shape != own[k].shape
    ]
    extra = [k for k in state if k not in own]
    if wrong or extra:
        report.find(
            'the student cannot be taken out of the checkpoint: its '
            'state_dict does not load strictly into the stock model; '
            f'{len(wrong)} tensors are missing or of another shape '
            f'({some(wrong) or "none"}), {len(extra)} are foreign '
            f'({some(extra) or "none"}).'
        )
    else:
        stock.load_state_dict(state, strict=True)
        report.say('Checkpoint', 'loads strictly into the stock model')
    for name, teacher in runner.distiller.networks.items():
        held = _of_teacher(checkpoint, teacher.model, own)
        if held:
            report.find(
                f'every checkpoint holds weights of the {name}: {len(held)} '
                f'tensors ({some(held)}). Keep the teacher out of modules '
                'and buffers of methods.',
                'warns',
            )


def _of_teacher(
    checkpoint: Mapping[str, Any],
    teacher: nn.Module,
    student: Mapping[str, Tensor],
) -> list[str]:
    """Return names in a checkpoint that hold weights of the teacher.

    Peers and the student may start from the same file as the teacher.
    """
    known: dict[tuple, list[Tensor]] = {}
    for tensor in teacher.state_dict().values():
        value = tensor.detach().cpu()
        if value.is_floating_point() and (value != value.flatten()[0]).any():
            known.setdefault(tuple(value.shape), []).append(value)
    parts = [*checkpoint.items(), *checkpoint.get(ATTACHED, {}).items()]
    return [
        name
        for _, part in parts
        if isinstance(part, Mapping)
        for name, value in part.items()
        if isinstance(value, Tensor)
        and name.removeprefix('module.') not in student
        and '.peers.' not in name
        and any(torch.equal(value, t) for t in known.get(value.shape, ()))
    ]
