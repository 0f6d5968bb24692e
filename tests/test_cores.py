"""How many cores a process may use, by its CPU affinity and its cgroups, and what they can do."""

import os
import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from sdbatch.cores import cores, have_bfloat16

MACHINE = 64  # cores
MOUNT = Path("/sys/fs/cgroup")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return a function that writes /proc and /sys of a machine of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(MACHINE)))

    def write(own_cgroups, files):
        files = {"proc/self/cgroup": own_cgroups} | {
            f"sys/fs/cgroup/{name}": text for name, text in files.items()
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("200000 100000", 2),  # docker run --cpus 2
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1000 1000000", 1),
        ("25000 10000", 3),
        ("9900000 100000", MACHINE),
        ("max 100000", MACHINE),
    ],
)
def test_a_quota_is_rounded_up_and_limits_the_cores(system, cpu_max, expected):
    assert cores(system("0::/", {"cpu.max": cpu_max})) == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000", 2), ("150000", 2), ("50000", 1), ("-1", MACHINE)]
)
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_a_quota_of_cgroups_version_1_limits_the_cores(system, controllers, quota, expected):
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}
    own = f"9:cpuset:/\n4:{controllers}:/\n1:name=systemd:/\n0::/"
    assert cores(system(own, files)) == expected


@pytest.mark.parametrize(
    ("inner", "middle", "outer", "expected"),
    [
        ("max", "300000", "800000", 3),
        ("200000", "max", "800000", 2),
        ("500000", "max", "100000", 1),
    ],
)
def test_the_lowest_quota_of_nested_cgroups_limits_the_cores(
    system, inner, middle, outer, expected
):
    slices = ("user.slice", "user.slice/user-7.slice", "user.slice/user-7.slice/run.scope")
    quotas = zip(slices, (outer, middle, inner), strict=True)
    files = {f"{path}/cpu.max": f"{quota} 100000" for path, quota in quotas}
    files["other.slice/cpu.max"] = "100000 100000"
    assert cores(system(f"0::/{slices[-1]}", files)) == expected


@pytest.mark.parametrize(
    ("own", "folder"), [("4:cpu,cpuacct:/docker/0a1b", "cpu"), ("0::/docker/0a1b", ".")]
)
def test_a_container_that_has_the_path_of_its_host_finds_its_quota_at_the_mount(
    system, own, folder
):
    files = {
        "cpu": {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
        ".": {"cpu.max": "400000 100000"},
    }[folder]
    assert cores(system(own, files)) == 4


@pytest.mark.parametrize("own", ["0::/", "0::/a/b", "4:memory:/a", ""])
def test_without_a_quota_all_cores_of_the_affinity_count(system, own):
    assert cores(system(own, {})) == MACHINE


def test_fewer_cores_than_the_quota_allows_count(system, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert cores(system("0::/", {"cpu.max": "800000 100000"})) == 2


def test_a_system_without_cgroups_and_affinity_has_the_cores_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores(tmp_path) == 8


@pytest.fixture
def cgroup():
    """Create a cgroup with a quota of one core, and one without a quota in it; return both."""
    version_1 = (MOUNT / "cpu" / "cpu.cfs_quota_us").exists()
    outer = (MOUNT / "cpu" if version_1 else MOUNT) / f"sdbatch-{uuid.uuid4().hex}"
    inner = outer / "inner"
    with ExitStack() as remove:
        try:
            for folder in (outer, inner):
                folder.mkdir()
                remove.callback(folder.rmdir)
            quota = {"cpu.cfs_quota_us": "100000"} if version_1 else {"cpu.max": "100000 100000"}
            for name, text in quota.items():
                (outer / name).write_text(text)
        except OSError as error:
            pytest.skip(f"no cgroup with a quota can be created here: {error}")
        yield inner


def test_a_process_in_a_real_cgroup_has_the_cores_of_its_quota(cgroup):
    code = "import sys, os; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    code += "from sdbatch.cores import cores; print(cores())"
    command = [sys.executable, "-c", code, str(cgroup / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 clzero\n", True),
        ("model name\t: avx512_bf16\nflags\t\t: fpu sse2 avx512f avx512_bf16x\n", False),
        ("flags\t\t: fpu sse2 avx2\n", False),
        ("Features\t: fp asimd bf16\n", False),  # ARM: not measured
        ("", False),
    ],
)
def test_cores_with_avx512_bf16_have_bfloat16(tmp_path, lines, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"processor\t: 0\n{lines}\nprocessor\t: 1\n")
    assert have_bfloat16(tmp_path) is expected


def test_a_system_without_proc_has_no_bfloat16(tmp_path):
    assert have_bfloat16(tmp_path) is False
