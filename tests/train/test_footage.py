"""Which videos a source has: links, lists of every kind, hidden files, pictures; and what decoding gives."""

import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from rehyat_jax.errors import ConfigError, RehyatError
from rehyat_jax.video.io import write_video
from train.data.footage import content_digest, find_footage
from train.data.frames import clips, count_clips


def _pixels(frames: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), np.uint8)


def _video(path: Path, caption: str | None = None, *, frames: int = 5) -> Path:
    write_video(path, _pixels(frames), codec="rgb")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def _names(folder: Path, **options: object) -> list[str]:
    found = find_footage(folder, **options)
    assert not found.unusable
    return [video.name for video in found.footage]


def test_linked_folders_and_files_are_what_they_lead_to(tmp_path):
    _video(tmp_path / "far" / "in" / "a.mp4", "a")
    _video(tmp_path / "far" / "b.mp4", "b")
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far" / "round").symlink_to(source, target_is_directory=True)  # a circle
    (source / "c.mp4").symlink_to(tmp_path / "far" / "b.mp4")
    (source / "c.txt").write_text("c")
    assert _names(source) == ["c.mp4", "linked/b.mp4", "linked/in/a.mp4"]


def test_hidden_files_are_no_videos(tmp_path):
    _video(tmp_path / "a.mp4", "a")
    for name in ("._a.mp4", ".DS_Store", ".trash/b.mp4", ".hidden.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert _names(tmp_path) == ["a.mp4"]


LINES = '{{"file_name": "{a}", "caption": "one"}}\n\n{{"file_name": "b.mp4", "caption": "two"}}'
PATHS = {"file_column": "path", "caption_column": "text"}
PROMPTS = {"file_column": "video", "caption_column": "prompt"}


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("metadata.jsonl", LINES, {}),
        ("metadata.csv", 'file_name,caption,other\n{a},one,1\nb.mp4,"two",2\n', {}),
        ("metadata.json", f"[{LINES}]".replace("\n\n", ","), {}),
        ("metadata.json", '{{"{a}": "one", "b.mp4": {{"caption": "two"}}}}', {}),
        ("x.tsv", "path\ttext\n{a}\tone\nb.mp4\ttwo\n", PATHS),
        ("x.csv", "video,prompt\n{a},one\nb.mp4,two\n", PROMPTS),
        ("x.jsonl", LINES.replace("file_name", "video").replace("caption", "prompt"), PROMPTS),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_lists_of_every_kind_with_absolute_and_relative_names(tmp_path, name, text, options, mark):
    source = tmp_path / "source"
    far = _video(tmp_path / "elsewhere.mp4")
    _video(source / "b.mp4")
    _video(source / "left out.mp4")
    (source / name).write_text(mark + text.format(a=far), encoding="utf-8")
    more = options | ({} if name.startswith("metadata") else {"captions": source / name})
    found = find_footage(source, **more)
    assert [(video.path, video.caption) for video in found.footage] == [(far, "one"), (source / "b.mp4", "two")]
    assert [video.name for video in found.footage] == [str(far), "b.mp4"]
    assert (found.unlisted, found.unusable) == (1, ())


def test_a_list_is_cut_at_line_breaks_alone(tmp_path):
    _video(tmp_path / "a.mp4")
    caption = "one\u2028two\u0085three\x0cfour"
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "caption": caption}, ensure_ascii=False))
    (video,) = find_footage(tmp_path).footage
    assert video.caption == caption


