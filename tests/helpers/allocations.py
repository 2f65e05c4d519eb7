"""What the CPU's allocator is asked for while a function runs."""

import torch


def peak(function):
    """The largest number of bytes that a function allocates at a time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True
    ) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == '[memory]']
    now = most = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
