"use strict";
// One page, one stream at a time: fragments come over a WebSocket and go unchanged into a SourceBuffer.

const at = (id) => document.getElementById(id);
const video = at("video");
const token = new URLSearchParams(location.search).get("token");
const withToken = (path) => (token ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(token)}` : path);
// Of phones that have no MediaSource of the old kind.
const Source = window.ManagedMediaSource || window.MediaSource;
let models = [];
let view = null;

class View {
  // What is shown of one stream: its socket, its buffer, its time line.
  constructor(first) {
    this.id = null;
    this.fps = 16;
    this.chunks = [];
    this.queue = [];
    this.expecting = null;
    this.made = [];
    this.ended = false;
    this.source = null;
    this.size = [0, 0];
    this.turns = 0;
    this.waiting = [first];
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}${withToken("/v1/realtime/video")}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.waiting.splice(0).forEach((message) => this.say(message));
    this.socket.onmessage = (message) => this.heard(message.data);
    this.socket.onclose = () => {
      if (view !== this || this.ended) return;
      this.ended = true;
      at("go").textContent = "Start";
      tell(this.id ? "The connection has ended." : "The server cannot be reached.");
    };
    this.timer = setInterval(() => this.tick(), 250);
  }

  say(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    else if (this.socket.readyState === WebSocket.CONNECTING && message.type !== "session.playback") this.waiting.push(message);
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
    else if (message.type === "session.done") { this.ended = true; at("go").textContent = "Start"; tell("The stream has ended."); list(); }
    else if (message.type === "error") {
      tell(message.message);
      if (!this.id) { this.ended = true; at("go").textContent = "Start"; }
    }
  }

  start(message) {
    this.id = message.id;
    this.fps = message.fps;
    this.size = [message.width, message.height];
    at("how").textContent = message.num_inference_steps + (message.guidance_scale > 1 ? `, guidance ${message.guidance_scale}` : "");
    list();
    at("save").href = withToken(`/v1/streams/${this.id}/whole.mp4`);
    at("state").href = withToken(`/v1/streams/${this.id}/state`);
    at("save").hidden = at("state").hidden = false;
    if (!Source || !Source.isTypeSupported(message.mime_type)) {
      this.plain(0);
      return;
    }
    this.source = new Source();
    video.disableRemotePlayback = "ManagedMediaSource" in window;
    this.source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(video.src);
      this.buffer = this.source.addSourceBuffer(message.mime_type);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    }, { once: true });
    this.source.addEventListener("startstreaming", () => this.next());
    video.src = URL.createObjectURL(this.source);
  }

  plain(time) {
    // For a browser that cannot be given fragments: a playlist, or else the growing file itself. Both end where the
    // stream goes back.
    const kind = video.canPlayType("application/vnd.apple.mpegurl") ? "m3u8" : "mp4";
    const turn = this.turns++;
    video.src = withToken(`/v1/streams/${this.id}.${kind}?v=${turn}`);
    video.onloadedmetadata = () => { video.currentTime = time; };
    // Chromium takes a playlist that names one fragment as yet for a whole video: it goes on where that ended.
    video.onended = () => setTimeout(() => {
      if (view === this && !this.ended && this.turns === turn + 1) this.plain(video.currentTime);
    }, 250);
    video.play().catch(() => {});
  }

  append(data) {
    if (!this.source) return;
    this.queue.push(() => this.buffer.appendBuffer(data));
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    // A managed source says when it wants none, and may have dropped what was played.
    if (this.source.streaming === false) return;
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
      list();
    }
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Chunk ${number}, ${(message.first_frame / this.fps).toFixed(1)} seconds: ${message.prompt}`);
    const image = document.createElement("img");
    image.alt = "";
    image.loading = "lazy";
    button.tabIndex = -1;
    image.src = withToken(`/v1/streams/${this.id}/thumbnails/${number}.png?v=${message.transport_chunk_index}`);
    button.append(image);
    button.onclick = (event) => (event.shiftKey || branching() ? this.branch(number) : this.goBack(number));
    item.append(button);
    // The line follows, unless somebody looks at what was before; the page stays where it is.
    const line = at("line");
    const follows = line.scrollLeft + line.clientWidth > line.scrollWidth - 80;
    line.append(item);
    if (follows) line.scrollLeft = line.scrollWidth;
  }

  goBack(number) { this.say({ type: "session.rewind", chunk: number }); }

  branch(number) {
    at("branching").setAttribute("aria-pressed", "false");
    this.say({ type: "session.fork", chunk: number });
  }

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
    } else this.plain(Math.max(0, time - 1));
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
    const real = rate >= this.fps;
    at("badge").hidden = !(rate && this.made.length > 2);
    at("badge").classList.toggle("slower", !real);
    at("badge").textContent = real ? "real time" : `${Math.round((100 * rate) / this.fps)} % of real time`;
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
    this.say({ type: "session.playback", position_seconds: this.place() });
    // Of a stream of hours the line is long: what changes alone is touched.
    const playing = this.chunks.findLastIndex((chunk) => chunk && chunk.first_frame / this.fps <= video.currentTime);
    const item = at("line").children[playing - this.chunks.findIndex((chunk) => chunk)];
    if (item === this.playing) return;
    this.mark(this.playing, false);
    this.mark(item, true);
    this.playing = item;
  }

  mark(item, now) {
    if (!item) return;
    item.classList.toggle("now", now);
    item.firstChild.tabIndex = now ? 0 : -1;
    if (now) item.firstChild.setAttribute("aria-current", "true");
    else item.firstChild.removeAttribute("aria-current");
  }

  place() {
    // Where the picture is. Browsers drop what they have no room for: over a gap it goes on at what is there, and where
    // nothing is there at what is made next.
    const time = video.currentTime;
    if (!this.source || !this.buffer) return time;
    const ranges = [...Array(video.buffered.length).keys()].map((each) => [video.buffered.start(each), video.buffered.end(each)]);
    if (ranges.some(([start, end]) => start <= time && time < end)) return time;
    const later = ranges.find(([start]) => start > time);
    if (later) {
      video.currentTime = later[0];
      return later[0];
    }
    const last = this.chunks.at(-1);
    const idle = !this.queue.length && !this.buffer.updating;
    return last && idle ? (last.first_frame + last.num_frames) / this.fps : time;
  }

  close() {
    this.ended = true;
    clearInterval(this.timer);
    this.socket.close();
    at("line").replaceChildren();
  }
}

