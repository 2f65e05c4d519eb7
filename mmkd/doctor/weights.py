"""What was loaded into each network, and what would be saved."""

import copy
import os.path as osp
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.detectors.source import find_in_model_index
from mmkd.teachers.build import descriptions
from mmkd.utils import ATTACHED

from .patient import own_state
from .report import Report, some

SECTION = 'Weights'
COUNTER = 'num_batches_tracked'


@dataclass
class Loaded:
    """How the weights of a network relate to those of a file."""

    source: str
    total: int
    equal: list[str]
    missing: list[str]
    """In the network, but not in the file, or of another shape there."""
    unexpected: list[str]
    """In the file, but not in the network, or of another shape there."""
    different: list[str]
    """In both, with other values: initialised after loading."""

    def __str__(self) -> str:
        text = f'{self.source}: {len(self.equal)} of {self.total} tensors'
        if self.missing:
            text += f'; not in the file: {some(self.missing)}'
        if self.unexpected:
            text += f'; not used of it: {some(self.unexpected)}'
        return text


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
        or own[name].shape == value.shape
    )
    if hasattr(file, '_metadata'):
        given._metadata = file._metadata  # type: ignore[attr-defined]
    absent, unexpected = scratch.load_state_dict(given, strict=False)
    other = [k.removeprefix('module.') for k in file]
    unexpected += [k for k in other if k in own and k not in given]
    missing = [key for key in absent if key in own]
    loaded = [key for key in own if key not in missing]
    reference = scratch.state_dict()
    equal = [k for k in loaded if _same(state.get(k), reference[k])]
    return Loaded(
        source,
        len(own),
        equal,
        missing,
        list(unexpected),
        [key for key in loaded if key not in equal],
    )


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
    if not loaded.equal and not loaded.different:
        report.find(
            f'the {role} has taken nothing from load_from={source}: no name '
            'and shape in it fits.'
        )


def _check_pretrained(
    role: str, model: nn.Module, scratch: nn.Module, report: Report
) -> None:
    """Report parts that start from a file (``init_cfg``), or random."""
    scratch = copy.deepcopy(scratch)
    found: dict[str, Loaded] = {}
    for path, module in model.named_modules():
        if path.partition('.')[0] == ATTACHED:
            continue
        init = getattr(module, 'init_cfg', None)
        for each in init if isinstance(init, list) else [init]:
            if not each or 'checkpoint' not in each:  # PVT gives no type
                continue
            content = CheckpointLoader.load_checkpoint(
                each['checkpoint'], map_location='cpu'
            )
            file = content.get('state_dict', content)
            prefix = each.get('prefix')
            if prefix:
                start = prefix.rstrip('.') + '.'
                file = {
                    k.removeprefix(start): v
                    for k, v in file.items()
                    if k.startswith(start)
                }
            found[path] = compare(
                module.state_dict(),
                scratch.get_submodule(path),
                file,
                f'{path or "all"} from {each["checkpoint"]}',
            )
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
    loaded = compare(model.state_dict(), copy.deepcopy(model), file, source)
    _tell(role, model, loaded, report)
    if loaded.missing or loaded.unexpected:
        report.find(
            f'the {role} and its checkpoint {source} do not fit exactly: '
            f'{len(loaded.missing)} tensors are missing '
            f'({some(loaded.missing)}), {len(loaded.unexpected)} are not '
            f'used ({some(loaded.unexpected)}).'
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
    checkpoint = torch.load(path, map_location='cpu', weights_only=False)
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
                'and buffers of methods.'
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
