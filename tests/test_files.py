"""Files under attack: two runs at once, killed runs, full disks, links and devices."""

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_one_line
from folder_images import make_images

import create_input_files as preparation
from captioning import command_line
from captioning.data.features import ResumableRowWriter
from captioning.data.images import read_image
from captioning.data.prepared import open_dataset
from captioning.data.sidecars import Sidecars
from captioning.files import (
    LOCK_FILE,
    OutputFile,
    is_locked,
    lock_file_of,
    lock_folder,
    lock_output,
    open_regular,
    remove_unfinished,
)
from captioning.folders.plan import FolderOptions, Row, read_row
from captioning.training.optimization import Run
from create_input_files import RowWriter
from utils import (
    UserError,
    atomic_write,
    check_output,
    counted,
    readable_size,
    write_csv,
    write_json,
    write_table,
)

fcntl = pytest.importorskip("fcntl")


def start_python(code: str, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


HOLD = (
    "import sys, time; from captioning.files import lock_folder\n"
    "with lock_folder(sys.argv[1], reading=sys.argv[2] == 'reading'):\n"
    "    print('held', flush=True); time.sleep(float(sys.argv[3]))"
)


@pytest.mark.parametrize("first, second, refused", [
    ("writing", False, "another run is at work with it"),
    ("writing", True, "another run is writing to it"),
    ("reading", False, "another run is at work with it"),
    ("reading", True, None),
])  # fmt: skip
def test_a_folder_has_one_writer_or_many_readers(tmp_path, first, second, refused):
    holder = start_python(HOLD, tmp_path, first, 60)
    assert holder.stdout.readline() == "held\n"
    if refused:
        with pytest.raises(UserError, match=refused), lock_folder(tmp_path, reading=second):
            pass
    else:
        with lock_folder(tmp_path, reading=second):
            pass
    holder.kill()  # -9: the lock dies with it, whatever lies there
    holder.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_worker_that_outlives_its_training_holds_no_lock(tmp_path):
    fork = HOLD.replace("print(", "import os\n    if os.fork() == 0: time.sleep(20); os._exit(0)\n    print(")
    holder = start_python(fork, tmp_path, "writing", 60)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with lock_folder(tmp_path):
        pass


def test_locks_leave_no_folder_behind_and_see_a_removed_lock(tmp_path):
    with pytest.raises(UserError, match="no"), lock_folder(tmp_path / "new"):
        raise UserError("no")
    assert not (tmp_path / "new").exists()
    holders = [start_python(HOLD, tmp_path, "writing", 0.02) for _ in range(6)]  # some meet, some do not
    outcomes = [(holder.communicate()[0], holder.returncode) for holder in holders]
    assert ("held\n", 0) in outcomes and set(outcomes) <= {("held\n", 0), ("", 1)}
    assert not list(tmp_path.iterdir())


def test_an_output_has_one_run(tmp_path):
    output = tmp_path / "new" / "deeper" / "out.csv"
    code = HOLD.replace(
        "lock_folder(sys.argv[1], reading=sys.argv[2] == 'reading')", "lock_output(*sys.argv[1:3])"
    )
    holder = start_python(code.replace("lock_folder", "lock_output"), output, "taken", 60)
    assert holder.stdout.readline() == "held\n" and is_locked(lock_file_of(output))
    with pytest.raises(UserError, match="mine is taken"), lock_output(output, "mine is taken"):
        pass
    with lock_output(output.with_name("other.csv"), "taken"):
        assert not is_locked(lock_file_of(output.with_name("third.csv")))
    holder.kill()
    holder.communicate()
    assert lock_file_of(output).exists() and not is_locked(lock_file_of(output))
    with lock_output(output, "taken"):
        pass
    with lock_output(tmp_path / "a" / "b" / "out.csv", "taken"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(output.parent.iterdir()) and os.listdir(tmp_path) == ["new"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("captioning.files.fcntl.lockf", refuse)
    with lock_output(tmp_path / "out.csv", "taken"), lock_folder(tmp_path):
        pass
    assert capsys.readouterr().err.count("this file system has no locks") == 2 and not os.listdir(tmp_path)


def test_what_killed_runs_left_is_removed(tmp_path):
    dead = start_python("")
    dead.communicate()
    mine, theirs = tmp_path / f".a.{os.getpid()}.partial", tmp_path / f".b.{dead.pid}.partial"
    mine.touch(), theirs.touch(), (tmp_path / ".notes.partial").touch()
    (tmp_path / f".c.{dead.pid}.partial").mkdir()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, ".notes.partial"}


def test_preparing_during_a_training_is_refused(demo, tmp_path, run_main):
    holder = start_python(HOLD, tmp_path, "reading", 60)
    assert holder.stdout.readline() == "held\n"
    options = ("--annotations", demo / "train.csv", "--image_folder", demo / "train" / "train")
    result = run_main(preparation, *options, "--output_folder", tmp_path)
    holder.kill()
    holder.communicate()
    assert_one_line(result, tmp_path, "another run")


# --- links and devices --------------------------------------------------------------------------------------


def test_links_are_replaced_and_devices_refused(tmp_path):
    """A link in a folder from elsewhere may lead anywhere: what it leads to stays as it is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    links = {"link": "real/file", "new": "real/other", f".plain.{os.getpid()}.partial": "real/file"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    for name in ("link", "new", "plain"):
        with atomic_write(tmp_path / name) as tmp:
            tmp.write_text("written")
        assert (tmp_path / name).read_text() == "written" and not (tmp_path / name).is_symlink()
    assert os.listdir(tmp_path / "real") == ["file"] and (tmp_path / "real" / "file").read_text() == "old"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "device", "/dev/null"):
        with pytest.raises(UserError, match="device or pipe"), atomic_write(path) as tmp:
            tmp.write_text("written")
        with pytest.raises(UserError, match="device or pipe"):  # before any work
            check_output(path)
    assert (tmp_path / "pipe").is_fifo() and not os.path.isfile("/dev/null")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    with pytest.raises(IsADirectoryError) as error, atomic_write(tmp_path / "folder") as tmp:
        tmp.write_text("written")
    assert error.value.filename == str(tmp_path / "folder") and (tmp_path / "folder").is_symlink()
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "a") as tmp:
        (tmp.parent / "b" / "c").write_text("")
    assert error.value.filename == str(tmp_path / "b" / "c")
    assert sorted(os.listdir(tmp_path)) == ["device", "folder", "link", "new", "pipe", "plain", "real"]


@pytest.mark.parametrize("mode", [0o444, 0o600, 0o640, 0o664, 0o777])
def test_a_rewritten_file_keeps_its_permissions_and_owner(mode, tmp_path):
    old, new, link, like = (tmp_path / name for name in ("old", "new", "link", "like"))
    old.write_text("old")
    link.symlink_to(old)
    old.chmod(mode)
    owners = (12345, 23456) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(old, *owners)
    for path, model in ((new, None), (link, None), (old, None), (like, old)):
        with atomic_write(path, like=model) as tmp:
            assert not tmp.exists() or not tmp.stat().st_mode & 0o077, "it is private from the beginning"
            tmp.write_text("new")
        status = path.lstat()
        if path == new:
            assert status.st_mode & 0o777 == 0o666 & ~umask() and status.st_uid == os.geteuid()
        else:
            assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (mode, *owners), path.name
        assert path.read_text() == "new"


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_libraries_write_goes_through_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".rows.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), ResumableRowWriter(tmp_path / "rows", "rows", 1, {}, "") as writer:
        writer.append(np.zeros((1, 4), np.uint8))
    with (
        pytest.raises(OSError),
        lock_folder(make_link(tmp_path / "new" / LOCK_FILE, tmp_path / "mine").parent),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_is_added_to_goes_through_no_link(tmp_path):
    for number, target in enumerate(("mine", "none", "/dev/full")):
        (tmp_path / "mine").write_text("mine")
        log = tmp_path / f"{number}.log"
        log.symlink_to(tmp_path / target)
        run = Run.start("no")
        run.log_to(log)
        for line in ("first", "second"):
            run.log(line)
        assert log.read_text() == "first\nsecond\n" and not log.is_symlink()
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "none").exists()


def test_finished_rows_take_the_place_of_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "rows").symlink_to(tmp_path / "mine")
    with ResumableRowWriter(tmp_path / "rows", "rows", 1, {}, "") as writer:
        writer.append(np.zeros((1, 4), np.uint8))
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "rows").is_symlink() and (tmp_path / "rows").stat().st_size > 4


def make_link(place, target):
    place.parent.mkdir()
    place.symlink_to(target)
    return place


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(UserError, match=f"a {name}, not a file"):
            open_regular(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    os.close(open_regular(tmp_path / "new", os.O_WRONLY | os.O_CREAT))
    assert (tmp_path / "new").is_file()


# --- tables -------------------------------------------------------------------------------------------------


def test_line_ends_in_a_table_come_back(tmp_path):
    """The csv module before Python 3.13 leaves a carriage return unquoted, which then ends a row."""
    values = ["a\rb", "a\nb", "a\r\nb", "\r", "\r\n", 'a"\r', "a,b", "", " ", "plain", "\ud800"]
    rows = [["name", "text"], *([value, f"{value}{number}"] for number, value in enumerate(values))]
    write_csv(tmp_path / "a.csv", rows)
    write_table(tmp_path / "b.csv", [dict(zip(rows[0], row)) for row in rows[1:]])
    for name in ("a.csv", "b.csv"):
        with (tmp_path / name).open(encoding="utf-8", newline="") as stream:
            text = stream.read()
        assert list(csv.reader(io.StringIO(text, newline=""))) == [
            [value.replace("\ud800", "\\ud800") for value in row] for row in rows
        ]
        assert "\nplain,plain9\n" in text  # as a row without line ends always was
    write_json(tmp_path / "c.json", ["\ud800 é"])
    assert json.loads((tmp_path / "c.json").read_text("utf-8")) == ["\ud800 é"]


# --- full disks ---------------------------------------------------------------------------------------------


def test_hdf5_and_torch_survive_a_failing_write(tmp_path, monkeypatch):
    import torch

    written = []

    class FullDisk(OutputFile):
        def write(self, data):
            if sum(written) + len(data) > 100_000:
                self._try(lambda _: os.write(-1, b""), None)
            written.append(len(data))
            return super().write(data)

    monkeypatch.setattr("create_input_files.OutputFile", FullDisk)
    with pytest.raises(OSError), RowWriter(tmp_path / "a", "rows", 1000, "") as writer:
        for _ in range(1000):
            writer.append(np.zeros((1, 10_000), np.uint8))
    assert len(writer.checksums) < 1000
    written.clear()
    with pytest.raises(OSError), FullDisk(tmp_path / "b") as stream:
        torch.save({"weights": torch.zeros(100_000)}, stream)


def test_rows_are_read_with_suspicion(tmp_path):
    import h5py

    good = np.arange(24, dtype=np.uint8).reshape(4, 6)
    with RowWriter(tmp_path / "good", "rows", 9, "") as writer:
        writer.append(good[:3])
        writer.append(good[3:])
    assert (open_dataset(tmp_path / "good", "rows", np.uint8, 2)[:] == good).all()

    def wrong(reason: str, name: str = "bad", dtype: type = np.uint8, dimensions: int = 2) -> None:
        with pytest.raises(ValueError, match=reason):
            open_dataset(tmp_path / name, "rows", dtype, dimensions)

    wrong("missing", "none")
    wrong("not float16", "good", np.float16)
    wrong("dimensions", "good", dimensions=4)
    content = (tmp_path / "good").read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2], content[:-1]):
        (tmp_path / "bad").write_bytes(damaged)
        wrong("cut short|no dataset|damaged|never written")
    makers = {
        "link": lambda file: file.__setitem__("rows", h5py.ExternalLink(str(tmp_path / "good"), "rows")),
        "soft": lambda file: file.__setitem__("rows", h5py.SoftLink("/elsewhere")),
        "group": lambda file: file.create_group("rows"),
        "raw": lambda file: file.create_dataset("rows", (4, 6), "uint8", external=[("/etc/passwd", 0, 24)]),
        "never written": lambda file: file.create_dataset("rows", (4, 6), "uint8", chunks=(1, 6)),
        "bomb": lambda file: file.create_dataset("rows", (10**6, 10**6), "uint8", compression="gzip"),
        "virtual": lambda file: file.create_virtual_dataset("rows", h5py.VirtualLayout((4, 6), "uint8")),
    }
    for make in makers.values():
        with h5py.File(tmp_path / "bad", "w") as file:
            make(file)
        wrong("rows|written")


def test_views_of_a_row_have_checksums_of_their_own(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3, 2, 2, 4)).astype(np.float16)  # (I, views, h, w, D)
    with ResumableRowWriter(tmp_path / "views", "features", 5, {}, "") as writer:
        writer.append(values[:2])
        writer.append(values[2:])
    content = bytearray((tmp_path / "views").read_bytes())
    content[content.index(values[4, 1].tobytes()) + 3] ^= 1
    (tmp_path / "views").write_bytes(content)
    rows = open_dataset(tmp_path / "views", "features", np.float16, remedy="make it anew")
    assert (rows[:4] == values[:4]).all()
    assert (rows.read([(0, 2), (4, 0)]) == values[[0, 4], [2, 0]]).all()
    for damaged in ([(4, 1)], [4]):
        with pytest.raises(UserError, match="damaged; make it anew"):
            rows.read(damaged)


def test_numbers_in_messages():
    sizes = (0, 600, 5_600, 1_234_567, 29_700_000_000)
    assert [readable_size(size) for size in sizes] == ["0 kB", "1 kB", "6 kB", "1.2 MB", "29.70 GB"]
    assert [counted(number, "image") for number in range(3)] == ["0 images", "1 image", "2 images"]


def test_names_that_are_not_utf8_are_refused_where_a_library_takes_no_others(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    check_output(odd, folder=True)
    check_output(tmp_path / "café", folder=True, utf8=True)
    with pytest.raises(UserError, match="its name is not UTF-8"):
        check_output(odd, folder=True, utf8=True)


def test_an_image_is_not_to_blame_where_no_more_files_can_be_open(tmp_path):
    """As with a low `ulimit -n` and many threads: nothing is left out, and the run says why it ends."""
    folder = make_images(tmp_path / "in", 2)
    (folder / "img1.txt").write_text("mine")
    sidecars, image = Sidecars(), str(folder / "img1.png")
    readers = {
        "image": lambda: read_image(image),
        "row": lambda: read_row(Row("img1", image), FolderOptions(folder), read_image),
        "sidecar": lambda: sidecars.read(image),
        "sidecar's beginning": lambda: sidecars.has_text(image),
    }
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    for read in readers.values():
        read()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
            with pytest.raises(OSError) as raised:
                read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert raised.value.errno == errno.EMFILE
        assert "too many files are open at once: lower --workers" in command_line._explain(raised.value)
