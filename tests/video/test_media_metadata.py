"""What a container says of how its pixels are meant is obeyed when a video is read, and said when one is written."""

import io
import itertools
import json
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from media_files import corners, decoded, encode
from PIL import Image

from rehyat_jax.errors import RehyatError
from rehyat_jax.video import colour
from rehyat_jax.video.boxes import fragments
from rehyat_jax.video.growing import GrowingVideo, finish_video, reopen_video
from rehyat_jax.video.io import write_video
from rehyat_jax.video.metadata import generation_metadata
from rehyat_jax.video.reading import frames_at_rate, read_video, shown_frames

GREYS = [(255, 255, 255), (128, 128, 128), (16, 16, 16)]
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (240, 220, 20), *GREYS]
#: H.273's code points of BT.709, BT.601 (525 lines) and BT.2020, with Kr and Kb.
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def yuv(rgb: tuple[int, int, int], matrix: int, *, full: bool, bits: int = 8) -> list[int]:
    """By the equation of H.273 section 8.3."""
    kr, kb = MATRICES[matrix]
    r, g, b = (value / 255 for value in rgb)
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = ((b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr)))
    most, one = (1 << bits) - 1, 1 << (bits - 8)
    if full:
        values = [most * luma, *(most * c + (128 * one) for c in chroma)]
    else:
        values = [one * (16 + 219 * luma), *(one * (128 + 224 * c) for c in chroma)]
    return [int(np.clip(round(value), 0, most)) for value in values]


def flat(path, rgb, *, matrix, full=False, size=(32, 48), ten=False, tags=(), told=True):
    """A video of one colour, its planes by the equation."""
    luma, *chroma = yuv(rgb, matrix, full=full, bits=10 if ten else 8)
    height, width = size
    dtype = np.uint16 if ten else np.uint8
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p10le" if ten else "yuv420p"
        if told:
            stream.codec_context.colorspace = matrix
            stream.codec_context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        for name, value in dict(tags).items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame(width, height, stream.pix_fmt)
        frame.colorspace, frame.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
        for plane, value in zip(frame.planes, (luma, *chroma), strict=True):
            plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
        for _ in range(2):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# How a picture lies


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [{}, {"hflip": True}, {"vflip": True}])
def test_media_metadata_rotation_and_mirrors(tmp_path, degrees, mirror):
    """All eight orientations: turned counterclockwise as the matrix says, then mirrored, as FFmpeg's filters do it."""
    path = encode(tmp_path / "a.mp4", corners(), rotation={"degrees": degrees, **mirror})
    turns = {0: [], 90: [("transpose", "cclock")], 180: [("hflip", ""), ("vflip", "")], -90: [("transpose", "clock")]}
    want = decoded(path, *turns[degrees], *((name, "") for name in mirror))
    shown = read_video(path)
    assert shown.shape[1:] == want.shape
    for y, x in itertools.product((8, -9), repeat=2):  # away from edges, which its default conversion blurs otherwise
        np.testing.assert_allclose(shown[0, y, x], want[y, x].astype(int), atol=4)


def test_media_metadata_a_portrait_phone_video_stands(tmp_path):
    """Stored lying, 48 x 32, with the matrix of a phone held upright: 32 wide, the stored left side on top."""
    shown = read_video(encode(tmp_path / "a.mp4", corners(), rotation={"degrees": -90}))[0]
    assert shown.shape == (48, 32, 3)
    np.testing.assert_allclose(shown[4, 28], (200, 30, 30), atol=3)  # stored upper left, shown upper right
    np.testing.assert_allclose(shown[4, 4], (30, 200, 30), atol=3)


def test_media_metadata_an_angle_between_is_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", corners(), rotation={"degrees": 30})
    with pytest.raises(RehyatError, match="no whole number of right angles"):
        read_video(path)


