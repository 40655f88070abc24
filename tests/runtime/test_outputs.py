"""Whose a file is: nothing is replaced that was not made for it, one process writes it, a kill leaves no ruin."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rehyat_jax.errors import RehyatError, RehyatWarning
from rehyat_jax.runtime import files
from rehyat_jax.runtime.files import check_new_folder, check_room, check_writable, hidden, human_size, whole_file
from rehyat_jax.runtime.outputs import locked, marker, owned_output
from rehyat_jax.runtime.record import Phases, write_record
from rehyat_jax.video.io import contact_sheet


def own(path, **options):
    return owned_output(path, command="rehyat generate", **options)


def take(path, **options) -> None:
    with own(path, **options):
        pass


# Files of the user


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", "picture"), ("a.json", "{}"), ("a.json", "[1]"), ("a.json", "no")]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_users_files_beside_an_output_are_never_replaced(tmp_path, name, content, overwrite):
    beside = tmp_path / name
    if content == "picture":
        Image.new("RGB", (8, 8)).save(beside)
    else:
        beside.write_text(content)
    before = beside.read_bytes()
    with pytest.raises(RehyatError, match=rf"{name} would be replaced, and was not made by rehyat for a\.mp4"):
        take(tmp_path / "a.mp4", beside=[tmp_path / "a.png", tmp_path / "a.json"], overwrite=overwrite)
    assert beside.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_users_files_an_output_is_replaced_only_when_told(tmp_path):
    out = tmp_path / "a.mp4"
    out.write_bytes(b"mine")
    with pytest.raises(RehyatError, match=r"a\.mp4 exists already: --overwrite replaces it"):
        take(out)
    take(out, overwrite=True)
    take(out, resume=True)
    out.write_bytes(b"")  # nothing to lose
    take(out)


def test_users_files_what_was_made_for_the_output_is_replaced(tmp_path):
    """A sheet and a record say what they were made for; for another output they are somebody's files."""
    out, sheet, record = (tmp_path / f"a.{ending}" for ending in ("mp4", "png", "json"))
    contact_sheet(sheet, np.zeros((1, 8, 8, 3), np.uint8), output=out)
    write_record(record, command="rehyat generate", settings={}, phases=Phases(), output=out)
    assert Image.open(sheet).text == marker(out) == {"made_by": "rehyat", "made_for": "a.mp4"}
    take(out, beside=[sheet, record])
    for each in (sheet, record):
        with pytest.raises(RehyatError, match=r"not made by rehyat for b\.mp4"):
            take(tmp_path / "b.mp4", beside=[each])


@pytest.mark.parametrize(
    ("record", "ours"),
    [
        ({"command": "rehyat generate", "settings": {"out": "videos/a.mp4"}}, True),
        ({"command": "rehyat generate", "settings": {"out": "b.mp4"}}, False),
        ({"command": "generate", "settings": {"out": "a.mp4"}}, False),
        ({"command": "rehyat generate"}, False),
    ],
)
def test_users_files_records_of_before_are_known(tmp_path, record, ours):
    (tmp_path / "a.json").write_text(json.dumps(record))
    if ours:
        take(tmp_path / "a.mp4", beside=[tmp_path / "a.json"])
    else:
        with pytest.raises(RehyatError, match="not made by"):
            take(tmp_path / "a.mp4", beside=[tmp_path / "a.json"])


# One owner

