"""The server by its routes and messages, with streams of numbered frames in a model's place."""

import io
import itertools
import json
import os
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import uvicorn
from shared.numbered import Numbered, resumed
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.app import About, make_app
from rehyat_jax.serve.guard import Access
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.limits import Limits
from rehyat_jax.serve.steerable import Pace
from rehyat_jax.serve.wish import Wish

SOCKET = "ws://localhost:8765/v1/realtime/video"


def serving(tmp_path, *, streams: int = 4, access: Access | None = None, **limits) -> TestClient:
    host = Host(
        lambda wish: Numbered(wish.prompt, wish.seed),
        pace=Pace(ahead=2.0),
        limits=Limits(streams=streams, **limits),
        folder=tmp_path,
    )
    about = About(model="numbered", device="none", words=("cat",))
    client = TestClient(make_app(host, about, access=access), base_url="http://localhost:8765")
    client.host = host
    return client


@pytest.fixture
def client(tmp_path):
    with serving(tmp_path) as client:
        yield client


def heard(socket, kind: str) -> dict:
    """The next message of a kind; fragments and other messages before it are passed over."""
    while True:
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message.get("code", 1000))
        if message.get("text") is not None:
            content = json.loads(message["text"])
            if content["type"] == kind:
                return content


def fragment(socket) -> tuple[dict, bytes]:
    metadata = heard(socket, "video.chunk_metadata")
    return metadata, socket.receive_bytes()


def test_two_viewers_get_the_same_bytes(client):
    with client.websocket_connect(SOCKET) as one:
        one.send_json({"type": "session.start", "prompt": "a cat", "seed": 3})
        start = heard(one, "video.start")
        parts = [fragment(one) for _ in range(4)]
        assert start["mime_type"].startswith('video/mp4; codecs="avc1.')
        assert [part[0]["generation_chunk_index"] for part in parts] == [0, 1, 2, 3]
        assert all(len(data) == metadata["byte_length"] for metadata, data in parts)
        with client.websocket_connect(SOCKET) as other:
            other.send_json({"type": "session.join", "id": start["id"], "from_chunk": 0})
            assert heard(other, "video.start")["id"] == start["id"]
            assert [fragment(other) for _ in range(4)] == parts