@pytest.mark.parametrize(("aspect", "width"), [("2/1", 96), ("64/45", 68), ("1/2", 24)])
def test_media_metadata_pixels_that_are_not_square(tmp_path, aspect, width):
    path = encode(tmp_path / "a.mp4", corners(), tags={"sample_aspect_ratio": Fraction(aspect)})
    shown = read_video(path)[0]
    assert shown.shape == (32, width, 3)
    np.testing.assert_allclose(shown[8, width // 4], (200, 30, 30), atol=3)
    path = encode(
        tmp_path / "b.mp4", corners(), tags={"sample_aspect_ratio": Fraction(aspect)}, rotation={"degrees": 90}
    )
    assert read_video(path)[0].shape == (width, 32, 3)


# Which colours are meant


@pytest.mark.parametrize("rgb", COLOURS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_media_metadata_matrix_and_range(tmp_path, rgb, matrix, full):
    path = flat(tmp_path / "a.mp4", rgb, matrix=matrix, full=full)
    np.testing.assert_allclose(read_video(path)[0, 16, 24], rgb, atol=2)


@pytest.mark.parametrize(("size", "matrix"), [((480, 832), 6), ((576, 1024), 6), ((720, 1280), 1), ((720, 406), 1)])
def test_media_metadata_without_tags_it_is_as_players_take_it(tmp_path, size, matrix):
    path = flat(tmp_path / "a.mp4", (200, 30, 30), matrix=matrix, size=size, told=False)
    np.testing.assert_allclose(read_video(path)[0, 16, 24], (200, 30, 30), atol=2)


@pytest.mark.parametrize("rgb", COLOURS)
def test_media_metadata_ten_bits(tmp_path, rgb):
    path = flat(tmp_path / "a.mp4", rgb, matrix=1, ten=True)
    np.testing.assert_allclose(read_video(path)[0, 16, 24], rgb, atol=1)


def test_media_metadata_wide_primaries(tmp_path):
    """BT.2020's (180, 120, 90) at gamma 2.4 by BT.2087's matrix: computed by hand below. Grey stays grey."""
    tags = {"color_primaries": ColorPrimaries.BT2020, "color_trc": ColorTrc.BT2020_10}
    light = (np.array((180, 120, 90)) / 255) ** 2.4
    to_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    want = 255 * (to_709 @ light) ** (1 / 2.4)
    path = flat(tmp_path / "a.mp4", (180, 120, 90), matrix=9, tags=tags)
    np.testing.assert_allclose(read_video(path)[0, 16, 24], want, atol=3)
    path = flat(tmp_path / "b.mp4", (128, 128, 128), matrix=9, tags=tags)
    np.testing.assert_allclose(read_video(path)[0, 16, 24], (128, 128, 128), atol=1)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"color_trc": ColorTrc.SMPTE2084, "color_primaries": ColorPrimaries.BT2020}, r"HDR \(PQ\).*SDR"),
        ({"color_trc": ColorTrc.ARIB_STD_B67, "color_primaries": ColorPrimaries.BT2020}, r"HDR \(HLG\).*SDR"),
        ({"color_trc": ColorTrc.LINEAR}, "linear light"),
        ({"colorspace": 8}, "YCgCo"),
    ],
)
def test_media_metadata_what_cannot_be_shown_without_a_choice_is_refused(tmp_path, tags, words):
    path = flat(tmp_path / "a.mp4", (255, 255, 255), matrix=9, ten=True, tags=tags)
    with pytest.raises(RehyatError, match=rf"cannot read a video from .*a\.mp4: .*{words}"):
        read_video(path)


def test_media_metadata_what_is_transparent_lies_on_black(tmp_path):
    video = np.full((2, 16, 16, 4), (250, 100, 50, 255), np.uint8)
    video[:, 8:, :, 3] = 0
    video[:, :8, 8:, 3] = 128
    path = encode(tmp_path / "a.mov", video, given="rgba", stored="rgba", codec="png")
    shown = read_video(path)[0]
    np.testing.assert_array_equal(shown[2, 2], (250, 100, 50))
    np.testing.assert_allclose(shown[2, 12], (125.5, 50.2, 25.1), atol=1)
    np.testing.assert_array_equal(shown[12, 2], (0, 0, 0))


@pytest.mark.parametrize("size", [(33, 47), (3, 5), (31, 16)])
def test_media_metadata_odd_sizes(tmp_path, size):
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.mov", video, stored="rgb24", codec="png")
    np.testing.assert_array_equal(read_video(path), video)


