"""Whatever keeps the kernels from being compiled, kept or loaded: another folder, another instruction set, or one line.

The compiler is a script that hands out a library compiled before, so that each case takes milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bucketserve.engine.loader import LoadSettings, load_engine
from bucketserve.engine.native import build, compiler, library
from bucketserve.engine.native.compiler import KernelBuildError, library_name
from bucketserve.engine.native.instruction_sets import ALL, supported
from tests.kernel_paths import INSTRUCTION_SETS

pytestmark = pytest.mark.engine
BEST = ALL[supported()[0]]


@dataclass
class Place:
    """Three folders, a compiler, and what was said."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    prebuilt: Path
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.named, self.cache, self.temporary = (self.root / name for name in ("named", "cache", "temporary"))
        self.temporary.mkdir()
        self.calls = self.root / "calls"
        self.compiler(f'echo "$@" >> {self.calls}; cp {self.prebuilt} "$out"')
        self.monkeypatch.setenv("BUCKETSERVE_CACHE", str(self.named))
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.cache))
        self.monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))

    def compiler(self, script: str) -> None:
        path = self.root / "compiler"
        path.write_text(f'#!/bin/sh\nfor word; do [ "$before" = -o ] && out=$word; before=$word; done\n{script}\n')
        path.chmod(0o755)
        self.monkeypatch.setenv("CXX", str(path))

    @property
    def num_compiled(self) -> int:
        return self.calls.read_text().count("-c ") if self.calls.exists() else 0

    @property
    def entry(self) -> Path:
        return self.named / library_name(BEST)

    def load(self) -> Path:
        """Loads, checks that what came works, and returns the folder that it is from."""
        loaded = library.load_library(on_progress=self.told.append)
        assert loaded.bs_vector_floats() in (8, 16)
        return Path(loaded._name).parent

    def give_away(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 4242, -1)
        else:
            self.monkeypatch.setattr(library.os, "geteuid", lambda: 4242)


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prebuilt") / "library"
    path.write_bytes(Path(library.load_library()._name).read_bytes()[: -library.DIGEST_BYTES])
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prebuilt: Path) -> Place:
    return Place(tmp_path, monkeypatch, prebuilt)


def test_compiled_once_and_found_again_without_a_compiler(place: Place) -> None:
    assert place.load() == place.named
    place.monkeypatch.setenv("CXX", "no-such-compiler")
    assert place.load() == place.named
    assert place.num_compiled == len(place.told) == 1
    assert sorted(path.name for path in place.named.iterdir()) == [library_name(BEST), "lock"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("c++: error: unrecognized command-line option '-mavx512vnni'", "does not know -mavx512vnni"),
        ("c++: error: unknown argument: '-mavx512vnni'", "does not know -mavx512vnni"),
        ("kernels.s:7: Error: no such instruction: `vpdpwssd %zmm0'", "does not know some instructions"),
    ],
)
def test_a_compiler_that_does_not_know_the_best_instructions_compiles_for_others(
    place: Place, said: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.monkeypatch.setattr(library, "supported", lambda: ("avx512bf16", "avx512vnni", "baseline"))
    (place.root / "said").write_text(said)
    place.compiler(
        f"""case "$*" in *-mavx512vnni*) cat {place.root}/said >&2; exit 1;; esac
        cp {place.prebuilt} "$out\""""
    )
    assert place.load() == place.named
    assert (place.named / library_name(ALL["baseline"])).exists()
    assert sum(told in line for line in place.told) == 1
    # Ahead, likewise; who asks for that very set is told.
    place.monkeypatch.setattr(library, "supported", lambda: ())
    assert build.main(["--into", str(place.cache)]) == 0
    assert {path.name for path in place.cache.glob("*.so")} == {
        library_name(ALL[name]) for name in ("avx512", "avx2", "baseline")
    }
    assert build.main(["--into", str(place.cache), "--for", "avx512vnni"]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[:9999] + bytes([whole[9999] ^ 1]) + whole[10000:],
        lambda whole: b"not a library" * 100,
    ],
    ids=["empty", "headers only", "half", "a byte short", "a bit flipped", "text"],
)
def test_a_damaged_entry_is_rebuilt(place: Place, damage: Callable[[bytes], bytes]) -> None:
    place.load()
    whole = place.entry.read_bytes()
    # Another file: this process has the first one mapped.
    place.entry.unlink()
    place.entry.write_bytes(damage(whole))
    place.told.clear()
    assert place.load() == place.named
    assert place.num_compiled == 2
    assert sum("damaged" in line for line in place.told) == 1
    place.told.clear()
    assert place.load() == place.named
    assert (place.num_compiled, place.told) == (2, [])


