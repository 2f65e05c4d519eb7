"""Look at all images, in one process or in several."""

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import torch

from mmkd.errors import MMKDError

from .detector import Detector, build_detector
from .journal import Journal, line_of
from .source import Item, Source

AT_ONCE = 8
"""As many images are read and handed over together."""
Tell = Callable[[int], None]
"""Takes the number of images that are done."""


def label_all(
    source: Source,
    items: Sequence[Item],
    journal: Journal,
    detector: Detector,
    score_thr: float,
    tell: Tell,
) -> None:
    """Look at images in this process, and write down what is found.

    Args:
        source: Where they are.
        items: Those that are left to do.
        journal: Takes what is found.
        detector: What looks at them.
        score_thr: Boxes of a lower score are left out.
        tell: Is told as images are done.
    """
    with journal.open(0) as file:
        _label(source, items, file, detector, score_thr, tell)


def label_together(
    source: Source,
    items: Sequence[Item],
    journal: Journal,
    options: Mapping[str, Any],
    texts: Sequence[str],
    score_thr: float,
    jobs: int,
    tell: Tell,
) -> None:
    """Look at images in several processes, each with its own detector.

    Args:
        source: Where they are.
        items: Those that are left to do.
        journal: Takes what is found.
        options: What the detector is built from.
        texts: Its classes, if it is told them.
        score_thr: Boxes of a lower score are left out.
        jobs: The number of processes.
        tell: Is told as images are done.

    Raises:
        MMKDError: The first error of a process. What the others have found
            by then is kept.
    """
    spawning = multiprocessing.get_context('spawn')
    news: Any = spawning.Queue()
    threads = max((os.cpu_count() or 1) // jobs, 1)
    workers = [
        spawning.Process(
            target=_work,
            args=(
                *(number, source, items[number::jobs], journal),
                *(options, texts, score_thr, threads, news),
            ),
            daemon=True,
        )
        for number in range(jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        _listen(workers, news, tell)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _listen(workers: Sequence[Any], news: Any, tell: Tell) -> None:
    """Wait until all processes have ended well."""
    running = len(workers)
    while running:
        try:
            message = news.get(timeout=1)
        except queue.Empty:
            dead = [w for w in workers if w.exitcode]
            if dead:
                raise MMKDError(
                    f'a process of mmkd label has ended with the status '
                    f'{dead[0].exitcode}; the system may have run out of '
                    'memory. What was found is kept: give the same command, '
                    'with fewer --jobs.'
                ) from None
            continue
        if isinstance(message, MMKDError):
            raise message
        if message is None:
            running -= 1
        else:
            tell(message)


def _work(
    number: int,
    source: Source,
    items: Sequence[Item],
    journal: Journal,
    options: Mapping[str, Any],
    texts: Sequence[str],
    score_thr: float,
    threads: int,
    news: Any,
) -> None:
    torch.set_num_threads(threads)
    try:
        detector = build_detector(options, texts)
        with journal.open(number) as file:
            _label(source, items, file, detector, score_thr, news.put)
        news.put(None)
    except MMKDError as error:
        news.put(type(error)(str(error)))
    except KeyboardInterrupt:
        pass  # the parent says it


def _label(
    source: Source,
    items: Sequence[Item],
    file: TextIO,
    detector: Detector,
    score_thr: float,
    tell: Tell,
) -> None:
    chunk: list[tuple[Item, Any]] = []

    def finish() -> None:
        found = detector.detect(
            [image for _, image in chunk],
            [f'{item.path} ({item.name})' for item, _ in chunk],
        )
        for (item, image), each in zip(chunk, found, strict=True):
            if each is not None:
                each = each.at(each.scores >= score_thr)
            file.write(json.dumps(line_of(item.id, image, each)) + '\n')
        file.flush()
        tell(len(chunk))
        chunk.clear()

    for item, image, fault in source.read(items):
        if image is None:
            file.write(json.dumps(dict(id=item.id, fault=fault)) + '\n')
            tell(1)
            continue
        chunk.append((item, image))
        if len(chunk) == AT_ONCE:
            finish()
    if chunk:
        finish()