def test_media_metadata_fields_are_deinterlaced(tmp_path):
    """A bar that moves 8 pixels a field: combed as stored, with edges of one place in each row as shown."""
    stored = np.zeros((6, 64, 96, 3), np.uint8)
    for number, field in itertools.product(range(6), range(2)):
        left = 8 * (2 * number + field)
        stored[number, field::2, left : left + 16] = 255
    path = encode(tmp_path / "a.mp4", stored, options={"x264-params": "tff=1"})
    shown = read_video(path)

    def combed(frame):
        rows = frame[8:-8, :, 0].astype(int)
        return np.abs(rows[1:] - rows[:-1]).mean()

    assert len(shown) == 6
    assert combed(stored[3]) > 40
    assert combed(shown[3]) < 10
    plain = encode(tmp_path / "b.mp4", stored)
    assert combed(read_video(plain)[3]) > 40


# Which stream, and when


def _png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "png")
    return file.getvalue()


def _boxes(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:4])
        found.append(data[:size])
        data = data[size:]
    return found


def _udta_first(path) -> None:
    """Move the box that holds the cover before the tracks, as iTunes writes it; no offset changes."""
    boxes = _boxes(path.read_bytes())
    moov = next(box for box in boxes if box[4:8] == b"moov")
    inner = sorted(_boxes(moov[8:]), key=lambda box: box[4:8] != b"udta")
    path.write_bytes(b"".join(moov[:8] + b"".join(inner) if box is moov else box for box in boxes))


def test_media_metadata_a_cover_picture_that_comes_first_is_no_video(tmp_path):
    path = encode(tmp_path / "a.mp4", corners(), cover=_png("white"))
    _udta_first(path)
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["png", "h264"]
    shown = read_video(path)
    assert shown.shape == (4, 32, 48, 3)
    np.testing.assert_allclose(shown[0, 8, 8], (200, 30, 30), atol=3)


def test_media_metadata_of_several_videos_the_default_is_shown(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=16, options={"crf": "0"}) for _ in range(3)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        streams[1].disposition = av.stream.Disposition.default
        for shade, stream in zip((50, 100, 150), streams, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), shade, np.uint8), format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])
    np.testing.assert_allclose(read_video(path)[0, 8, 8], 100, atol=2)


