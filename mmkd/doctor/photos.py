"""What is wrong with the files of images, and which are there twice."""

import functools
import hashlib
import os
import os.path as osp
import re
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from mmkd.data.pictures import (
    headers_alone,
    orientation_of,
    pixel_limit,
    too_large,
)

from .annotations import Part, worst
from .boxes import kind, steps
from .faults import SHOWN, Faults
from .report import Severity

HEADERS = 20_000
"""Images whose header and end are read by default…"""
DECODED = 2000
"""…those of them that are decoded…"""
BUDGET = 1 << 30
"""…and the bytes of these, which about 10 s of one core suffice for."""
CHUNK = 32
THUMB = 32
USUAL = ('1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK')
ENDS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}
MAGIC = {'JPEG': b'\xff\xd8\xff', 'PNG': b'\x89PNG'}
SIGNS = (
    (b'ftyphei', 'a HEIC photo of a phone'),
    (b'ftypmif1', 'a HEIC photo of a phone'),
    (b'git-lfs', 'a pointer of Git LFS instead of the file'),
    (b'<html', 'a page of HTML'),
    (b'<!doctype', 'a page of HTML'),
    (b'<svg', 'an SVG drawing'),
    (b'%pdf', 'a PDF'),
    (b'{', 'text'),
    (b'<?xml', 'XML'),
)
ROBOFLOW = re.compile(r'(.+)_(?:jpe?g|png|bmp|webp)\.rf\.[0-9A-Za-z]+\.\w+$')


@dataclass
class Photo:
    """What a file of an image is."""

    size: tuple[int, int] | None = None
    """Width and height, as the pipeline loads it."""
    stored: tuple[int, int] | None = None
    """The same without EXIF's orientation."""
    orientation: int = 1
    channels: int = 3
    fault: str = ''
    """Why it cannot be loaded."""
    notes: tuple[str, ...] = ()
    thumb: np.ndarray | None = None
    """(32, 32), gray."""


@dataclass
class Files:
    """The files of all splits."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by path; only of files that exist."""
    folders: dict[str, dict[str, int]] = field(default_factory=dict)
    """The files of each folder, and their bytes."""
    photos: dict[str, Photo] = field(default_factory=dict)
    """Those that were opened."""
    copies: dict[str, str] = field(default_factory=dict)
    """Of each file with an equal one, what they have in common."""


def list_files(parts: Sequence[Part]) -> Files:
    """Look which files exist, folder by folder."""
    files = Files()
    for path in {p for part in parts for p in part.pictures}:
        folder, name = osp.split(path)
        if folder not in files.folders:
            files.folders[folder] = _listing(folder)
        if name in files.folders[folder]:
            files.sizes[path] = files.folders[folder][name]
    return files


def _listing(folder: str) -> dict[str, int]:
    try:
        with os.scandir(folder or '.') as entries:
            return {
                entry.name: entry.stat().st_size
                for entry in entries
                if entry.is_file()
            }
    except OSError:
        return {}


# --------------------------------------------------------------------- missing


def check_missing(part: Part, files: Files, faults: Faults) -> None:
    """Report images that do not exist, and what is there instead."""
    lost = [
        i for i, path in enumerate(part.pictures) if path not in files.sizes
    ]
    whole = len(lost) == len(part.pictures) > 1
    faults.add(
        part.split,
        worst(part.split),
        'image',
        'missing' + ' (all of the split)' * whole,
        len(lost),
        [
            part.pictures[i] + _instead(part.pictures[i], part, files)
            for i in lost[:SHOWN]
        ],
    )
    empty = [p for p in part.pictures if files.sizes.get(p) == 0]
    faults.add(
        part.split,
        worst(part.split),
        'image file',
        'empty (0 bytes)',
        len(empty),
        empty,
    )


def _instead(path: str, part: Part, files: Files) -> str:
    """Say which file may be meant."""
    folder, name = osp.split(path)
    beside = files.folders.get(folder, {})
    if osp.isdir(path):
        return ' (a folder)'
    names = {n.casefold(): n for n in beside}
    if name.casefold() in names:
        return f' (there is {names[name.casefold()]})'
    stem = osp.splitext(name)[0].casefold()
    for other in beside:
        if osp.splitext(other)[0].casefold() == stem:
            jpg = part.layout == 'VOC' and not other.endswith('.jpg')
            why = ', and VOCDataset reads .jpg alone' if jpg else ''
            return f' (there is {other}{why})'
    plain = urllib.parse.unquote(name.replace('\\', '/')).rpartition('/')[2]
    near = _search(plain, part.options.get('data_root') or folder)
    if near:
        return f' (there is {near})'
    if not osp.isdir(folder):
        return f' (there is no folder {folder})'
    return ''


