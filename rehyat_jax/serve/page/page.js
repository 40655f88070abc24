"use strict";
// One page, one stream at a time: fragments come over a WebSocket and go unchanged into a SourceBuffer.

const at = (id) => document.getElementById(id);
const video = at("video");
const token = new URLSearchParams(location.search).get("token");
const withToken = (path) => (token ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token)}` : path);
const known = [];
let view = null;

class View {
  // What is shown of one stream: its socket, its buffer, its time line.
  constructor(first) {
    this.id = null;
    this.fps = 16;
    this.chunks = [];
    this.queue = [];
    this.expecting = null;
    this.marked = null;
    this.made = [];
    this.ended = false;
    this.source = null;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}${withToken("/v1/realtime/video")}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.say(first);
    this.socket.onmessage = (message) => this.heard(message.data);
    this.socket.onclose = () => { if (view === this && !this.ended) tell("The connection has ended."); };
    this.timer = setInterval(() => this.tick(), 250);
  }

  say(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  heard(data) {
    if (data instanceof ArrayBuffer) {
      this.append(data);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "video.start") this.start(message);
    else if (message.type === "video.chunk_metadata") this.chunk(message);
    else if (message.type === "video.rewind") this.rewound(message);
    else if (message.type === "session.forked") watch(message.id);
    else if (message.type === "session.interaction.queued") tell("The new sentence begins with the next chunk.");
    else if (message.type === "session.done") { this.ended = true; tell("The stream has ended."); }
    else if (message.type === "error") tell(message.error.message);
  }

  start(message) {
    this.id = message.id;
    this.fps = message.fps;
    remember(this.id);
    at("save").href = withToken(`/v1/streams/${this.id}/whole.mp4`);
    at("state").href = withToken(`/v1/streams/${this.id}/state`);
    at("save").hidden = at("state").hidden = false;
    if (!("MediaSource" in window) || !MediaSource.isTypeSupported(message.mime_type)) {
      video.src = withToken(`/v1/streams/${this.id}.mp4`);
      video.play().catch(() => {});
      return;
    }
    this.source = new MediaSource();
    this.source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(video.src);
      this.buffer = this.source.addSourceBuffer(message.mime_type);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    }, { once: true });
    video.src = URL.createObjectURL(this.source);
  }

  append(data) {
    if (!this.source) return;
    this.queue.push(() => this.buffer.appendBuffer(data));
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    const task = this.queue.shift();
    if (task) {
      try {
        task();
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        this.queue.unshift(task);
        this.buffer.remove(0, Math.max(0.1, video.currentTime - 10));
      }
      return;
    }
    if (video.paused && !this.paused && video.buffered.length) {
      if (video.currentTime < video.buffered.start(0)) video.currentTime = video.buffered.start(0);
      video.play().catch(() => {});
    }
  }

  chunk(message) {
    const number = message.generation_chunk_index;
    const before = this.chunks[number - 1];
    this.chunks[number] = message;
    this.made.push([performance.now(), message.num_frames, message.seconds]);
    if (this.made.length > 8) this.made.shift();
    const item = document.createElement("li");
    item.dataset.prompt = message.prompt;
    if (!before || before.prompt !== message.prompt) {
      item.className = "sentence";
      tell(message.prompt);
    }
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Chunk ${number}, ${(message.first_frame / this.fps).toFixed(1)} seconds: ${message.prompt}`);
    const image = document.createElement("img");
    image.alt = "";
    image.src = withToken(`/v1/streams/${this.id}/thumbnails/${number}.png?v=${message.transport_chunk_index}`);
    button.append(image);
    button.onclick = (event) => (event.shiftKey ? this.branch(number) : this.goBack(number));
    item.append(button);
    at("line").append(item);
    if (this.marked === null) item.scrollIntoView({ block: "nearest", inline: "end" });
  }

  goBack(number) { this.say({ type: "session.rewind", chunk: number }); }

  branch(number) { this.say({ type: "session.fork", chunk: number }); }

  rewound(message) {
    const offset = this.chunks.findIndex((chunk) => chunk);
    this.chunks.length = Math.min(this.chunks.length, message.chunk);
    const items = at("line").children;
    while (items.length > Math.max(0, message.chunk - offset)) at("line").lastChild.remove();
    const time = message.position_seconds;
    if (this.source) {
      this.queue = [() => {
        if (video.currentTime >= time) video.currentTime = Math.max(0, time - 1 / this.fps);
        this.buffer.remove(time, Infinity);
      }];
      this.next();
    }
    tell("Went back.");
  }

  tick() {
    const end = video.buffered.length ? video.buffered.end(video.buffered.length - 1) : 0;
    const spent = this.made.reduce((sum, made) => sum + made[2], 0);
    const frames = this.made.reduce((sum, made) => sum + made[1], 0);
    const rate = spent ? frames / spent : 0;
    at("made").textContent = rate ? `${rate.toFixed(1)} frames/s` : "–";
    // A machine that makes fewer frames than are shown: evenly slower, and said so, is better than stops.
    const speed = rate && this.made.length > 2 ? Math.min(1, Math.max(0.1, (0.97 * rate) / this.fps)) : 1;
    video.playbackRate = speed > 0.95 ? 1 : speed;
    at("slow").textContent = video.playbackRate < 1 ? `, slowed to ${Math.round(video.playbackRate * 100)} %` : "";
    at("ahead").textContent = `${Math.max(0, end - video.currentTime).toFixed(1)} s`;
    at("time").textContent = `${video.currentTime.toFixed(1)} s`;
    const quality = video.getVideoPlaybackQuality ? video.getVideoPlaybackQuality().totalVideoFrames : 0;
    const now = performance.now();
    if (!this.last) this.last = [now, quality];
    if (now - this.last[0] > 1000) {
      at("shown").textContent = `${(((quality - this.last[1]) * 1000) / (now - this.last[0])).toFixed(0)} frames/s`;
      this.last = [now, quality];
    }
    this.say({ type: "session.playback", position_seconds: video.currentTime });
    const playing = this.chunks.findIndex((chunk) => chunk && (chunk.first_frame + chunk.num_frames) / this.fps > video.currentTime);
    const offset = this.chunks.findIndex((chunk) => chunk);
    [...at("line").children].forEach((item, index) => item.classList.toggle("now", index + offset === playing));
  }

  close() {
    this.ended = true;
    clearInterval(this.timer);
    this.socket.close();
    at("line").replaceChildren();
  }
}