def test_media_metadata_no_video_is_said(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(RehyatError, match=r"a\.mp4: it holds no video, only audio"):
        read_video(tmp_path / "a.mp4")


def _shades(count: int) -> np.ndarray:
    return np.broadcast_to(
        np.arange(0, 250, 250 // count, dtype=np.uint8)[:count, None, None, None], (count, 16, 16, 3)
    )


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_media_metadata_variable_frame_rate(tmp_path, ending):
    """Frames at 0, 1, 5, 6 and 12 sixteenths of a second; at 16 a second each is shown until halfway to the next."""
    path = encode(tmp_path / f"a.{ending}", _shades(5), times=[0, 1, 5, 6, 12])
    told = [frame.seconds for frame in shown_frames(path)]
    np.testing.assert_allclose(told, np.array([0, 1, 5, 6, 12]) / 16, atol=2e-3)
    shown = [int(frame.pixels()[8, 8, 0]) for frame in frames_at_rate(path, 16)]
    want = [0, 50, 50, 50, 100, 100, 150, 150, 150, 150, 200, 200, 200]
    np.testing.assert_allclose(shown[: len(want)], want, atol=3)
    assert len(read_video(path)) == 5
    np.testing.assert_array_equal(read_video(path, fps=16)[:, 8, 8, 0], shown)


def test_media_metadata_a_video_that_starts_late_starts_at_its_first_frame(tmp_path):
    """A start offset of two seconds, which mp4 keeps as an empty edit."""
    path = encode(tmp_path / "a.mp4", _shades(4), times=[32, 33, 34, 35])
    assert [round(frame.seconds * 16, 2) for frame in shown_frames(path)] == [0, 1, 2, 3]
    assert len(read_video(path, fps=16)) == 4


def test_media_metadata_an_edit_list_cuts_the_beginning(tmp_path):
    """Frames 0 to 11 in one group, copied from time 5 on with negative times before: a player begins at 5."""
    whole = encode(tmp_path / "a.mp4", _shades(12), options={"bf": "0", "g": "12"})
    path = tmp_path / "b.mp4"
    with av.open(str(whole)) as given, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        back = round(5 / 16 / stream.time_base)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, copy
                made.mux(packet)
    shown = read_video(path)
    np.testing.assert_allclose(shown[:, 8, 8, 0], np.arange(5, 12) * 20, atol=3)


@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.mp4", "http:x.mp4", "a%03d.mp4", "-.mp4"])
def test_media_metadata_a_name_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(encode(tmp_path / "x.mp4", corners()).read_bytes())
    assert read_video(name).shape == (4, 32, 48, 3)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_media_metadata_a_rate_is_a_number(tmp_path, fps):
    with pytest.raises(RehyatError, match="fps must be a number above 0"):
        read_video(tmp_path / "a.mp4", fps=fps)


# What is written


def _planes(path) -> tuple[list[int], av.VideoCodecContext, av.VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        return [int(np.frombuffer(plane, np.uint8)[9]) for plane in frame.planes], stream.codec_context, frame


def _grown(path, video, **how) -> None:
    with GrowingVideo(path, **how) as growing:
        growing.append(video)


def _finished(path, video, **how) -> None:
    _grown(path.with_name("growing.mp4"), video, **how)
    finish_video(path.with_name("growing.mp4"), path)


@pytest.mark.parametrize("write", [write_video, _grown, _finished])
@pytest.mark.parametrize("size", [(64, 64), (480, 832), (720, 1280)])
def test_media_metadata_videos_are_written_in_bt709_and_say_so(tmp_path, write, size):
    """Planes by the equation, to within 1; primaries, transfer, matrix and range in the H.264 stream and the mp4."""
    for number, rgb in enumerate([(200, 30, 30), (30, 30, 200), (255, 255, 255)]):
        path = tmp_path / f"{number}.mp4"
        write(path, np.full((1, *size, 3), rgb, np.uint8))
        planes, context, frame = _planes(path)
        np.testing.assert_allclose(planes, yuv(rgb, 1, full=False), atol=1)
        for told in (context, frame):
            assert (told.color_primaries, told.color_trc, told.colorspace, told.color_range) == (1, 1, 1, 1)
        # ISO/IEC 14496-12 section 12.1.5: primaries, transfer and matrix 1, and no full range.
        assert b"colrnclx" + bytes((0, 1, 0, 1, 0, 1, 0)) in path.read_bytes()
        np.testing.assert_allclose(read_video(path)[0, 16, 16], rgb, atol=2)


def test_media_metadata_the_conversion_is_ffmpegs_own():
    """Its scale filter, told to go to BT.709 in limited range."""
    y, x = np.mgrid[:64, :96]
    picture = np.stack([x * 2 + 20, 255 - y * 3, (x + y) + 40], axis=-1).clip(0, 255).astype(np.uint8)
    graph = av.filter.Graph()
    flags = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    graph.link_nodes(
        graph.add_buffer(width=96, height=64, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 16)),
        graph.add("scale", f"out_color_matrix=bt709:out_range=tv:flags={flags}"),
        graph.add("format", "yuv420p"),
        graph.add("buffersink"),
    ).configure()
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1, 16)
    graph.push(frame)
    want, made = graph.pull().to_ndarray().astype(int), colour.from_rgb(picture, "yuv420p").to_ndarray().astype(int)
    assert np.abs(made - want).max() <= 1


def test_media_metadata_lossless_videos_say_rgb(tmp_path):
    write_video(tmp_path / "a.mp4", np.full((1, 16, 16, 3), (200, 30, 30), np.uint8), codec="rgb")
    _, context, _ = _planes(tmp_path / "a.mp4")
    assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 0, 2)


