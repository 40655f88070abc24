"""Memory of ``rehyat serve`` while one viewer watches a stream for ten minutes: it should be flat to one per cent.

``python -m benchmarks.serve_memory --minutes 10 --steps 4``. Once a minute (``--every`` so many seconds) the sentence
changes. What the server tells of itself (``/metrics``) is read once a second; a minute is what its samples' median is:
resident memory, which is to be flat; what of it is in use and free in the C library's heap, and the snapshots', which
say what moves where it is not. The first two minutes (``--warm``) are left out: the compiler's, and until there are as
many snapshots as there may be. Frames a second are those of all the minutes and of the slowest, which has to be 16
where frames are shown in real time. ``--sawtooth`` adds the least and the most of each minute. Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from websockets.sync.client import connect

SENTENCES = ("a koala moving right slowly on a red background", "a lemon moving up slowly on a blue background")


#: Megabytes of what the server tells, by the names that are printed.
TOLD = {
    "megabytes": "process_resident_memory_bytes",
    "heap_used": "rehyat_heap_used_bytes",
    "heap_free": "rehyat_heap_free_bytes",
    "snapshots": "rehyat_snapshot_bytes",
}


def told(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        values = dict(re.findall(r"(?m)^(\w+) (\S+)$", answer.read().decode()))
    return {name: float(values[metric]) / 1e6 for name, metric in TOLD.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--warm", type=int, default=2, help="minutes before these, which do not count")
    parser.add_argument("--every", type=float, default=60.0, help="seconds after which the sentence changes")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own when not given")
    parser.add_argument("--model", default="mini-sprites")
    parser.add_argument("--sawtooth", action="store_true", help="also the least and the most of each minute")
    options = parser.parse_args()
    command = [sys.executable, "-m", "rehyat_jax", "serve", "--port", "0", "--model", options.model]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://[^/]+", line)))
        try:
            print(json.dumps(watched(address, options)))
        finally:
            server.terminate()


def watched(address: str, options: argparse.Namespace) -> dict[str, object]:
    """Watch for so many minutes and the warm ones; what the memory was, and how fast frames came."""
    samples: list[list[dict[str, float]]] = [[] for _ in range(options.warm + options.minutes)]
    frames = [0] * len(samples)
    with connect(address.replace("http", "ws") + "/v1/realtime/video", max_size=None) as socket:
        start = {"type": "session.start", "prompt": SENTENCES[0], "num_inference_steps": options.steps}
        socket.send(json.dumps(start))
        begun, last, said = time.monotonic(), 0.0, 0
        while (passed := time.monotonic() - begun) < 60 * len(samples):
            heard = socket.recv(timeout=120)
            if isinstance(heard, str):
                message = json.loads(heard)
                assert message["type"] != "error", message
                if message["type"] == "video.chunk_metadata":
                    # As a player that shows what is there at once.
                    position = (message["first_frame"] + message["num_frames"]) / 16
                    socket.send(json.dumps({"type": "session.playback", "position_seconds": position}))
                    frames[min(int(passed // 60), len(frames) - 1)] += message["num_frames"]
            if passed - last >= 1:
                last = passed
                samples[min(int(passed // 60), len(samples) - 1)].append(told(address))
            if passed // options.every > said:
                said += 1
                event = {"event_id": str(said), "event": {"prompt": SENTENCES[said % 2]}}
                socket.send(json.dumps({"type": "session.interaction", "interaction": event}))
    counted = [minute for minute in samples[options.warm :] if minute]

    def by_minute(name: str, of: Callable[[list[float]], float] = statistics.median) -> list[float]:
        return [round(of([each[name] for each in minute]), 1) for minute in counted]

    medians = {name: by_minute(name) for name in TOLD}
    if options.sawtooth:
        medians |= {"least": by_minute("megabytes", min), "most": by_minute("megabytes", max)}
    minutes = medians["megabytes"]
    return {
        "minutes": len(minutes),
        "frames_per_second": round(sum(frames[options.warm :]) / (60 * options.minutes), 2),
        "slowest_minute": round(min(frames[options.warm :]) / 60, 2),
        **medians,
        "grown": round(minutes[-1] / minutes[0] - 1, 4),
        "between": round(max(minutes) / min(minutes) - 1, 4),
    }


if __name__ == "__main__":
    main()
