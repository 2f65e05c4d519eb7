"""What the processes of a distributed run do together."""

from mmengine.dist import broadcast_object_list, is_main_process

from mmkd.errors import MMKDError


def raise_together(error: MMKDError | None) -> None:
    """Raise in all processes the error that the first one has, if any.

    All processes call this at the same point. Otherwise the first one would
    end alone, and the others would wait for it.

    Args:
        error: The error of the first process; that of others does not count.
    """
    found = [error]
    broadcast_object_list(found)
    first = error if is_main_process() else found[0]
    if first is not None:
        first.together = True
        raise first