def test_a_list_without_the_columns_says_which_it_has(tmp_path):
    _video(tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_text("video,prompt\na.mp4,a\n")
    words = r"no column 'file_name' \(it has prompt, video\): name its columns by --file-column and --caption-column"
    with pytest.raises(ConfigError, match=words):
        find_footage(tmp_path)
    for broken, words in (("{", "is not JSON"), ("5", "is neither an array")):
        (tmp_path / "x.json").write_text(broken)
        with pytest.raises(ConfigError, match=words):
            find_footage(tmp_path, captions=tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    _video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa lemon\n")
    assert find_footage(tmp_path).footage[0].caption == "a lemon"


def test_what_cannot_be_used_is_told_and_the_rest_found(tmp_path):
    _video(tmp_path / "a.mp4", "a")
    _video(tmp_path / "b.mp4")
    _video(tmp_path / "c.mp4", " \n")
    (tmp_path / "d.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "d.txt").write_text("d")
    found = find_footage(tmp_path)
    assert [video.name for video in found.footage] == ["a.mp4"]
    assert [video.name for video in found.unusable] == ["b.mp4", "c.mp4", "d.mp4"]
    assert "there is no b.txt beside it" in found.unusable[0].reason
    assert "c.txt is empty" in found.unusable[1].reason
    assert "d.mp4 cannot be read: the folder does not exist" in found.unusable[2].reason


def _encode(path: Path, video: np.ndarray, codec: str, pixels: str, **options: str) -> None:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("ending", "codec", "pixels", "apart"),
    [
        ("gif", "gif", "gray", 1.0),
        ("ts", "libx264", "yuv444p", 12.0),
        ("webm", "libvpx-vp9", "yuv444p", 12.0),
        ("mov", "qtrle", "rgb24", 0.0),
        ("mkv", "ffv1", "bgr0", 0.0),
    ],
)
def test_containers_give_their_frames(tmp_path, ending, codec, pixels, apart):
    smooth = np.zeros((10, 32, 32, 3), np.uint8)
    smooth += (np.arange(10, dtype=np.uint8) * 20)[:, None, None, None]  # each frame a grey of its own
    path = tmp_path / f"a.{ending}"
    _encode(path, smooth, codec, pixels)
    path.with_suffix(".txt").write_text("a")
    assert _names(tmp_path) == [path.name]
    assert count_clips(path, frames=5, fps=16) == 2
    taken = np.concatenate(list(clips(path, frames=5, fps=16, height=32, width=32)))
    assert float(np.abs(taken.astype(float) - smooth).max()) <= apart


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff"])
def test_a_folder_of_numbered_pictures_is_a_video(tmp_path, ending):
    video = _pixels(11)
    (tmp_path / "run").mkdir()
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / "run" / f"frame_{number}.{ending}")  # 10 comes after 9
    (tmp_path / "run" / "._frame_1.png").write_bytes(b"\0")
    (tmp_path / "run.txt").write_text("a lemon")
    assert _names(tmp_path) == ["run"]
    taken = np.concatenate(list(clips(tmp_path / "run", frames=5, fps=16, height=32, width=32)))
    np.testing.assert_array_equal(taken, video[:10])
    before = content_digest(tmp_path / "run")
    Image.fromarray(video[0]).save(tmp_path / "run" / f"frame_4.{ending}")
    assert content_digest(tmp_path / "run") != before
    (tmp_path / "run" / f"frame_7.{ending}").write_bytes(b"no picture")
    with pytest.raises(RehyatError, match="cannot read a picture from"):
        list(clips(tmp_path / "run", frames=5, fps=16, height=32, width=32))


def test_pictures_of_a_list_and_pictures_that_are_no_video(tmp_path):
    for folder in ("run", "thumbnails"):
        (tmp_path / folder).mkdir()
        for number in range(5):
            name = f"{number}.png" if folder == "run" else f"{number}-small.png"
            Image.fromarray(_pixels(1)[0]).save(tmp_path / folder / name)
    (tmp_path / "run.txt").write_text("beside")
    assert _names(tmp_path) == ["run"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\nrun,a\nthumbnails,b\n")
    found = find_footage(tmp_path)
    assert [(video.name, video.caption) for video in found.footage] == [("run", "a")]
    assert "thumbnails, a folder without numbered pictures" in found.unusable[0].reason


@pytest.mark.parametrize("ending", ["mp4", "ts"])
def test_what_decoding_gives_counts_and_not_what_a_header_says(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    _encode(path, _pixels(48), "libx264", "yuv420p", **({"movflags": "faststart"} if ending == "mp4" else {}))
    assert count_clips(path, frames=9, fps=16) == 5
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 8])  # as a copy that broke off: the mp4's header still says 48 frames
    if ending == "mp4":
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 48
    with pytest.raises(RehyatError, match=r"is too short|cannot read a video"):
        count_clips(path, frames=9, fps=16)


def test_a_content_is_known_by_its_bytes_alone(tmp_path):
    one = _video(tmp_path / "a.mp4")
    other = tmp_path / "in" / "b.mp4"
    other.parent.mkdir()
    shutil.copyfile(one, other)
    assert content_digest(one) == content_digest(other)
    changed = bytearray(one.read_bytes())
    changed[len(changed) // 2] ^= 1
    other.write_bytes(changed)
    assert content_digest(one) != content_digest(other)
    os.utime(one, ns=(1, 1))
    assert find_footage(tmp_path, captions=_list(tmp_path, "a.mp4")).footage[0].modified == 1


def _list(folder: Path, *names: str) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(json.dumps({"file_name": name, "caption": "a"}) for name in names))
    return path
