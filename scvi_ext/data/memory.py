"""How much host memory is free: on the machine, and within the limits that a job has there."""

from __future__ import annotations

import os
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")  # lines such as "0::/system.slice/job" or "4:memory:/job"
_ROOT = Path("/sys/fs/cgroup")
# Of both versions of control groups: where the hierarchy of memory is, limit, use, and what of it is only remembered.
_VERSIONS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory() -> int:
    """Bytes of host memory that are free, within the limits of the job (control groups, of Slurm or a container)."""
    try:
        lines = _MACHINE.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: what is built in, as if half of it were free
        ask = getattr(os, "sysconf", None)  # Windows has none
        free = 4 * 10**9 if ask is None else ask("SC_PAGE_SIZE") * ask("SC_PHYS_PAGES") // 2
    return min([free, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group of this process leaves, and each that these are in; none where there is no limit."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        for kind in set(_VERSIONS) & set(controllers.split(",")):
            folder, *names = _VERSIONS[kind]
            root = _ROOT / folder
            group = root / own.lstrip("/")
            # Inside a container, the path may be that of the machine outside: then only the root is there.
            for place in [group, *group.parents]:
                if place.is_relative_to(root):
                    left += _left(place, *names)
    return left


def _left(group: Path, limit: str, used: str, remembered: str) -> list[int]:
    try:
        # What the system remembers of files counts as used, and is given back when memory is asked for.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        in_use = int((group / used).read_text()) - int(stat.get(remembered, 0))
        return [max(0, int((group / limit).read_text()) - in_use)]
    except (OSError, ValueError):  # there is no such group, or it has no limit ("max")
        return []