def full(place: Place) -> None:
    plain = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        values = list(plain(path))
        if Path(path) == place.named:
            values[4] = 3
        return os.statvfs_result(values)

    place.monkeypatch.setattr(library.os, "statvfs", statvfs)


def noexec(place: Place) -> None:
    plain = os.statvfs

    def statvfs(path: Path) -> os.statvfs_result:
        values = list(plain(path))
        if Path(path) == place.named:
            values[8] |= os.ST_NOEXEC
        return os.statvfs_result(values)

    place.monkeypatch.setattr(library.os, "statvfs", statvfs)


def not_mapped(place: Place) -> None:
    """What noexec, SELinux, a libgomp that is missing or one of another kind look like."""
    plain = ctypes.CDLL

    def load(path: str) -> ctypes.CDLL:
        if Path(path).parent == place.named:
            raise OSError(f"{path}: failed to map segment from shared object")
        return plain(path)

    place.monkeypatch.setattr(library.ctypes, "CDLL", load)


def full_while_written(place: Place) -> None:
    tries = []

    def fsync(file: int) -> None:
        tries.append(file)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.monkeypatch.setattr(library.os, "fsync", fsync)


def full_while_compiled(place: Place) -> None:
    place.compiler(
        f'case "$out" in {place.named}/*) echo "fatal error: x.s: No space left on device" >&2; exit 1;; esac\n'
        f'cp {place.prebuilt} "$out"'
    )


def foreign(place: Place) -> None:
    place.named.mkdir()
    place.give_away(place.named)


def a_file(place: Place) -> None:
    place.named.write_text("")


def below_a_device(place: Place) -> None:
    place.monkeypatch.setenv("BUCKETSERVE_CACHE", "/dev/null/kernels")


def read_only(place: Place) -> None:
    place.monkeypatch.setenv("BUCKETSERVE_CACHE", "/proc/1/kernels")


def entry_is_a_folder(place: Place) -> None:
    (place.entry / "something").mkdir(parents=True)
    place.named.chmod(0o700)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (full, "no space left"),
        (noexec, "noexec"),
        (not_mapped, "failed to map"),
        (full_while_written, "No space left"),
        (full_while_compiled, "No space left"),
        (foreign, "belongs to user"),
        (a_file, "File exists"),
        (below_a_device, "Not a directory"),
        (read_only, "No such file"),
        (entry_is_a_folder, "directory"),
    ],
)
def test_a_folder_that_will_not_do_is_passed_over_and_named_once(
    place: Place, fault: Callable[[Place], None], cause: str
) -> None:
    fault(place)
    used = place.load()
    assert used in (place.named / f"bucketserve-{os.geteuid()}", place.cache / "bucketserve")
    assert place.num_compiled <= 1
    said = [line for line in place.told if cause in line]
    assert len(said) == 1
    assert str(used) in said[0]
    assert "\n" not in said[0]


def test_on_a_volume_that_everybody_may_write_to_it_is_a_folder_of_ones_own(place: Place) -> None:
    place.named.mkdir()
    place.named.chmod(0o777)
    shutil.copy(place.prebuilt, place.entry)
    assert place.load() == place.named / f"bucketserve-{os.geteuid()}"


def test_an_entry_of_somebody_else_is_not_loaded(place: Place) -> None:
    place.load()
    if os.geteuid():
        pytest.skip("only root can give a file away")
    place.give_away(place.entry)
    place.told.clear()
    # Replaced: the folder is ours.
    assert place.load() == place.named
    assert place.entry.stat().st_uid == 0
    assert "belongs to user 4242" in place.told[-1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EIO, errno.EACCES])
def test_without_locks_it_is_compiled_all_the_same(place: Place, number: int) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    place.monkeypatch.setattr(library.fcntl, "flock", flock)
    assert place.load() == place.named