@pytest.mark.parametrize("write", [write_video, _grown, _finished])
def test_media_metadata_prompt_seed_model_and_settings_are_in_the_file(tmp_path, write):
    told = generation_metadata(
        prompt='a "cat", 日本\nin two lines\0',
        negative_prompt="static",
        seed=2**40,
        model="mini-sprites",
        settings={"num_inference_steps": 20, "guidance_scale": 5.0, "width": 832, "height": 480, "solver": "UniPC()"},
    )
    write(tmp_path / "a.mp4", np.zeros((1, 16, 16, 3), np.uint8), metadata=told)
    with av.open(str(tmp_path / "a.mp4")) as container:
        read = container.metadata
    assert read["parameters"] == (
        'a "cat", 日本\nin two lines\nNegative prompt: static\n'
        "Steps: 20, Sampler: UniPC(), CFG scale: 5.0, Seed: 1099511627776, Size: 832x480, Model: mini-sprites"
    )
    comment = json.loads(read["comment"])
    assert (comment["seed"], comment["model"], comment["settings"]["width"]) == (2**40, "mini-sprites", 832)


def test_media_metadata_chapters_begin_where_the_prompt_changes(tmp_path):
    """In the growing file, after a resumption, and in the finished one: frames 0, 9 and 33 of 45, at 16 a second."""
    growing, finished, opened, again = (tmp_path / f"{name}.mp4" for name in ("growing", "finished", "opened", "again"))
    cuts, prompts = [0, 9, 21, 33, 45], ["a cat", "a dog " * 99, "a dog " * 99, "ein Löwe"]
    blocks = [np.full((stop - start, 16, 16, 3), start, np.uint8) for start, stop in itertools.pairwise(cuts)]
    with GrowingVideo(growing) as video:
        for block, prompt in zip(blocks[:3], prompts, strict=False):
            video.begin_chapter(prompt)
            video.append(block)
    with GrowingVideo(growing) as video:
        video.go_on(after=21)
        for block, prompt in zip(blocks[2:], prompts[2:], strict=True):
            video.begin_chapter(prompt)
            video.append(block)
    assert len(read_video(growing)) == 45
    with open(growing, "rb") as file:
        assert [part.chapter for part in fragments(file)] == ["a cat", "a dog " * 99, None, "ein Löwe"]
    finish_video(growing, finished)
    with av.open(str(finished)) as container:
        chapters = container.chapters()
    assert [chapter["metadata"]["title"] for chapter in chapters] == ["a cat", "a dog " * 99, "ein Löwe"]
    starts = [float(chapter["start"] * chapter["time_base"]) for chapter in chapters]
    np.testing.assert_allclose(starts, np.array([0, 9, 33]) / 16, atol=1e-3)
    reopen_video(finished, opened)
    finish_video(opened, again)
    assert again.read_bytes() == finished.read_bytes()


def test_media_metadata_a_video_begun_before_goes_on_as_it_was_begun(tmp_path):
    """Untagged and in BT.601 to its end: the bytes of one that was never interrupted then."""
    cuts = [0, 9, 21]
    blocks = [corners(16, 16, stop - start) for start, stop in itertools.pairwise(cuts)]
    before, path = tmp_path / "before.mp4", tmp_path / "a.mp4"
    for number, block in enumerate(blocks):
        data = _as_before(block, number=number, start=cuts[number])
        with open(before, "ab") as file:
            file.write(data if not number else data[data.index(b"moof") - 4 :])
        if not number:
            path.write_bytes(data)
    with GrowingVideo(path) as video:
        video.go_on(after=9)
        video.begin_chapter("a prompt")
        video.append(blocks[1])
    assert path.read_bytes() == before.read_bytes()


def _as_before(block, *, number, start) -> bytes:
    """A fragment as this program wrote it before it tagged colours, in PyAV alone."""
    file = io.BytesIO()
    options = {
        "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
        "avoid_negative_ts": "disabled",
        "fflags": "+bitexact",
        "fragment_index": str(number + 1),
    }
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "16", "preset": "medium", "bf": "0"})
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for index, pixels in enumerate(block, start=start):
            frame = av.VideoFrame.from_ndarray(pixels.repeat(16, 0).repeat(16, 1), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