def _search(name: str, root: str, most: int = 20000) -> str:
    """Look for a file of that name below a folder, not for long."""
    seen = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        if name in names:
            return osp.join(folder, name)
        seen += len(names) + len(folders)
        if seen > most:
            break
    return ''


# ------------------------------------------------------------------------ open


def choose(files: Files, most: int | None) -> tuple[list[str], list[str]]:
    """Choose by a fixed draw which files are opened, and which decoded.

    Args:
        files: All files.
        most: How many are decoded; None takes as many as the budget allows.

    Returns:
        The files that are decoded, and those whose header is read.
    """
    paths = sorted(path for path, size in files.sizes.items() if size)
    order = np.random.default_rng(0).permutation(len(paths))
    drawn = [paths[i] for i in order]
    if most is None:
        total = np.cumsum([files.sizes[path] for path in drawn[:DECODED]])
        # a few are decoded however large they are
        most = max(int(np.searchsorted(total, BUDGET, side='right')), 100)
    return drawn[:most], drawn[most : max(HEADERS, most)]


def open_files(
    files: Files,
    decoded: Sequence[str],
    headers: Sequence[str],
    loader: Mapping[str, Any],
) -> None:
    """Open files, on all cores, with a bar on a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        *Progress.get_default_columns(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    limit = pixel_limit()
    tasks = [(path, True) for path in decoded]
    tasks += [(path, False) for path in headers]
    chunks = [tasks[i : i + CHUNK] for i in range(0, len(tasks), CHUNK)]

    def look(chunk: list[tuple[str, bool]]) -> list[Photo]:
        return [look_at(path, loader, limit, whole) for path, whole in chunk]

    with (
        headers_alone(),
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool,
        bar,
    ):
        found = bar.track(
            pool.map(look, chunks),
            total=len(chunks),
            description='Opening images',
        )
        for chunk, photos in zip(chunks, found, strict=True):
            files.photos.update(
                (path, photo)
                for (path, _), photo in zip(chunk, photos, strict=True)
            )


def look_at(
    path: str, loader: Mapping[str, Any], limit: int, decode: bool
) -> Photo:
    """Open a file as the pipeline would, at a fraction of the cost.

    The header tells the size, and the end whether the file is whole. OpenCV
    decodes it at an eighth of its size, if it is asked to, or if the file is
    unusual.
    """
    photo, form, mode = Photo(), '', ''
    try:
        with open(path, 'rb') as file:
            try:
                with Image.open(file) as image:
                    form, mode = image.format or '', image.mode
                    photo.size = photo.stored = image.size
                    photo.channels = len(image.getbands())
                    photo.orientation = orientation_of(image)
                    file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
                    whole = ENDS.get(form, b'?') in file.read()
            except Exception:  # whatever a damaged file causes in Pillow
                form, whole = '', False
    except OSError as error:
        photo.fault = f'that cannot be read ({error.strerror})'
        return photo
    if photo.size and photo.size[0] * photo.size[1] > limit:
        photo.fault = 'too large: ' + (too_large(path) or '')
        return photo
    if photo.size and photo.orientation in (5, 6, 7, 8) and _rotates(loader):
        photo.size = photo.size[::-1]
    if decode or not whole or mode not in USUAL:
        _look_into(path, form, mode, photo)
    elif mode in NOTED:
        photo.notes = (NOTED[mode],)
    return photo


def _look_into(path: str, form: str, mode: str, photo: Photo) -> None:
    with open(path, 'rb') as file:
        content = file.read()
    gray = _decode(content, photo.size)
    if gray is None:
        photo.fault = _why_not(content, form)
        return
    if photo.size is None:
        height, width = gray.shape[:2]
        photo.size = photo.stored = (width, height)
    photo.thumb = cv2.resize(gray, (THUMB, THUMB), interpolation=3)
    photo.notes = tuple(_notes(content, mode, photo.thumb))


def _rotates(loader: Mapping[str, Any]) -> bool:
    flag = loader.get('color_type', 'color')
    backend = loader.get('imdecode_backend') or 'cv2'
    return flag in ('color', 'grayscale') and backend in ('cv2', 'pillow')


def _decode(content: bytes, size: tuple[int, int] | None) -> np.ndarray | None:
    """Decode in gray, at a fraction of the size that leaves 32 pixels."""
    flag = cv2.IMREAD_GRAYSCALE
    short = min(size) if size else 0
    for factor in (8, 4, 2):
        if short >= factor * THUMB:
            flag = getattr(cv2, f'IMREAD_REDUCED_GRAYSCALE_{factor}')
            break
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    except cv2.error:
        return None


def _why_not(content: bytes, form: str) -> str:
    """Say why OpenCV does not decode a file."""
    for known, magic in MAGIC.items():
        form = known if content.startswith(magic) else form
    if form in ENDS and ENDS[form] not in content[-64:]:
        return f'truncated ({form}, after {len(content):,} bytes)'
    if form:
        return f'of a kind or damage that OpenCV does not decode ({form})'
    start = content[:400].lstrip().lower()
    for sign, name in SIGNS:
        if start.startswith(sign) or (sign in start[:60] and len(sign) > 4):
            return f'holding no image ({name})'
    if not content.strip(b'\0'):
        return f'holding no image ({len(content):,} zeros)'
    return f'holding no image (it begins with {content[:8]!r})'


def _notes(content: bytes, mode: str, thumb: np.ndarray) -> Iterator[str]:
    if int(np.ptp(thumb)) == 0:
        yield 'blank'
    if mode.startswith('I'):
        raw = np.frombuffer(content, np.uint8)
        whole = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED)
        dark = whole is not None and int(whole.max()) < 1 << 12
        yield 'dark16' if dark else '16'
    elif mode in NOTED:
        yield NOTED[mode]


NOTED = {'RGBA': 'alpha', 'LA': 'alpha', 'CMYK': 'cmyk'}
NOTES: dict[str, tuple[Severity, str]] = {
    'blank': ('warns', 'of a single colour'),
    'dark16': (
        'warns',
        'of 16 bits that uses 12 or less, and is almost black as the pipeline '
        'loads it',
    ),
    '16': ('notes', 'of 16 bits, which the pipeline cuts to 8'),
    'alpha': ('notes', 'with transparency, which the pipeline ignores'),
    'cmyk': ('notes', 'in CMYK, which is converted to RGB without a profile'),
}


def loader_of(parts: Sequence[Part]) -> Mapping[str, Any]:
    """Return the transform that loads the images."""
    for part in parts:
        for step in steps(part.pipeline):
            if kind(step) == 'LoadImageFromFile':
                return step
    return {}


def check_photos(
    part: Part, files: Files, loader: Mapping[str, Any], faults: Faults
) -> set[int]:
    """Report what is wrong with the images that were opened.

    Returns:
        The images whose size is another one than the annotations say.
    """
    seen = [
        (i, path, files.photos[path])
        for i, path in enumerate(part.pictures)
        if path in files.photos
    ]
    for reason in dict.fromkeys(_reason(p.fault) for _, _, p in seen):
        hit = [(path, p) for _, path, p in seen if _reason(p.fault) == reason]
        if reason:
            # what was found goes with the file, and not with the kind
            faults.add(
                part.split,
                worst(part.split),
                'image file',
                reason,
                len(hit),
                [f'{path}{p.fault[len(reason) :]}' for path, p in hit],
            )
    for note, (severity, what) in NOTES.items():
        paths = [path for _, path, photo in seen if note in photo.notes]
        faults.add(part.split, severity, 'image', what, len(paths), paths)
    if loader.get('color_type') == 'unchanged':
        others = [p for _, p, photo in seen if photo.channels != 3]
        faults.add(
            part.split,
            worst(part.split),
            'image',
            "of other than 3 channels, which color_type='unchanged' keeps",
            len(others),
            others,
        )
    return _check_sizes(part, seen, faults)


def _reason(fault: str) -> str:
    return fault.partition(' (')[0].partition(': ')[0]


def _check_sizes(
    part: Part, seen: list[tuple[int, str, Photo]], faults: Faults
) -> set[int]:
    wrong: dict[str, list[str]] = defaultdict(list)
    images: set[int] = set()
    turned = []
    boxes = np.bincount(part.image, minlength=len(part.pictures))
    for index, path, photo in seen:
        if photo.size is None:
            continue
        if photo.orientation > 1 and boxes[index]:
            turned.append(path)
        size = part.sizes[index]
        if np.isnan(size).any():  # VOC's data set takes the file's
            part.sizes[index] = photo.size
        if tuple(size) == photo.size:
            continue
        images.add(index)
        is_size = f'{photo.size[0]} x {photo.size[1]}'
        written = f'{size[0]:g} x {size[1]:g}'
        place = f'{path} (written {written}, loaded {is_size})'
        if photo.stored != photo.size and tuple(size) == photo.stored:
            what = (
                'rotated by its EXIF tag on loading, with annotations of the '
                'unrotated image'
            )
        elif not (size > 0).all():
            what = 'whose width or height in the annotations is not above 0'
        elif photo.orientation > 4 and tuple(size) == photo.size[::-1]:
            what = (
                'whose annotations follow its EXIF tag, which the pipeline '
                'ignores'
            )
        elif tuple(size) == photo.size[::-1]:
            what = 'whose width and height are swapped in the annotations'
        else:
            what = 'of another size than the annotations say'
        wrong[what].append(place)
    for what, places in wrong.items():
        faults.add(
            part.split,
            faults.share(len(places), max(len(seen), 2)),
            'image',
            what,
            len(places),
            places,
            'Were they resized without their boxes?'
            if what.startswith('of another')
            else '',
        )
    named = sum('EXIF' in what for what in wrong)
    if turned and not named:
        faults.add(
            part.split,
            'notes',
            'image',
            'rotated by an EXIF tag on loading: the boxes have to belong to '
            'the rotated image',
            len(turned),
            turned,
        )
    return images


# ------------------------------------------------------------------ duplicates


def find_copies(files: Files) -> None:
    """Find equal files: those of equal size are compared by their hashes."""
    by_size = defaultdict(list)
    for path, size in files.sizes.items():
        if size:
            by_size[size].append(path)
    for size, paths in by_size.items():
        ends = _groups(paths, _ends) if len(paths) > 1 else []
        groups = [g for each in ends for g in _groups(each, _whole)]
        for group in groups:
            for path in group:
                files.copies[path] = f'{size} {group[0]}'


def _groups(
    paths: Sequence[str], key: Callable[[str], bytes]
) -> list[list[str]]:
    found = defaultdict(list)
    for path in paths:
        found[key(path)].append(path)
    return [group for value, group in found.items() if value and group[1:]]


def _ends(path: str, length: int = 1 << 14) -> bytes:
    try:
        with open(path, 'rb') as file:
            start = file.read(length)
            file.seek(max(0, file.seek(0, 2) - length))
            return hashlib.blake2b(start + file.read()).digest()
    except OSError:
        return b''


def _whole(path: str) -> bytes:
    try:
        with open(path, 'rb') as file:
            return hashlib.blake2b(file.read()).digest()
    except OSError:
        return b''


def check_copies(parts: Sequence[Part], files: Files, faults: Faults) -> None:
    """Report images of validation and test that are in training, too."""
    train = [part for part in parts if part.split == 'train']
    _check_within(train, files, faults)
    groups = {_common(path, files): path for p in train for path in p.pictures}
    sources = {s: p for p in _pictures(train) if (s := _source(p))}
    for split in ('val', 'test'):
        others = [part for part in parts if part.split == split]
        pictures = _pictures(others)
        if not train or not pictures:
            continue
        pairs = {
            path: groups[key]
            for path in pictures
            if (key := _common(path, files)) in groups
        }
        if 10 * len(pairs) >= 9 * len(pictures):
            faults.say(
                f'{split}: its {len(pictures):,} images are those of train '
                f'({len(pairs):,} are equal): what is measured on them says '
                'nothing of new images.',
                'warns',
            )
            continue
        _say_pairs(split, 'in train as well', pairs, faults)
        same = {
            path: sources[source]
            for path in pictures
            if (source := _source(path)) in sources and path not in pairs
        }
        what = "made from an image of train, by Roboflow's names"
        _say_pairs(split, what, same, faults)
        rest = [p for p in pictures if p not in pairs and p not in same]
        near = similar(rest, _pictures(train), files)
        what = 'in train as well, in another file'
        _say_pairs(split, what, near, faults)


def _pictures(parts: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(p for part in parts for p in part.pictures))


def _common(path: str, files: Files) -> str:
    folder, name = osp.split(path)
    return files.copies.get(path) or f'{_real(folder)}/{name}'


@functools.cache
def _real(folder: str) -> str:
    return osp.realpath(folder)


def _source(path: str) -> str:
    found = ROBOFLOW.match(osp.basename(path))
    return found[1] if found else ''


def _say_pairs(
    split: str, what: str, pairs: Mapping[str, str], faults: Faults
) -> None:
    faults.add(
        split,
        'warns',
        'image',
        what,
        len(pairs),
        [f'{a} is {b}' for a, b in list(pairs.items())[:SHOWN]],
        'What is measured on them is too good.',
    )


def _check_within(parts: Sequence[Part], files: Files, faults: Faults) -> None:
    """Report images that a split has twice, under several names."""
    same: list[str] = []
    other: list[str] = []
    for part in parts:
        groups = defaultdict(list)
        for index, path in enumerate(part.pictures):
            if path in files.copies:
                groups[files.copies[path]].append(index)
        for images in groups.values():
            if len(images) < 2:
                continue
            labels = [_labels(part, i) for i in images]
            names = ' = '.join(part.pictures[i] for i in images[:3])
            differ = any(each != labels[0] for each in labels)
            (other if differ else same).append(names)
    split = parts[0].split if parts else ''
    faults.add(
        split,
        'warns',
        'image',
        'in several files with different boxes',
        len(other),
        other,
        'The boxes that one of them lacks are learnt as background.',
    )
    faults.add(split, 'notes', 'image', 'in several files', len(same), same)


def _labels(part: Part, image: int) -> Any:
    rows = np.flatnonzero(part.image == image)
    return Counter(
        (int(part.category[i]), *map(float, part.written[i])) for i in rows
    )


def similar(
    paths: Sequence[str], others: Sequence[str], files: Files
) -> dict[str, str]:
    """Find images that are the same except for size, quality or brightness.

    Images are compared as 32 x 32 gray pixels, as they are and mirrored. A
    camera that does not move gives images that resemble each other, but
    differ where something has moved, so that the largest difference decides.
    """
    one, two = _thumbs(paths, files), _thumbs(others, files)
    if not one or not two:
        return {}
    names, theirs = list(one), list(two)
    a, b = np.stack(list(one.values())), np.stack(list(two.values()))
    small = [_normed(_halved(x)) for x in (b, b[..., ::-1])]
    found: dict[str, str] = {}
    for start in range(0, len(a), 512):
        block = a[start : start + 512]
        mine = _normed(_halved(block))
        for flip, table in enumerate(small):
            for row, column in np.argwhere(mine @ table.T > 0.98):
                other = b[column, :, ::-1] if flip else b[column]
                name = names[start + row]
                if name not in found and _equal(block[row], other):
                    found[name] = theirs[column]
    return found


def _thumbs(paths: Sequence[str], files: Files) -> dict[str, np.ndarray]:
    """Return the thumbnails of images that show something."""
    found = {
        path: photo.thumb
        for path in paths
        if (photo := files.photos.get(path)) and photo.thumb is not None
    }
    if not found:
        return {}
    pixels = np.stack(list(found.values())).astype(np.float32)
    shows = pixels.std(axis=(1, 2)) > 6
    pairs = zip(found, pixels, shows, strict=True)
    return {path: thumb for path, thumb, clear in pairs if clear}


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Add up each 2 x 2 pixels."""
    rows = pixels[..., ::2, :] + pixels[..., 1::2, :]
    return np.asarray(rows[..., ::2] + rows[..., 1::2])


def _normed(pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(len(pixels), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare thumbnails, apart from brightness and contrast."""
    gain = (one - one.mean()).ravel() @ (other - other.mean()).ravel()
    gain /= ((other - other.mean()) ** 2).sum()
    rest = one - one.mean() - gain * (other - other.mean())
    return bool(np.abs(rest).max() < 12 and 0.5 < gain < 2)
