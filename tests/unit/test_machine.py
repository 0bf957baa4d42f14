"""Limits of control groups of both versions, nested and hidden, and of affinity."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bucketserve.core.errors import ModelLoadError
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.machine import Memory, memory, num_cpus

DEMO = "models/demo/model"
MIB = 2**20
V2 = "1 0 0:1 {root} /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "1 0 0:1 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "2 0 0:2 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "3 0 0:3 / / rw - overlay overlay rw\n"
)
MEMINFO = f"MemTotal: {16 * 1024 * 1024} kB\nMemFree: 100 kB\nMemAvailable: {8 * 1024 * 1024} kB\nHugePages_Total: 0\n"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def tree(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": MEMINFO, "proc/self/status": "Name: x\nRssFile: 0 kB\n"} | files
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v2(path: str = "/", mounted: str = "/") -> dict[str, str]:
    return {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": V2.format(root=mounted)}


def v1(path: str = "/", mounted: str = "/") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n0::/\n",
        "proc/self/mountinfo": V1.format(root=mounted),
    }


def at(folder: str, **files: object) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/{name.replace('__', '.')}": f"{content}\n" for name, content in files.items()}


CPUS = {
    "none": ({}, 8),
    "v2 max": (v2() | at("", cpu__max="max 100000"), 8),
    "v2 half a CPU": (v2() | at("", cpu__max="50000 100000"), 1),
    "v2 two and a half": (v2() | at("", cpu__max="250000 100000"), 2),
    "v2 more than the affinity": (v2() | at("", cpu__max="3200000 100000"), 8),
    "v2 nested, the parent is stricter": (
        v2("/a/b") | at("a", cpu__max="300000 100000") | at("a/b", cpu__max="600000 100000"),
        3,
    ),
    "v2 nested, unlimited inside": (
        v2("/a/b") | at("a", cpu__max="200000 50000") | at("a/b", cpu__max="max 100000"),
        4,
    ),
    "v2 of another namespace": (v2("/../../other") | at("", cpu__max="200000 100000"), 2),
    "v2 of the host": (v2("/docker/x", "/docker/x") | at("", cpu__max="200000 100000"), 2),
    "v1 none": (v1() | at("cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000), 8),
    "v1 half": (v1() | at("cpu,cpuacct", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000), 1),
    "v1 of the host, not to be seen": (
        v1("/docker/x") | at("cpu,cpuacct", cpu__cfs_quota_us=300000, cpu__cfs_period_us=100000),
        3,
    ),
    "rubbish": (v2() | at("", cpu__max="what is this"), 8),
    "a period of zero": (v2() | at("", cpu__max="5 0"), 8),
}


@pytest.mark.parametrize(("files", "wanted"), CPUS.values(), ids=CPUS)
def test_cpus(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    assert num_cpus(tree(tmp_path, files)) == wanted


def test_affinity_binds_more_than_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert num_cpus(tree(tmp_path, v2() | at("", cpu__max="400000 100000"))) == 1


GIB = 2**30
STAT = "anon 1\ninactive_file {0}\nactive_file {0}\n"
STAT_V1 = "cache 5\ninactive_file 7\ntotal_inactive_file {0}\ntotal_active_file {0}\nhierarchical_memory_limit {1}\n"
MEMORY = {
    "the machine's": ({}, 16 * GIB, 8 * GIB),
    "v2 max": (v2() | at("", memory__max="max", memory__current=3 * GIB, memory__stat=""), 16 * GIB, 8 * GIB),
    "v2 800 MiB": (
        v2() | at("", memory__max=800 * MIB, memory__current=300 * MIB, memory__stat=STAT.format(50 * MIB)),
        800 * MIB,
        600 * MIB,
    ),
    "v2 soft limit": (
        v2() | at("", memory__max="max", memory__high=GIB, memory__current=GIB // 2, memory__stat=""),
        GIB,
        GIB // 2,
    ),
    "v2 nested, others in the parent": (
        v2("/pod/c")
        | at("pod", memory__max=2 * GIB, memory__current=2 * GIB - 100 * MIB, memory__stat="")
        | at("pod/c", memory__max=GIB, memory__current=10 * MIB, memory__stat=""),
        GIB,
        100 * MIB,
    ),
    "v2 over its limit": (v2() | at("", memory__max=GIB, memory__current=2 * GIB, memory__stat=""), GIB, 0),
    "v1 none": (
        v1()
        | at(
            "memory",
            memory__limit_in_bytes=9223372036854771712,
            memory__usage_in_bytes=GIB,
            memory__stat=STAT_V1.format(0, 9223372036854771712),
        ),
        16 * GIB,
        8 * GIB,
    ),
    "v1 800 MiB": (
        v1("/docker/x", "/docker/x")
        | at(
            "memory",
            memory__limit_in_bytes=800 * MIB,
            memory__usage_in_bytes=300 * MIB,
            memory__stat=STAT_V1.format(50 * MIB, 800 * MIB),
        ),
        800 * MIB,
        600 * MIB,
    ),
    "v1, the parent out of sight": (
        v1()
        | at(
            "memory",
            memory__limit_in_bytes=9223372036854771712,
            memory__usage_in_bytes=0,
            memory__stat=STAT_V1.format(0, GIB),
        ),
        GIB,
        GIB,
    ),
    "mapped files are needed": ({"proc/self/status": f"RssFile:\t{GIB // 1024} kB\n"}, 16 * GIB, 7 * GIB),
}


@pytest.mark.parametrize(("files", "total", "available"), MEMORY.values(), ids=MEMORY)
def test_memory(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    assert memory(tree(tmp_path, files)) == Memory(total, available)


def test_without_any_of_these_files(tmp_path: Path) -> None:
    assert num_cpus(tmp_path) == 8
    assert memory(tmp_path).total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def real_group(memory_bytes: int, cpu_us: int) -> Iterator[str]:
    """Yields a shell line that puts the shell into a group of its own."""
    base = Path("/sys/fs/cgroup")
    name = f"bucketserve-test-{uuid.uuid4().hex}"
    is_v2 = (base / "cgroup.controllers").exists()
    settings = (
        {"memory.max": memory_bytes, "cpu.max": f"{cpu_us} 100000"}
        if is_v2
        else {"memory/memory.limit_in_bytes": memory_bytes, "cpu/cpu.cfs_quota_us": cpu_us}
    )
    folders = {base / name} if is_v2 else {base / part / name for part in ("memory", "cpu")}
    with contextlib.ExitStack() as stack:
        try:
            for folder in folders:
                folder.mkdir()
                stack.callback(folder.rmdir)
            for setting, value in settings.items():
                part, _, file = setting.rpartition("/")
                (base / part / name / file).write_text(str(value))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        yield "; ".join(f"echo $$ > {folder}/cgroup.procs" for folder in folders)


def test_in_a_real_control_group() -> None:
    program = (
        "import json; from bucketserve.machine import memory, num_cpus; m = memory();"
        "print(json.dumps([m.total, m.available, num_cpus()]))"
    )
    with real_group(300 * MIB, 50_000) as enter:
        command = ["sh", "-ec", f'{enter}; exec "$0" -c "$1"', sys.executable, program]
        total, available, cpus = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert (total, cpus) == (300 * MIB, 1)
    assert 200 * MIB < available < 300 * MIB


SERVE = """
import sys
from bucketserve.core.types import RequestId
from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.ports import SequenceSpec
import torch
engine = load_engine(LoadSettings(model="models/demo/model", kernels="torch"))
said = engine.headroom()
assert torch.get_num_threads() == 1, torch.get_num_threads()
assert said.device_total_bytes == int(sys.argv[1]), said
for i in range(2 * said.kv_total_tokens // 512 + 1):
    engine.add([SequenceSpec(request_id=RequestId(str(i)), token_ids=tuple([9 + i % 7] * 500), max_new_tokens=2)])
while engine.has_work():
    engine.step()
print(said.kv_total_tokens)
"""


@pytest.mark.engine
def test_an_engine_in_a_real_control_group_fills_its_kv_and_lives() -> None:
    with real_group(800 * MIB, 100_000) as enter:
        command = ["sh", "-ec", f'{enter}; exec "$0" -c "$1" "$2"', sys.executable, SERVE, str(800 * MIB)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000


@pytest.mark.engine
def test_a_kv_budget_that_can_not_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelLoadError, match=r"MiB of KV do not fit: [\d,]+ MiB are left") as caught:
        load_engine(
            LoadSettings(model="models/demo/model", kernels="torch", kv_budget_bytes=10**13, max_sequences=4096)
        )
    assert "\n" not in str(caught.value)


@pytest.mark.engine
def test_weights_that_can_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bucketserve.engine.loader.machine_memory", lambda: Memory(GIB, MIB))
    with pytest.raises(ModelLoadError, match=r"take [\d,]+ MiB, loaded in float32, and 1 MiB are left"):
        load_engine(LoadSettings(model=DEMO))