def test_a_lock_that_is_never_let_go_is_waited_for_only_so_long(place: Place) -> None:
    place.named.mkdir(mode=0o700)
    place.monkeypatch.setattr(compiler, "TIMEOUT_S", 0.2)
    with (place.named / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert place.load() == place.named


def test_what_a_killed_compilation_left_is_removed(place: Place) -> None:
    left, theirs = place.named / f"{library.SCRATCH}x", place.named / f"{library.SCRATCH}y"
    for folder in (left, theirs):
        folder.mkdir(parents=True)
    place.named.chmod(0o700)
    age(left, compiler.TIMEOUT_S)
    place.load()
    # Who compiles without a lock is at it still.
    assert list(place.named.glob(f"{library.SCRATCH}*")) == [theirs]


def age(path: Path, seconds: float) -> None:
    then_s = time.time() - seconds - 10
    os.utime(path, (then_s, then_s))


def test_libraries_of_former_sources_are_removed_once_nobody_is_likely_to_want_them(place: Place) -> None:
    place.named.mkdir(mode=0o700)
    kept = {f"kernels-{BEST.name}-new.so": 60.0, "kernels-other-old.so": library.OLD_S}
    ages = {f"kernels-{BEST.name}-old.so": library.OLD_S, **kept}
    for name, seconds in ages.items():
        (place.named / name).write_bytes(b"")
        age(place.named / name, seconds)
    place.load()
    assert {path.name for path in place.named.glob("*.so")} == {place.entry.name, *kept}


def test_a_worker_that_starts_leaves_alone_what_is_being_built_ahead(place: Place) -> None:
    place.compiler(f'echo "$@" >> {place.calls}; sleep 0.3; cp {place.prebuilt} "$out"')
    place.named.mkdir(mode=0o700)
    building = threading.Thread(target=library.build_into, args=(place.named, BEST))
    building.start()
    while not list(place.named.glob(f"{library.SCRATCH}*")):
        time.sleep(0.01)
    # As if it had taken very long.
    age(next(place.named.glob(f"{library.SCRATCH}*")), compiler.TIMEOUT_S)
    assert place.load() == place.named
    building.join()
    assert place.num_compiled == 1


COMPILERS = {
    "fails": ("echo 'In file x:\nx.cpp:1:2: error: unknown\n  note: y' >&2; exit 1", "x.cpp:1:2: error: unknown"),
    "says nothing": ("exit 3", "exit status 3"),
    "is killed": ("kill -9 $$", "killed by signal 9"),
    # Its own child keeps the output open.
    "hangs": ("sleep 60 & sleep 60", "did not end within"),
    "writes nothing": ("exit 0", "wrote nothing"),
    "says what is no text": ("printf '\\377 error' >&2; exit 1", "error"),
}


@pytest.mark.parametrize(("script", "cause"), COMPILERS.values(), ids=COMPILERS)
def test_a_compiler_that_fails_is_tried_once_and_said_in_one_line(place: Place, script: str, cause: str) -> None:
    place.monkeypatch.setattr(compiler, "TIMEOUT_S", 0.3)
    place.compiler(f"echo tried >> {place.calls}\n{script}")
    with pytest.raises(KernelBuildError, match=cause) as caught:
        place.load()
    assert "\n" not in str(caught.value)
    assert place.calls.read_text().count("tried") <= 2
    assert [path.name for path in place.named.iterdir()] == ["lock"]


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(500), b"text"])
def test_a_compiler_that_writes_rubbish_is_found_out(place: Place, content: bytes) -> None:
    (place.root / "rubbish").write_bytes(content)
    place.compiler(f'cp {place.root / "rubbish"} "$out"')
    with pytest.raises(KernelBuildError) as caught:
        place.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["no-such-compiler", "/dev/null", "/"])
def test_without_a_compiler_torch_serves_and_says_why_once(place: Place, named: str) -> None:
    place.monkeypatch.setenv("CXX", named)
    under_test = load_engine(LoadSettings(model="models/demo/model", kv_budget_tokens=1000), place.told.append)
    under_test.close()
    said = [line for line in place.told if "serving without CPU kernels" in line]
    assert len(said) == 1
    assert "g++" in said[0]


