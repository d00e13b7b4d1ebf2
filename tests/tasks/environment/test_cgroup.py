"""What a container may use is read of its control group, in both versions."""

from pathlib import Path

import pytest

from foldstack.tasks.environment import cgroup, execution

MIB = 1 << 20


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "fs").mkdir()
    return tmp_path / "fs"


def join(group: Path, *lines: str) -> None:
    (group.parent / "membership").write_text("".join(f"{line}\n" for line in lines))


def test_version_2_of_the_group_and_those_above(group: Path) -> None:
    join(group, "0::/pod/container")
    write(
        group,
        {
            "pod/container/memory.max": "max",
            "pod/container/memory.current": 100 * MIB,
            "pod/container/cpu.max": "250000 100000",
            "pod/memory.max": 512 * MIB,
            "pod/memory.current": 200 * MIB,
            "pod/memory.stat": f"anon 1\ninactive_file {40 * MIB}",
            "pod/cpu.max": "max 100000",
        },
    )
    assert cgroup.memory_left() == 352 * MIB
    assert cgroup.processors() == 2.5
    assert execution.cores() <= 2


def test_version_2_as_a_container_sees_it(group: Path) -> None:
    join(group, "0::/kubepods/what/the/host/calls/it")
    write(group, {"memory.max": 64 * MIB, "memory.current": 80 * MIB, "cpu.max": "50000 100000"})
    assert cgroup.memory_left() == 0
    assert cgroup.processors() == 0.5
    assert execution.cores() == 1


def test_version_1(group: Path) -> None:
    join(group, "5:cpu,cpuacct:/a", "3:memory:/a", "1:name=systemd:/")
    write(
        group,
        {
            "memory/a/memory.limit_in_bytes": 300 * MIB,
            "memory/a/memory.usage_in_bytes": 100 * MIB,
            "memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,
            "memory/memory.usage_in_bytes": 900 * MIB,
            "cpu,cpuacct/a/cpu.cfs_quota_us": 400_000,
            "cpu,cpuacct/a/cpu.cfs_period_us": 100_000,
            "cpu,cpuacct/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/cpu.cfs_period_us": 100_000,
        },
    )
    assert cgroup.memory_left() == 200 * MIB
    assert cgroup.processors() == 4


def test_no_limit_and_no_groups(group: Path) -> None:
    assert cgroup.memory_left() is None
    assert cgroup.processors() is None
    join(group, "0::/")
    write(group, {"memory.max": "max", "memory.current": 1, "cpu.max": "max 100000"})
    assert cgroup.memory_left() is None
    assert cgroup.processors() is None


def test_what_a_run_may_take_is_what_the_container_has_left(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foldstack.flows.planning import needs

    join(group, "0::/")
    write(group, {"memory.max": 3 * MIB, "memory.current": MIB, "memory.stat": "anon 1"})
    monkeypatch.setattr(needs, "MEMORY_FILE", group / "meminfo")
    write(group, {"meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB"})
    assert needs.available_memory("cpu") == 2 * MIB
