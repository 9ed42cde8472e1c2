"""Where the time of one denoiser call goes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]


def operator_times(call: Call, *, device: str, top: int = 40) -> list[dict[str, Any]]:
    """Operators of one call by their own time, longest first: name, number of calls, milliseconds without the operators inside them.

    Recording costs some microseconds per operator, so that the sum exceeds an undisturbed call.
    """
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    call()
    with profile(activities=activities) as recorded:
        call()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [event for event in recorded.key_averages() if event.device_type == kind]
    micros = {id(event): event.self_device_time_total if cuda else event.self_cpu_time_total for event in events}
    events.sort(key=lambda event: -micros[id(event)])
    return [{"op": event.key, "calls": event.count, "self_ms": round(micros[id(event)] / 1e3, 3)} for event in events[:top]]