def test_a_client_of_vllm_omni_gets_what_its_protocol_says(client):
    """Its published example client, step by step: every message has the request's id, every binary frame is told of
    before, all of them in a row are one mp4 of the frames asked for, the last message counts them; then there is no
    stream any more."""
    model = {"model": "numbered", "size": "32x32", "fps": 16, "num_frames": 24, "guidance_scale": 1.0, "seed": 42}
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat", "format": "m4s", **model})
        start = socket.receive_json()
        assert (start["type"], start["format"], start["config"]["prompt"]) == ("video.start", "m4s", "a cat")
        frames, data, messages = 0, b"", []
        while (message := socket.receive_json())["type"] != "session.done":
            messages.append(message)
            assert message["type"] == "video.chunk_metadata"
            part = socket.receive_bytes()
            assert message["kind"] == "media"
            assert message["byte_length"] == len(part)
            frames, data = frames + message["num_frames"], data + part
        assert [each["transport_chunk_index"] for each in messages] == list(range(len(messages)))
        assert {each["request_id"] for each in [start, *messages, message]} == {start["request_id"]}
        assert (message["chunks"], message["stopped"], frames) == (len(messages), False, 24)
        with av.open(io.BytesIO(data)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 24
    assert not client.host.names()


def test_events_of_vllm_omni(client):
    """A repeated event is no second one, the same id with another sentence is a conflict, the newest sentence is in
    force; and a client that stops ends its stream."""

    def event(name, prompt, **more):
        return {"type": "session.interaction", "interaction": {"event_id": name, "event": {"prompt": prompt}, **more}}

    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        while fragment(socket)[0]["generation_chunk_index"] < 7:  # two seconds ahead: now it waits
            pass
        socket.send_json(event("a", "a dog", transition_chunks=0))
        first = heard(socket, "session.interaction.queued")
        socket.send_json(event("b", "a fish"))
        heard(socket, "session.interaction.queued")
        socket.send_json(event("a", "a dog", transition_chunks=0))
        assert heard(socket, "session.interaction.queued") == first
        socket.send_json(event("a", "a horse"))
        conflict = heard(socket, "error")
        assert (conflict["code"], conflict["event_id"]) == ("event_id_conflict", "a")
        for wrong in ({"transition_chunks": 3}, {"event": {"prompt": " "}}, {"event_id": ""}, {"event_id": "x" * 200}):
            socket.send_json(event("c", "a cat") | {"interaction": event("c", "a cat")["interaction"] | wrong})
            assert heard(socket, "error")["message"]
        socket.send_json({"type": "session.playback", "position_seconds": 1.0})
        metadata, _ = fragment(socket)
        assert metadata["prompt"] == "a fish"
        assert metadata["started_event_ids"] == metadata["completed_event_ids"] == ["b"]
        socket.send_json({"type": "session.stop"})
        assert heard(socket, "session.done")["stopped"] is True
    assert not client.host.names()


@contextmanager
def listening(tmp_path, **how):
    """A host and the address of a server around it, over a real socket."""
    host = Host(lambda wish: Numbered(wish.prompt), pace=Pace(ahead=1.0), folder=tmp_path)
    app = make_app(host, About(model="numbered", device="none"), **how)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield host, f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def test_curl_gets_the_file_as_it_grows(tmp_path):
    with listening(tmp_path) as (host, address):
        name = host.begin(Wish(prompt="a cat")).result(10)
        got = b""
        with httpx.stream("GET", f"{address}/v1/streams/{name}.mp4") as answer:
            assert answer.headers["content-type"] == "video/mp4"
            for data in answer.iter_raw():
                got += data
                live = host.get(name)
                if len(live.chunks) > 6:
                    break
        assert len(got) > 1000
        assert live.path.read_bytes().startswith(got)


def decoded(file, count: int, **options: str) -> np.ndarray:
    """The first frames of a video, as they are coded."""
    with av.open(str(file), timeout=20, options=options) as container:
        frames = itertools.islice(container.decode(video=0), count)
        return np.stack([frame.to_ndarray() for frame in frames])


def test_players_of_playlists_play_a_stream_as_it_grows(tmp_path):
    """libav's player of HLS, with a token: frames beyond what anybody was ahead at first, as the file has them."""
    with listening(tmp_path, access=Access(token="a&b")) as (host, address):
        name = host.begin(Wish(prompt="a cat")).result(10)
        live = host.get(name)
        _until(lambda: live.chunks)
        # Unless told so libav begins three pieces before the newest, and leaves EXT-X-START unread.
        played = decoded(f"{address}/v1/streams/{name}.m3u8?token=a%26b", 30, live_start_index="0")
        kept = decoded(live.path, 30)
        assert (played == kept).all()
        auth = {"authorization": "Bearer a&b"}
        before = httpx.get(f"{address}/v1/streams/{name}.m3u8", headers=auth).text
        live.rewind(1).result(10)
        old = next(line for line in before.splitlines() if line.endswith("0.m4s"))
        assert httpx.get(f"{address}/v1/streams/{old}", headers=auth).status_code == 404
        assert "/1/0.m4s" in httpx.get(f"{address}/v1/streams/{name}.m3u8", headers=auth).text
        assert host.get(name).viewers == 1  # who asks again and again


def test_a_sentence_is_queued_and_its_chunk_says_so(client):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        fragment(socket)
        event = {"event_id": "e1", "event": {"prompt": "a dog"}}
        socket.send_json({"type": "session.interaction", "interaction": event})
        queued = heard(socket, "session.interaction.queued")
        number = 0
        while number < queued["generation_chunk_index"]:
            socket.send_json({"type": "session.playback", "position_seconds": 1e6})
            metadata, _ = fragment(socket)
            number = metadata["generation_chunk_index"]
        assert metadata["prompt"] == "a dog"
        assert metadata["started_event_ids"] == ["e1"]


def test_going_back_and_branching(client):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        before = [fragment(socket)[1] for _ in range(4)]
        socket.send_json({"type": "session.rewind", "chunk": 2})
        back = heard(socket, "video.rewind")
        assert (back["chunk"], back["position_seconds"]) == (2, 0.5)
        assert [fragment(socket)[1] for _ in range(2)] == before[2:]
        socket.send_json({"type": "session.fork", "chunk": 1, "seed": 9})
        forked = heard(socket, "session.forked")
        with client.websocket_connect(SOCKET) as other:
            other.send_json({"type": "session.join", "id": forked["id"], "from_chunk": 0})
            parts = [fragment(other)[1] for _ in range(2)]
        assert parts[0] == before[0]
        assert parts[1] != before[1]


def test_a_stream_is_described_and_drawn_and_downloaded(client):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        name = heard(socket, "video.start")["id"]
        fragment(socket)
        told = client.get(f"/v1/streams/{name}").json()
        assert told["prompt"] == "a cat"
        assert told["viewers"] == 1
        assert client.get("/v1/streams").json()["data"][0]["id"] == name
        fragment(socket)
        (newest,) = client.get("/v1/streams?chunks=last").json()["data"][0]["chunks"]
        assert newest["number"] >= 1
        assert client.get(f"/v1/streams/{name}/thumbnails/0.png").content.startswith(b"\x89PNG")
        whole = client.get(f"/v1/streams/{name}/whole.mp4")
        with av.open(io.BytesIO(whole.content)) as container:
            assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["a cat"]
        metrics = dict(re.findall(r"(?m)^(\w+) (\S+)$", client.get("/metrics").text))
        assert int(metrics["rehyat_chunks_total"]) >= 2
        assert int(metrics["rehyat_snapshots"]) >= 2
        assert int(metrics["rehyat_snapshot_bytes"]) in range(2 * 32, 1 << 20, 32)  # of a Numbered's state
        if "process_resident_memory_bytes" in metrics:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = int(metrics["process_resident_memory_bytes"])
            assert abs(resident / (pages * os.sysconf("SC_PAGE_SIZE")) - 1) < 0.1
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/about").json()["words"] == ["cat"]


def test_the_page_is_whole_and_its_policy_strict(client):
    page = client.get("/")
    assert "<script src=" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for part in ("page.js", "style.css"):
        assert client.get(f"/page/{part}").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8765"},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:9999"},
        {"origin": "null"},
    ],
    ids=lambda headers: str(headers),
)
def test_foreign_names_and_foreign_pages_are_refused(client, headers):
    assert client.get("/v1/streams", headers=headers).status_code == 403
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(SOCKET, headers=headers):
        pass
    assert refused.value.status_code == 403
    assert not client.host.names()