def test_neither_home_nor_name_nor_any_folder(place: Place) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for name in ("BUCKETSERVE_CACHE", "XDG_CACHE_HOME", "HOME"):
        place.monkeypatch.delenv(name, raising=False)
    place.monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert place.load() == place.temporary / f"bucketserve-{os.geteuid()}"

    def no_folder() -> str:
        raise FileNotFoundError("no usable temporary directory")

    place.monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    with pytest.raises(KernelBuildError, match="BUCKETSERVE_CACHE"):
        place.load()


def test_a_lesser_instruction_set_that_is_ready_is_better_than_none(place: Place) -> None:
    if len(supported()) < 2:
        pytest.skip("this processor has only one instruction set")
    place.load()
    place.entry.rename(place.named / library_name(ALL["baseline"]))
    place.monkeypatch.setenv("CXX", "no-such-compiler")
    place.told.clear()
    assert place.load() == place.named
    assert len(place.told) == 1
    assert "no C++ compiler" in place.told[0]


def test_ready_kernels_on_a_read_only_noexec_free_image_need_nothing_else(place: Place) -> None:
    """As in an image: filled by root, and the worker may write nowhere."""
    assert build.main(["--into", str(place.named)]) == 0
    assert {path.name for path in place.named.iterdir()} == {"lock", *(library_name(one) for one in ALL.values())}
    assert {path.stat().st_mode & 0o777 for path in place.named.glob("*.so")} == {0o644}
    place.monkeypatch.setenv("CXX", "no-such-compiler")
    place.monkeypatch.setattr(library, "_check_usable", lambda folder: pytest.fail("nothing may be written"))
    assert place.load() == place.named
    assert place.told == []


def test_building_ahead_fails_where_it_can_not_be_done(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main(["--into", str(place.named)]) == 1
    assert "no C++ compiler (no-such-compiler)" in capsys.readouterr().err
    assert build.main(["--into", "/dev/null/x"]) == 1
    with pytest.raises(SystemExit, match="2"):
        build.main(["--for", "avx2"])
    # For a machine of one's own it is no failure: workers do without.
    assert build.main([]) == 0
    assert "without their kernels" in capsys.readouterr().err


LOAD = """
import sys
from bucketserve.engine.native import library
if len(sys.argv) > 1:
    def flock(file, operation):
        raise OSError(38, "Function not implemented")
    library.fcntl.flock = flock
print(library.load_library(on_progress=print)._name)
"""


@pytest.mark.parametrize("more", [[], ["without locks"]])
def test_processes_that_start_together(place: Place, more: list[str]) -> None:
    place.compiler(f'echo "$@" >> {place.calls}; sleep 0.3; cp {place.prebuilt} "$out"')
    environment = {**os.environ, "TMPDIR": str(place.temporary)}
    command = [sys.executable, "-c", LOAD, *more]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [lines[-1] for lines in outputs] == [str(place.entry)] * 2
    if not more:
        assert place.num_compiled == 1


def test_on_a_filesystem_without_execution_as_a_user_without_a_name(place: Place) -> None:
    """The real thing: a noexec mount, a user id that nobody knows, no home."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount and to become somebody else")
    for folder in (place.root, *place.root.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    place.named.mkdir()
    place.temporary.chmod(0o1777)
    script = f"""
        mount -t tmpfs -o noexec,mode=1777 tmpfs {place.named}
        exec setpriv --reuid 54321 --regid 54321 --clear-groups {sys.executable} -c "$PROGRAM"
    """
    environment = {
        "PATH": os.environ["PATH"],
        "PROGRAM": LOAD,
        "CXX": os.environ["CXX"],
        "BUCKETSERVE_CACHE": str(place.named),
        "TMPDIR": str(place.temporary),
    }
    place.compiler(f'cp {place.prebuilt} "$out"')
    place.prebuilt.parent.chmod(0o755)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert Path(lines[-1]).parent == place.temporary / "bucketserve-54321"
    assert sum("noexec" in line for line in lines) == 1


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_is_chosen_by_name(name: str) -> None:
    assert f"kernels-{name}-" in library.load_library(name)._name