function tell(words) { at("told").textContent = words; }

function unknown() {
  // Of a model that knows few words: those that it does not.
  const known = [...at("words").children].map((button) => button.textContent);
  const words = at("prompt").value.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
  const none = known.length ? [...new Set(words)].filter((word) => !known.includes(word)) : [];
  at("unknown").textContent = none.length ? `Not among the words of this model: ${none.join(", ")}.` : "";
}

function step(button, by) {
  // Many buttons are one stop of the Tab key; arrows go from one to the next.
  const next = by < 0 ? button.previousElementSibling : button.nextElementSibling;
  if (!next) return;
  button.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function branching() { return at("branching").getAttribute("aria-pressed") === "true"; }

function element(name, attributes, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

async function list() {
  // Every stream of the server, also those of another tab or of before a reload.
  const answer = await fetch(withToken("/v1/streams?chunks=last")).catch(() => null);
  if (!answer || !answer.ok) return;
  const { data } = await answer.json();
  at("streams").replaceChildren(...data.map((stream, index) => {
    const picture = stream.chunks.map(({ number }) =>
      element("img", { alt: "", src: withToken(`/v1/streams/${stream.id}/thumbnails/${number}.png?v=${stream.frames}`) }));
    const watching = element("button", { type: "button", className: "watch", onclick: () => watch(stream.id, stream.prompt) },
      ...picture, element("span", { textContent: `${index + 1}. ${stream.prompt}` }));
    watching.setAttribute("aria-pressed", String(Boolean(view) && view.id === stream.id));
    const ending = element("button", { type: "button", textContent: "×", onclick: () => end(stream.id) });
    ending.setAttribute("aria-label", `End stream ${index + 1}`);
    return element("li", {}, watching, ending);
  }));
}

async function end(id) {
  await fetch(withToken(`/v1/streams/${id}`), { method: "DELETE" }).catch(() => tell("The server cannot be reached."));
  list();
}

function show(first) {
  if (view) view.close();
  view = new View(first);
  at("go").textContent = "Change";
}

setInterval(() => { if (!document.hidden) list(); }, 10000);

function watch(id, prompt) {
  show({ type: "session.join", id, from_chunk: 0 });
  if (prompt) {
    at("prompt").value = prompt;
    unknown();
  }
}

function begin() {
  const number = (id, parse) => (at(id).value === "" ? undefined : parse(at(id).value));
  show({
    type: "session.start",
    model: at("model").value || undefined,
    prompt: at("prompt").value,
    format: "m4s",
    seed: number("seed", (text) => parseInt(text, 10)),
    num_inference_steps: number("steps", (text) => parseInt(text, 10)),
    guidance_scale: at("guidance").disabled ? undefined : number("guidance", parseFloat),
  });
  tell("The first chunk is being made. A server that was never run before compiles its programs for it.");
}

at("say").addEventListener("submit", (event) => {
  event.preventDefault();
  if (view && !view.ended) {
    view.say({
      type: "session.interaction",
      interaction: { event_id: String(Date.now()), event: { prompt: at("prompt").value } },
    });
  } else {
    begin();
  }
});
at("prompt").addEventListener("input", unknown);
at("anew").addEventListener("click", () => { if (at("say").reportValidity()) begin(); });
at("pause").addEventListener("click", pause);
at("branching").addEventListener("click", () => at("branching").setAttribute("aria-pressed", String(!branching())));
at("model").addEventListener("change", settle);

at("load").addEventListener("change", async () => {
  const [file] = at("load").files;
  if (!file) return;
  try {
    const answer = await fetch(withToken("/v1/streams"), { method: "POST", body: file });
    const told = await answer.json();
    if (answer.ok) watch(told.id, told.prompt);
    else tell(told.error.message);
  } catch {
    tell("The server cannot be reached.");
  }
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
  // Whole multiples of the model's own picture, which the file has enlarged, so that its pixels stay square and sharp.
  const width = (view && view.size[0]) || video.videoWidth;
  if (!width) return;
  const times = Math.max(1, Math.floor(Math.min(at("stage").clientWidth, 512) / width));
  video.style.width = `${width * times}px`;
}

function settle() {
  // What the chosen model is run with, and what it has no use for.
  const model = models.find((each) => each.name === at("model").value);
  if (!model) return;
  at("steps").placeholder = String(model.steps);
  at("offered").replaceChildren(...model.offered_steps.map((value) => element("option", { value })));
  at("guidance").disabled = !model.guided;
  at("guidance").placeholder = model.guided ? String(model.guidance) : "none";
  at("guidance").title = model.guided ? "" : "This model was trained to need none.";
  if (!model.guided) at("guidance").value = "";
}
video.addEventListener("loadedmetadata", scale);
window.addEventListener("resize", scale);

document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const buttons = [...at("line").querySelectorAll("button")];
  const index = buttons.indexOf(document.activeElement);
  if (event.key === "/") at("prompt").focus();
  else if (event.key === " " && !(event.target instanceof HTMLButtonElement)) pause();
  else if (event.key.startsWith("Arrow") && at("words").contains(event.target)) step(event.target, event.key === "ArrowLeft" || event.key === "ArrowUp" ? -1 : 1);
  else if (event.key === "ArrowLeft" && buttons.length) buttons[Math.max(0, (index < 0 ? buttons.length : index) - 1)].focus();
  else if (event.key === "ArrowRight" && buttons.length) buttons[Math.min(buttons.length - 1, index + 1)].focus();
  else if (event.key.toLowerCase() === "n") at("anew").click();
  else if (event.key.toLowerCase() === "s" && !at("save").hidden) at("save").click();
  else if (event.key.toLowerCase() === "b" && index >= 0) buttons[index].dispatchEvent(new MouseEvent("click", { shiftKey: true, bubbles: true }));
  else return;
  event.preventDefault();
});

fetch(withToken("/v1/about")).then((answer) => answer.json()).then((about) => {
  at("device").textContent = `${about.model} on ${about.device}`;
  models = about.models;
  at("model").replaceChildren(...models.map(({ name }) => element("option", { value: name, textContent: name })));
  settle();
  at("prompt").value = about.example;
  at("words").append(...about.words.map((word) => {
    const button = element("button", { type: "button", textContent: word, tabIndex: -1 });
    button.onclick = () => {
      at("prompt").value = `${at("prompt").value.trimEnd()} ${word}`.trimStart();
      at("prompt").focus();
      unknown();
    };
    return button;
  }));
  if (about.words.length) at("words").firstChild.tabIndex = 0;
  unknown();
}).catch(() => tell("The server cannot be reached."));
list();