def test_a_token_is_asked_for(tmp_path):
    with serving(tmp_path, access=Access(token="right")) as client:
        assert client.get("/v1/about").status_code == 401
        assert client.get("/health").json() == {"status": "ok"}  # whoever restarts a server knows no token
        assert client.get("/v1/about?token=wrong").status_code == 401
        assert client.get("/v1/about?token=right").status_code == 200
        assert client.get("/v1/about", headers={"authorization": "Bearer right"}).status_code == 200


@pytest.mark.parametrize(
    "message",
    [
        {"type": "session.start"},
        {"type": "session.start", "prompt": 5},
        {"type": "session.start", "prompt": "x" * 3000},
        {"type": "session.start", "prompt": "a cat", "seed": "1"},
        {"type": "session.start", "prompt": "a cat", "seed": True},
        {"type": "session.start", "prompt": "a cat", "format": "mpegts"},
        {"type": "session.start", "prompt": "a cat", "fps": 24},
        {"type": "session.start", "prompt": "a cat", "num_frames": 0},
        {"type": "session.start", "prompt": "a cat", "size": "large"},
        {"type": "session.start", "prompt": "a cat", "flow_shift": 5.0},
        {"type": "session.join", "id": "../../etc/passwd"},
        {"type": "session.join", "id": "0" * 16},
        {"type": "nothing"},
        {},
    ],
    ids=str,
)
def test_hostile_first_messages_are_answered_in_a_sentence(client, message):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json(message)
        assert heard(socket, "error")["message"]
        with pytest.raises(WebSocketDisconnect):
            heard(socket, "video.start")
    assert not client.host.names()


@pytest.mark.parametrize(
    "message",
    [
        "not json",
        "[" * 10_000,
        '{"type": "session.rewind", "chunk": -1}',
        '{"type": "session.rewind", "chunk": 1000000}',
        '{"type": "session.rewind", "chunk": true}',
        '{"type": "session.playback", "position_seconds": -1}',
        '{"type": "session.interaction", "interaction": {"event": {"prompt": 3}}}',
        '{"type": "session.interaction"}',
        "x" * 70_000,
    ],
    ids=lambda message: message[:40],
)
def test_hostile_messages_leave_the_stream_as_it_is(client, message):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        fragment(socket)
        socket.send_text(message)
        assert heard(socket, "error")["message"]
        socket.send_json({"type": "session.ping"})
        heard(socket, "session.pong")
        assert fragment(socket)[1]


def test_a_client_that_asks_for_nothing_is_not_waited_for(client, monkeypatch):
    monkeypatch.setattr("rehyat_jax.serve.realtime._PATIENCE", 0.05)
    with client.websocket_connect(SOCKET) as socket, pytest.raises(WebSocketDisconnect):
        socket.receive_json()


def test_no_more_streams_than_may_be(tmp_path):
    with serving(tmp_path, streams=1) as client, client.websocket_connect(SOCKET) as one:
        one.send_json({"type": "session.start", "prompt": "a cat"})
        fragment(one)
        with client.websocket_connect(SOCKET) as other:
            other.send_json({"type": "session.start", "prompt": "a dog"})
            assert "try again later" in heard(other, "error")["message"]