HOLDER = """
import os, signal, sys
from rehyat_jax.runtime.outputs import locked
with locked(sys.argv[1], command="rehyat generate"):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Another process that owns a path until it is ended."""
    processes = []

    def hold(path) -> subprocess.Popen:
        argv = [sys.executable, "-c", HOLDER, str(path)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_one_owner_is_named_with_host_and_process(tmp_path, holder):
    process = holder(tmp_path / "a.mp4")
    words = (
        rf"another process is writing it: process {process.pid} on {os.uname().nodename} \(rehyat generate, since 20"
    )
    for path in (tmp_path / "a.mp4", tmp_path / "." / "a.mp4"):
        with pytest.raises(RehyatError, match=words):
            take(path)
    take(tmp_path / "b.mp4")
    process.communicate("")
    assert os.listdir(tmp_path) == []
    take(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


def test_one_owner_after_a_kill(tmp_path, holder):
    process = holder(tmp_path / "folder")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [".folder.lock"]
    with locked(tmp_path / "folder", command="rehyat finetune"):
        assert json.loads((tmp_path / ".folder.lock").read_text())["process"] == os.getpid()
        with pytest.raises(RehyatError, match=f"process {os.getpid()} on"):
            take(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_one_owner_through_a_link(tmp_path, holder):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "there" / "a.mp4")
    holder(tmp_path / "there" / "a.mp4")
    with pytest.raises(RehyatError, match="another process is writing it: process"):
        take(tmp_path / "link.mp4")


RACE = """
import sys, time
from rehyat_jax.errors import RehyatError
from rehyat_jax.runtime.outputs import locked
folder = sys.argv[1]
got = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        with locked(folder + "/a", command="race"):
            with open(folder + "/inside", "x"):
                pass
            got += 1
            import os; os.unlink(folder + "/inside")
    except RehyatError as error:
        assert "another process" in str(error), error
print(got)
"""


def test_one_owner_of_many_that_come_and_go(tmp_path):
    """Four processes take the lock and give it back for two seconds: never are two inside."""
    argv = [sys.executable, "-c", RACE, str(tmp_path)]
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        output, error = process.communicate()
        assert process.returncode == 0, error
        assert int(output) > 0
    assert os.listdir(tmp_path) == []


# What a kill leaves


def test_leftovers_of_a_kill_are_named_and_removed(tmp_path):
    out = tmp_path / "a.mp4"
    left, folder = hidden(out, "0123abcd.partial"), hidden(out, "89abcdef.partial")
    left.write_bytes(b"x" * 1500)
    folder.mkdir()
    (folder / "b").write_bytes(b"x" * 2_000_000)
    others = [hidden(tmp_path / "b.mp4", "0123abcd.partial"), tmp_path / ".a.mp4.notes.partial", tmp_path / "a.partial"]
    for other in others:
        other.touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        take(out)
    sentences = sorted(str(each.message) for each in said)
    assert sentences == [
        f"removed {left}, which a run that was killed left (1.5 kB)",
        f"removed {folder}, which a run that was killed left (2.0 MB)",
    ]
    assert {each.category for each in said} == {RehyatWarning}
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_leftovers_of_long_names_are_not_mixed_up(tmp_path):
    one, other = (tmp_path / f"{'x' * 100}{number}.mp4" for number in (1, 2))
    hidden(one, "0123abcd.partial").touch()
    take(other)
    assert hidden(one, "0123abcd.partial").exists()
    with pytest.warns(RehyatWarning, match="removed"):
        take(one)


@pytest.mark.parametrize("inside", ["partial", "inner"])
def test_leftovers_of_a_process_that_was_killed_while_it_wrote(tmp_path, inside):
    """Also where what writes a file has a partial name for the partial name that it was given."""
    script = f"""
import os, signal, sys
from rehyat_jax.runtime.files import whole_file
with whole_file(sys.argv[1]) as partial, whole_file(partial) as inner:
    {inside}.write_bytes(b"x" * 100)
    (partial if {inside!r} == "inner" else inner).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.mp4")]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    with pytest.warns(RehyatWarning, match=r"\.a\.mp4\.[0-9a-f]{8}\.partial, which .* left \(100 bytes\)"):
        take(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


# What can be known of a destination


@pytest.mark.parametrize("name", [".", "..", "/", "folder", "folder/"])
def test_destinations_that_are_folders(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RehyatError, match="it is a folder"):
        check_writable(name)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "pipe"])
def test_destinations_that_are_no_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    if not Path(name).is_file():  # a captured standard output may be one
        with pytest.raises(RehyatError, match="it is a device, not a file"):
            check_writable(name)
    assert os.path.exists("/dev/null")


def test_destinations_that_are_links_are_written_where_they_lead(tmp_path, monkeypatch):
    """The link stays, the file it leads to is made, and the partial lay on that one's disk."""
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.mp4", tmp_path / "there" / "b.mp4"
    link.symlink_to(target)
    for content in ("new", "newer"):
        with whole_file(link) as partial:
            assert partial.parent == target.parent
            partial.write_text(content)
        assert link.is_symlink()
        assert target.read_text() == content


@pytest.fixture
def mounted(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_destinations_where_a_disk_is_mounted(mounted):
    with pytest.raises(RehyatError, match="a disk is mounted there"):
        check_new_folder(mounted)
    assert check_new_folder(mounted / "new") == mounted / "new"


def test_destinations_of_a_file_that_is_mounted(tmp_path):
    file, source = tmp_path / "a.mp4", tmp_path / "source"
    file.touch()
    source.touch()
    if subprocess.run(["mount", "--bind", source, file], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(RehyatError, match="mounted from elsewhere"):
            check_writable(file)
    finally:
        subprocess.run(["umount", file], check=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "the folder that this command runs in"),
        ("..", "the folder that this command runs in"),
        ("file", "it is a file, not a folder"),
        ("file/a", "a part of the path is a file"),
        ("full", "exists and is not empty"),
        ("x" * 300, "the name is too long"),
    ],
)
def test_destinations_that_no_folder_can_have(tmp_path, monkeypatch, name, words):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "full").mkdir()
    (tmp_path / "here" / "full" / "a").touch()
    (tmp_path / "here" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RehyatError, match=words):
        check_new_folder(name)


def test_destinations_of_folders_that_are_links(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert check_new_folder(tmp_path / "link") == tmp_path / "there"
    assert check_new_folder(tmp_path / "dangling") == tmp_path / "nowhere"
    assert check_new_folder(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert not (tmp_path / "nowhere").exists()


def test_destinations_without_room_are_known(mounted):
    check_room(mounted / "new" / "a.mp4", size=900_000, what="the video")
    words = r"a\.mp4: the video needs 2\.0 GB, and .*disk has 1\.0 MB left"
    with pytest.raises(RehyatError, match=words):
        check_room(mounted / "new" / "a.mp4", size=2_000_000_000, what="the video")
    with pytest.warns(RehyatWarning, match=r"the video may need 2\.0 GB"):
        check_room(mounted / "a.mp4", size=2_000_000_000, what="the video", certain=False)


def test_destinations_whose_room_cannot_be_known(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("no statvfs")

    monkeypatch.setattr(files.shutil, "disk_usage", fail)
    with pytest.warns(RehyatWarning, match="is not known"):
        check_room(tmp_path / "a", size=1, what="the video")


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (123_456_789, "123 MB"), (4e12, "4.0 TB")]
)
def test_sizes_are_said_as_people_say_them(size, words):
    assert human_size(size) == words
