"""Look through folders: images, splits, and files of a name."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.jfif')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
ARCHIVES = ('.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz', '.7z', '.rar')
ALIASES = {
    'train': 'train', 'training': 'train', 'trainval': 'train',
    'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val',
    'test': 'test', 'testing': 'test',
}  # fmt: skip
"""What folders and files of a split are called."""
WORD = re.compile(rf'(?<![a-z])({"|".join(ALIASES)})(?![a-z])')
UPLOADED = re.compile(r'^[0-9a-f]{8}-')
"""What Label Studio puts before the names of files."""
MOST = 1_000_000
"""So many files are looked through at most."""


def walk(root: Path, most: int = MOST) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders below a folder with their files, in order.

    Hidden ones and those that archives of a Mac have beside the data are left
    out. Links are followed, each folder once.
    """
    seen, count = set(), 0
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not is_hidden(f))
        files = sorted(f for f in files if not is_hidden(f))
        yield Path(place), files
        count += len(files) + len(folders)
        if count > most:
            return


def is_hidden(name: str) -> bool:
    return name.startswith('.') or name == '__MACOSX'


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return suffix_of(name) in IMAGES


def images_below(root: Path) -> list[Path]:
    return [
        p / name for p, files in walk(root) for name in files if is_image(name)
    ]


def folders_in(root: Path) -> list[Path]:
    """The folders directly below a folder."""
    return sorted(
        p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)
    )


def files_in(root: Path, *suffixes: str) -> list[Path]:
    """The files of these kinds in a folder, and in those directly below."""
    return [
        path
        for folder in (root, *folders_in(root))
        for name in sorted(os.listdir(folder))
        if suffix_of(name) in suffixes and not is_hidden(name)
        if (path := folder / name).is_file()
    ]


def split_of(path: Path, root: Path) -> str:
    """The split that folders below the root, or the file's name, stand for.

    Example:
        >>> from pathlib import Path
        >>> from mmkd.data.layouts.listing import split_of
        >>> split_of(Path('x/valid/_annotations.coco.json'), Path('x'))
        'val'
        >>> split_of(Path('x/annotations/instances_train2017.json'), Path('x'))
        'train'
        >>> split_of(Path('x/annotations.json'), Path('x'))
        ''
    """
    found = WORD.findall(path.stem.lower())
    return ALIASES[found[-1]] if found else split_of_folder(path, root)


def split_of_folder(path: Path, root: Path) -> str:
    """The split that a folder between the root and a file stands for."""
    for part in reversed(path.relative_to(root).parts[:-1]):
        if (name := part.lower()) in ALIASES:
            return ALIASES[name]
        # as COCO's train2017
        if (name := name.rstrip('0123456789_-')) in ALIASES:
            return ALIASES[name]
    return ''


def with_validation(splits: list[str]) -> dict[str, str]:
    """Which split each one stands for: the test validates if nothing else."""
    if 'train' in splits and 'test' in splits and 'val' not in splits:
        return {'train': 'train', 'test': 'val', '': ''}
    return {split: split for split in splits}


class Lookup:
    """Finds files by the ends of the paths that other machines gave them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str, near: Path | None = None) -> Path | None:
        """The image of a name, or of the end of a path.

        Where several files end alike, the one in (or below) the folder
        ``near`` is taken.
        """
        name = name.strip().replace('\\', '/')
        name = name.rpartition('?d=')[2]  # Label Studio's local files
        for text in dict.fromkeys((name, unquote(name))):
            path = PurePosixPath(text)
            for base in (path.name, UPLOADED.sub('', path.name)):
                if base and (found := self._best(path.with_name(base), near)):
                    return found
        return None

    def _best(self, path: PurePosixPath, near: Path | None) -> Path | None:
        files = self._named(path.name)
        if len(files) < 2:
            return files[0] if files else None
        wanted = path.parts[::-1]

        def alike(file: Path) -> tuple[int, bool]:
            count = 0
            for ours, theirs in zip(file.parts[::-1], wanted, strict=False):
                if ours != theirs:
                    break
                count += 1
            return count, near is not None and near in file.parents

        ranks = {file: alike(file) for file in files}
        best = max(ranks.values())
        first = [file for file, rank in ranks.items() if rank == best]
        return first[0] if len(first) == 1 else None

    def _named(self, name: str) -> list[Path]:
        if self._by_name is None:
            self._by_name = {}
            for path in images_below(self.root):
                for key in dict.fromkeys((path.name, path.stem)):
                    self._by_name.setdefault(key, []).append(path)
        return self._by_name.get(name, [])


def census(root: Path) -> Counter[str]:
    """Count the files below a folder by their suffix."""
    return Counter(
        suffix_of(name) or 'without a suffix'
        for _, files in walk(root, 100_000)
        for name in files
    )