def test_a_stream_that_nobody_watches_is_ended(tmp_path):
    with serving(tmp_path, idle=0.2) as client:
        with client.websocket_connect(SOCKET) as socket:
            socket.send_json({"type": "session.start", "prompt": "a cat"})
            fragment(socket)
        until = time.monotonic() + 10
        while client.host.names() and time.monotonic() < until:
            time.sleep(0.05)
        assert not client.host.names()
        assert not list(tmp_path.glob("*.mp4"))


def _kept(tmp_path) -> Host:
    return Host(lambda wish: Numbered(wish.prompt, wish.seed), resume=resumed, pace=Pace(ahead=1e9), folder=tmp_path)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("handed_in", [False, True])
def test_streams_in_a_kept_folder_go_on_with_another_server(tmp_path, torn, handed_in):
    """Ended in order, or killed after the state: what was made beyond it is made again, the same bytes. So do streams
    that went on from a saved state."""
    host = _kept(tmp_path)
    if handed_in:
        content = {"prompt": "a cat", "seed": 4, "past": 9, "frames": 40}
        name = host.begin_saved(json.dumps(content).encode()).result(10)
    else:
        name = host.begin(Wish(prompt="a cat", seed=4)).result(10)
    live = host.get(name)
    live.join()
    _until(lambda: len(live.chunks) >= 5)
    if torn:
        host._save = lambda *_: None
        made = len(live.chunks)
        _until(lambda: len(live.chunks) >= made + 3)
    host.close()
    before = live.path.read_bytes()

    host = _kept(tmp_path)
    _until(lambda: host.names() == [name])
    live = host.get(name)
    assert live.thumbnail(0).startswith(b"\x89PNG")
    live.join()
    _until(lambda: live.path.stat().st_size > len(before))
    with live._lock:
        assert live.path.read_bytes().startswith(before)
    gone = live.rewind(0)
    with pytest.raises(RehyatError, match="cannot go back further"):
        gone.result(10)
    host.end(name)
    host.close()
    assert not list(tmp_path.iterdir())


def test_a_saved_state_is_handed_in(tmp_path):
    host = Host(lambda wish: Numbered(wish.prompt), resume=resumed, pace=Pace(ahead=2.0))
    app = make_app(host, About(model="numbered", device="none"))
    with TestClient(app, base_url="http://localhost:8765") as client, client.websocket_connect(SOCKET) as one:
        one.send_json({"type": "session.start", "prompt": "a cat"})
        name = heard(one, "video.start")["id"]
        fragment(one)
        saved = client.get(f"/v1/streams/{name}/state").content
        told = client.post("/v1/streams", content=saved).json()
        assert told["prompt"] == "a cat"
        for hostile in (b"", b"{}", b"\x00" * 100, b'{"prompt": "x"}'):
            answer = client.post("/v1/streams", content=hostile)
            assert answer.status_code == 400
            assert "no saved stream" in answer.json()["error"]["message"]


def _until(what, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stream_that_ends_while_it_is_kept_leaves_nothing(tmp_path):
    """Ended by a viewer's thread just before the host's own writes: as late as may be."""
    host = _kept(tmp_path)
    name = host.begin(Wish(prompt="a cat", seed=4)).result(10)
    live = host.get(name)
    live.join()
    _until(lambda: live.chunks)
    held = host._held[name]
    host.end(name)
    host._save(name, held)
    host.close()
    assert not list(tmp_path.iterdir())


def test_a_video_that_is_handed_out_says_how_it_was_made(tmp_path):
    """The sentences by second, as the host's description has them, and as chapters; a state by a message."""
    told = []

    def described(stream, sentences):
        told.append(dict(sentences))
        return {"comment": "by the test"}

    host = Host(lambda wish: Numbered(wish.prompt), describe=described, pace=Pace(ahead=1e9), folder=tmp_path)
    app = make_app(host, About(model="numbered", device="none"))
    with TestClient(app, base_url="http://localhost:8765") as client, client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat"})
        start = heard(socket, "video.start")
        assert (start["width"], start["height"], start["num_inference_steps"]) == (32, 32, 1)
        fragment(socket)
        socket.send_json({"type": "session.interaction", "interaction": {"event": {"prompt": "a dog"}}})
        while fragment(socket)[0]["prompt"] != "a dog":
            pass
        whole = client.get(f"/v1/streams/{start['id']}/whole.mp4")
        with av.open(io.BytesIO(whole.content)) as container:
            assert container.metadata["comment"] == "by the test"
            assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["a cat", "a dog"]
        assert list(told[0].values()) == ["a cat", "a dog"]
        assert min(told[0]) == 0
        socket.send_json({"type": "session.save"})
        assert client.get(heard(socket, "session.saved")["state"]).status_code == 200


def test_what_a_live_stream_does_not_take_is_said(client):
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json({"type": "session.start", "prompt": "a cat", "image_reference": "data:…"})
        assert "image_reference" in heard(socket, "error")["message"]
