"""OpenAI's interface for videos, by OpenAI's own client over a real socket."""

import io
import threading
import time
import zlib

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from shared.numbered import Numbered

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.app import About, make_app
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.limits import Limits
from rehyat_jax.serve.wish import Wish
from rehyat_jax.video.io import read_video

# Its own service has ended; servers of others go on speaking its interface.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def opened(wish: Wish) -> Numbered:
    if wish.width is not None and wish.width < 16:
        raise RehyatError("a video of 8x8 is too small")
    return Numbered(wish.prompt, wish.seed if wish.image is None else int(wish.image[0, 0, 0]))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    host = Host(opened, folder=tmp_path_factory.mktemp("videos"), limits=Limits(jobs=4, frames=200))
    app = make_app(host, About(model="numbered", device="none"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def ended(client, name: str):
    until = time.monotonic() + 30
    while (video := client.videos.retrieve(name)).status in ("queued", "in_progress"):
        assert time.monotonic() < until
        time.sleep(0.02)
    return video


def test_a_video_by_openais_own_client(client, tmp_path):
    assert [model.id for model in client.models.list()] == ["numbered"]
    made = client.videos.create(model="numbered", prompt="a cat", seconds="4", extra_body={"seed": 3})
    assert made.status in ("queued", "in_progress", "completed")
    video = ended(client, made.id)
    assert (video.status, video.progress, video.seconds, video.prompt) == ("completed", 100, "4", "a cat")
    client.videos.download_content(made.id).write_to_file(tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4")) == 64
    assert made.id in [each.id for each in client.videos.list()]
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="no such video"):
        client.videos.retrieve(made.id)


def test_what_cannot_be_made_says_why(client):
    video = ended(client, client.videos.create(prompt="a cat", size="8x8", extra_body={"num_frames": 4}).id)
    assert video.status == "failed"
    assert "too small" in video.error.message


@pytest.mark.parametrize("body", [{"num_frames": 5}, {"seconds": 0.3}, {"extra_body": {"num_frames": 5}}], ids=str)
def test_json_as_well_as_a_form(address, body):
    made = httpx.post(f"{address}/videos", json={"prompt": "a cat", **body}).json()
    until = time.monotonic() + 30
    while (video := httpx.get(f"{address}/videos/{made['id']}").json())["status"] != "completed":
        assert time.monotonic() < until
        time.sleep(0.02)
    assert video["seconds"] == "0.3125"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 3},
        {"prompt": "a cat", "seconds": "soon"},
        {"prompt": "a cat", "seconds": -1},
        {"prompt": "a cat", "num_frames": 10**9},
        {"prompt": "a cat", "num_frames": True},
        {"prompt": "a cat", "size": "big"},
        {"prompt": "a cat", "seed": "x"},
        {"prompt": "a cat", "model": "other"},
        {"prompt": "a cat", "fps": 24},
        {"prompt": "a cat", "input_reference": "x"},
        {"prompt": "x" * 5000},
    ],
    ids=lambda body: str(body)[:60],
)
def test_hostile_wishes_are_answered_in_a_sentence(address, body):
    answer = httpx.post(f"{address}/videos", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"[1]"),
        ("application/json", b"{" * 5000),
        ("application/json", b"\xff"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n"),
        ("", b""),
    ],
)
def test_hostile_bodies_are_answered_in_a_sentence(address, kind, body):
    answer = httpx.post(f"{address}/videos", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert httpx.post(f"{address}/videos", content=b"x" * (2 << 20)).status_code == 413


def test_more_than_may_wait(address):
    slow = {"prompt": "a cat", "num_frames": 200}
    answers = [httpx.post(f"{address}/videos", json=slow) for _ in range(12)]
    assert 503 in {answer.status_code for answer in answers}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 503)
    for video in httpx.get(f"{address}/videos").json()["data"]:
        httpx.delete(f"{address}/videos/{video['id']}")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_an_image_is_the_first_frame(client, address, tmp_path):
    """The stream in the model's place has the image's first number for its seed."""
    picture = png(np.full((8, 8, 3), 7, np.uint8))
    made = [
        client.videos.create(model="numbered", prompt="a cat", seconds="4", **how)
        for how in ({"input_reference": ("a.png", picture)}, {"extra_body": {"seed": 7}})
    ]
    assert [ended(client, video.id).status for video in made] == ["completed"] * 2
    first, second = (client.videos.download_content(video.id).content for video in made)
    assert first == second
    large = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    large += zlib.crc32(large[12:]).to_bytes(4)
    for content in (picture[:45], b"no picture", large):
        answer = httpx.post(f"{address}/videos", data={"prompt": "a cat"}, files={"input_reference": ("a", content)})
        assert answer.status_code == 400
        assert "input_reference" in answer.json()["error"]["message"]
