"""OpenAI's interface for videos: ``POST /v1/videos`` and its kin, as JSON or a form, over the host's jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import Sequence
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from rehyat_jax.errors import RehyatError
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.jobs import Job
from rehyat_jax.serve.wish import LENGTH, Wish, check_rate, frames_of
from rehyat_jax.video.images import read_image

#: Fields of a form that are numbers; in JSON they are numbers already.
_WHOLE, _REAL = ("seed", "num_frames", "num_inference_steps", "fps"), ("guidance_scale", "seconds")
#: Of a video where a client says nothing.
_SECONDS = 4
#: Of an image that a client sends.
_MOST_PIXELS = 1 << 24


def video_routes(host: Host, names: Sequence[str]) -> list[Route]:
    """The routes ``/v1/models``, ``/v1/videos``, ``/v1/videos/ID`` and ``/v1/videos/ID/content``.

    Args:
        names: of the models; the first is meant where a client names none.
    """

    async def models(_: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "rehyat"} for name in names]}
        )

    async def create(request: Request) -> Response:
        fields = await _fields(request)
        if fields.get("model") in (None, ""):
            fields["model"] = names[0]
        if fields["model"] not in names:
            raise RehyatError(f"there is no model {str(fields['model'])[:80]!r} here, only {', '.join(names)}")
        image = fields.pop("input_reference", None)
        check_rate(fields, host.pace.fps)
        wish = Wish.from_message(fields, also=LENGTH)
        if image is not None:
            wish = dataclasses.replace(wish, image=await asyncio.to_thread(_image, image))
        job = host.videos.queue(wish, frames=frames_of(fields, host.pace.fps) or _SECONDS * host.pace.fps)
        return JSONResponse(_told(job))

    async def listed(_: Request) -> Response:
        jobs = sorted(host.videos.all(), key=lambda job: -job.created)
        return JSONResponse({"object": "list", "data": [_told(job) for job in jobs], "has_more": False})

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "DELETE":
            host.videos.drop(name)
            return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})
        return JSONResponse(_told(host.videos.get(name)))

    async def content(request: Request) -> Response:
        job = host.videos.get(request.path_params["name"])
        if job.status != "completed":
            raise RehyatError(f"the video is not there: its status is {job.status}")
        return FileResponse(job.path, media_type="video/mp4", filename=f"{job.name}.mp4")

    return [
        Route("/v1/models", models),
        Route("/v1/videos", create, methods=["POST"]),
        Route("/v1/videos", listed, methods=["GET"]),
        Route("/v1/videos/{name}", one, methods=["GET", "DELETE"]),
        Route("/v1/videos/{name}/content", content),
    ]


def _told(job: Job) -> dict[str, Any]:
    wish = job.wish
    return {
        "id": job.name,
        "object": "video",
        "model": wish.model,
        "status": job.status,
        "progress": int(100 * job.done / job.frames),
        "created_at": int(job.created),
        "completed_at": None if job.completed is None else int(job.completed),
        "expires_at": None,
        "prompt": wish.prompt,
        "seconds": f"{job.frames / job.fps:g}",
        "size": f"{wish.width}x{wish.height}" if wish.width else None,
        "remixed_from_video_id": None,
        "error": None if job.error is None else {"code": "failed", "message": job.error},
    }


async def _fields(request: Request) -> dict[str, Any]:
    """The request's fields, of JSON or of either kind of form; those in ``extra_body`` among them.

    Raises:
        RehyatError: the body is none of these.
    """
    kind, body = request.headers.get("content-type", ""), await request.body()
    try:
        if kind.startswith("multipart/form-data"):
            fields = _form(kind, body)
        elif kind.startswith("application/x-www-form-urlencoded"):
            fields = dict(parse_qsl(body.decode("utf-8")))
        else:
            fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("no object")
        extra = fields.pop("extra_body", None) or {}
        fields |= json.loads(extra) if isinstance(extra, str) else dict(extra)
        for names, number in ((_WHOLE, int), (_REAL, float)):
            for name in names:
                if isinstance(fields.get(name), str):
                    fields[name] = number(fields[name])
    except (ValueError, TypeError, RecursionError) as error:
        raise RehyatError("the body must be JSON or a form with a prompt, and numbers where numbers belong") from error
    return fields


def _form(kind: str, body: bytes) -> dict[str, Any]:
    message = BytesParser(policy=HTTP).parsebytes(b"content-type: " + kind.encode("latin-1") + b"\r\n\r\n" + body)
    fields: dict[str, Any] = {}
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(data, bytes):
            fields[name] = data if part.get_filename() else data.decode("utf-8")
    return fields


def _image(content: Any) -> np.ndarray:
    """The first frame that a client sends, as a file of the form.

    Raises:
        RehyatError: it is no file, no PNG, JPEG or WebP, damaged, or too large.
    """
    wrong = RehyatError("input_reference is a PNG, JPEG or WebP, as a file of a form")
    if not isinstance(content, bytes):
        raise wrong
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise RehyatError(f"input_reference may have {_MOST_PIXELS} pixels, not {image.width}x{image.height}")
            return read_image("input_reference", image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise wrong from error