function tell(words) { at("told").textContent = words; }

function remember(id) {
  if (!known.includes(id)) known.push(id);
  at("streams").replaceChildren(...known.map((name, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `Stream ${index + 1}`;
    button.setAttribute("aria-pressed", String(view && view.id === name));
    button.onclick = () => watch(name);
    return button;
  }));
}

function show(first) {
  if (view) view.close();
  view = new View(first);
  at("go").textContent = "Change";
}

function watch(id) { show({ type: "session.join", id, from_chunk: 0 }); }

function begin() {
  const number = (id, parse) => (at(id).value === "" ? undefined : parse(at(id).value));
  show({
    type: "session.start",
    prompt: at("prompt").value,
    format: "m4s",
    seed: number("seed", (text) => parseInt(text, 10)),
    num_inference_steps: number("steps", (text) => parseInt(text, 10)),
    guidance_scale: number("guidance", parseFloat),
  });
  tell("The first chunk is being made.");
}

at("say").addEventListener("submit", (event) => {
  event.preventDefault();
  if (view && !view.ended && view.id) {
    view.say({
      type: "session.interaction",
      interaction: { event_id: String(Date.now()), event: { prompt: at("prompt").value } },
    });
  } else {
    begin();
  }
});
at("anew").addEventListener("click", () => { if (at("say").reportValidity()) begin(); });
at("pause").addEventListener("click", pause);

at("load").addEventListener("change", async () => {
  const [file] = at("load").files;
  if (!file) return;
  const answer = await fetch(withToken("/v1/streams"), { method: "POST", body: file });
  const told = await answer.json();
  if (answer.ok) watch(told.id);
  else tell(told.error.message);
  at("load").value = "";
});

function pause() {
  const paused = !video.paused;
  if (view) view.paused = paused;
  if (paused) video.pause();
  else video.play().catch(() => {});
  at("pause").textContent = paused ? "Play" : "Pause";
}

function scale() {
  // Whole multiples of the picture's own size, so that its pixels stay square and sharp.
  if (!video.videoWidth) return;
  const times = Math.max(1, Math.floor(Math.min(at("stage").clientWidth, 512) / video.videoWidth));
  video.style.width = `${video.videoWidth * times}px`;
}
video.addEventListener("loadedmetadata", scale);
window.addEventListener("resize", scale);

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement) return;
  const buttons = [...at("line").querySelectorAll("button")];
  const index = buttons.indexOf(document.activeElement);
  if (event.key === "/") at("prompt").focus();
  else if (event.key === " " && !(event.target instanceof HTMLButtonElement)) pause();
  else if (event.key === "ArrowLeft" && buttons.length) buttons[Math.max(0, (index < 0 ? buttons.length : index) - 1)].focus();
  else if (event.key === "ArrowRight" && buttons.length) buttons[Math.min(buttons.length - 1, index + 1)].focus();
  else if (event.key.toLowerCase() === "b" && index >= 0) buttons[index].dispatchEvent(new MouseEvent("click", { shiftKey: true, bubbles: true }));
  else return;
  event.preventDefault();
});

fetch(withToken("/v1/about")).then((answer) => answer.json()).then((about) => {
  at("device").textContent = `${about.model}, ${about.device}`;
  at("prompt").value = about.example;
  at("words").append(...about.words.map((word) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word;
    button.onclick = () => {
      at("prompt").value = `${at("prompt").value.trimEnd()} ${word}`.trimStart();
      at("prompt").focus();
    };
    return button;
  }));
});
