"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const figures = all(".player");
const isImage = !data.fps;
const last = data.frames - 1;
let prompt = 0;
let frame = 0;
let playing = false;

// Clips: blobs, since a seek in a data URI reads it from its beginning.
const urls = new Map();
function url(file) {
  if (!urls.has(file)) {
    const { type, base64 } = data.files[file];
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    urls.set(file, URL.createObjectURL(new Blob([bytes], { type })));
  }
  return urls.get(file);
}

const overlayOn = () => Number(by("overlay").value) > 0;
const shownFigures = () => figures.filter((figure) => !figure.hidden);
function clips() {
  return shownFigures().flatMap((figure) => {
    const error = figure.querySelector(".error");
    return overlayOn() && error.getAttribute("src") ? [figure.querySelector(".clip"), error] : [figure.querySelector(".clip")];
  });
}

function load() {
  pause();
  for (const figure of figures) {
    const clip = data.rows[figure.dataset.row].clips[prompt];
    figure.querySelector(".clip").src = url(clip.file);
    const error = figure.querySelector(".error");
    if (clip.error) error.src = url(clip.error);
    else error.removeAttribute("src");
    figure.querySelector(".caption").textContent = clip.caption;
  }
  for (const curve of all(".curve")) curve.hidden = Number(curve.dataset.prompt) !== prompt;
  if (!isImage) seek(0);
}

// One clock: the first shown clip leads, the others follow it.
const timeOf = (index) => (index + 0.5) / data.fps;
function tell() {
  by("frame").textContent = `${frame + 1} of ${data.frames}`;
  by("scrub").value = frame;
  by("scrub").setAttribute("aria-valuetext", by("frame").textContent);
}
function seek(index) {
  frame = Math.max(0, Math.min(last, index));
  for (const clip of clips()) clip.currentTime = timeOf(frame);
  tell();
}
function rates(factor = 1) {
  for (const clip of clips()) clip.playbackRate = Number(by("rate").value) * factor;
}
async function play() {
  if (frame >= last) seek(0);
  playing = true;
  by("play").textContent = "Pause";
  by("play").setAttribute("aria-label", "Pause");
  rates();
  try {
    await Promise.all(clips().map((clip) => clip.play()));
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  requestAnimationFrame(follow);
}
function pause() {
  if (isImage) return;
  playing = false;
  by("play").textContent = "Play";
  by("play").setAttribute("aria-label", "Play");
  for (const clip of all("video")) clip.pause();
}
function follow() {
  if (!playing) return;
  const [lead, ...rest] = clips();
  if (!lead) return pause();
  const rate = Number(by("rate").value);
  for (const clip of rest) {
    const off = clip.currentTime - lead.currentTime;
    if (Math.abs(off) > 2 / data.fps && !clip.seeking) clip.currentTime = lead.currentTime;
    clip.playbackRate = Math.abs(off) < 0.25 / data.fps ? rate : rate * (off > 0 ? 0.9 : 1.1);
  }
  frame = Math.max(0, Math.min(last, Math.floor(lead.currentTime * data.fps)));
  tell();
  if (lead.ended || lead.currentTime >= timeOf(last)) {
    if (!by("loop").checked) {
      pause();
      return seek(last);
    }
    seek(0);
    for (const clip of clips()) if (clip.paused) clip.play().catch(() => {});
  }
  requestAnimationFrame(follow);
}
function stop() {
  const index = frame;
  pause();
  seek(index);
}
const restart = () => {
  const was = playing;
  stop();
  if (was) play();
};

by("prompt").addEventListener("change", (event) => {
  prompt = Number(event.target.value);
  load();
});
for (const box of all(".show")) {
  const toggle = () => (figures[box.value].hidden = !box.checked);
  box.addEventListener("change", () => {
    toggle();
    if (!isImage) restart();
  });
  toggle();
}
by("overlay").addEventListener("input", () => {
  const share = Number(by("overlay").value);
  by("shade").textContent = `${share} %`;
  const wasOn = all(".error").some((error) => Number(error.style.opacity) > 0);
  for (const error of all(".error")) error.style.opacity = share / 100;
  if (!isImage && wasOn !== overlayOn()) restart();
});
if (!isImage) {
  by("scrub").max = last;
  by("scrub").addEventListener("input", () => {
    pause();
    seek(Number(by("scrub").value));
  });
  by("play").addEventListener("click", () => (playing ? stop() : play()));
  by("back").addEventListener("click", () => { stop(); seek(frame - 1); });
  by("next").addEventListener("click", () => { stop(); seek(frame + 1); });
  by("rate").addEventListener("change", () => rates());
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, button, summary, canvas, pre, .scroll") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " ") playing ? stop() : play();
    else if (event.key === "ArrowLeft") { stop(); seek(frame - 1); }
    else if (event.key === "ArrowRight") { stop(); seek(frame + 1); }
    else return;
    event.preventDefault();
  });
}
load();

// The table: dense and noise floor stay on top.
const heads = all("#results thead th");
heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const body = document.querySelector("#results tbody.methods");
    const value = (row) => row.children[column].dataset.value;
    const compare = (a, b) => (column === 0 ? value(a).localeCompare(value(b), "en", { numeric: true }) : value(a) - value(b));
    body.append(...[...body.rows].sort((a, b) => (ascending ? compare(a, b) : compare(b, a))));
  });
});

// The heat map: layers down, steps across.
const canvas = by("heat");
const stops = [[244, 233, 201], [224, 164, 88], [181, 84, 60], [91, 31, 58]];
let spot = null;
let chosen = null;
const grid = () => {
  const row = data.rows[by("where-row").value];
  return row && row.grids[by("where-grid").value];
};
function colour(density) {
  const at = Math.min(0.9999, Math.max(0, density)) * (stops.length - 1);
  const i = Math.floor(at);
  return `rgb(${stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * (at - i))).join(" ")})`;
}
const numbersWide = 44;
const numbersHigh = 36;
const above = 6;
function sizes() {
  const { cells } = grid();
  const steps = cells[0].length;
  const whole = canvas.closest(".heat").clientWidth;
  const room = (whole > 640 ? whole - 300 : whole) - numbersWide;
  const w = Math.min(room / steps, 36);
  return { steps, layers: cells.length, w, h: Math.max(8, Math.min(w, 24, 480 / cells.length)) };
}
function hatched(pen) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const small = tile.getContext("2d");
  small.fillStyle = "#a9adb3";
  small.fillRect(0, 0, 6, 6);
  small.strokeStyle = "#7d828a";
  small.beginPath();
  for (const d of [-6, 0, 6]) { small.moveTo(d - 1, 7); small.lineTo(d + 7, -1); }
  small.stroke();
  return pen.createPattern(tile, "repeat");
}
function ticks(pen, { steps, layers, w, h }) {
  const [across, down] = [Math.ceil(24 / w), Math.ceil(16 / h)];
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--soft");
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (let i = 0; i < layers; i += down) pen.fillText(grid().layers[i][0], -6, (i + 0.5) * h);
  pen.textAlign = "center";
  for (let i = 0; i < steps; i += across) pen.fillText(i, (i + 0.5) * w, layers * h + 11);
  pen.fillText("step", (steps * w) / 2, layers * h + 28);
  pen.save();
  pen.translate(8 - numbersWide, (layers * h) / 2);
  pen.rotate(-Math.PI / 2);
  pen.fillText("layer", 0, 0);
  pen.restore();
}
function draw() {
  if (!grid()) return;
  const { steps, layers, w, h } = sizes();
  const scale = window.devicePixelRatio || 1;
  const [wide, high] = [numbersWide + steps * w, above + layers * h + numbersHigh];
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  canvas.width = Math.round(wide * scale);
  canvas.height = Math.round(high * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.translate(numbersWide, above);
  const hatch = hatched(pen);
  const gap = w > 5 && h > 5 ? 1 : 0;
  grid().cells.forEach((line, layer) => line.forEach((cell, step) => {
    if (!cell) return;
    pen.fillStyle = grid().treatments[cell[0]][0] === "dense" ? hatch : colour(cell[1]);
    pen.fillRect(step * w, layer * h, w - gap, h - gap);
  }));
  ticks(pen, { steps, layers, w, h });
  for (const [place, width] of [[chosen, 3], [spot, 1.5]]) {
    if (!place) continue;
    pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    pen.lineWidth = width;
    pen.strokeRect(place.step * w, place.layer * h, w - gap, h - gap);
  }
}
function describe(place) {
  const cell = grid().cells[place.layer][place.step];
  const [layer, name] = grid().layers[place.layer];
  if (!cell) return `Step ${place.step}, layer ${layer} (${name}): not called.`;
  const [phase, reason, backend] = grid().treatments[cell[0]];
  const why = phase === "dense" ? `left dense, ${reason}` : `${phase} by ${backend}, density ${cell[1].toFixed(3)}`;
  return `Step ${place.step}, layer ${layer} (${name}): ${why}.`;
}
function choose(place) {
  chosen = place;
  by("heat-text").textContent = describe(place);
  const cell = grid().cells[place.layer][place.step];
  const shares = cell ? grid().shares[cell[2]].map((share) => share / 1000) : [];
  by("heads").replaceChildren(...shares.map((share, head) => {
    const line = document.createElement("div");
    const bar = document.createElement("span");
    const fill = document.createElement("i");
    bar.className = "bar";
    fill.style.width = `${100 * share}%`;
    bar.append(fill);
    const label = document.createElement("span");
    label.textContent = shares.length === 1 ? "all heads" : `head ${head}`;
    const value = document.createElement("span");
    value.textContent = share.toFixed(3);
    line.append(label, bar, value);
    return line;
  }));
  const layer = String(grid().layers[place.layer][0]);
  if ([...by("mask-layer").options].some((option) => option.value === layer)) {
    by("mask-layer").value = layer;
    showMasks();
  }
  draw();
}
function placeOf(event) {
  const { steps, layers, w, h } = sizes();
  const box = canvas.getBoundingClientRect();
  const clamp = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v)));
  return { step: clamp((event.clientX - box.left - numbersWide) / w, steps), layer: clamp((event.clientY - box.top - above) / h, layers) };
}
canvas.addEventListener("mousemove", (event) => {
  spot = placeOf(event);
  canvas.title = describe(spot);
  draw();
});
canvas.addEventListener("mouseleave", () => { spot = null; draw(); });
canvas.addEventListener("click", (event) => choose(placeOf(event)));
canvas.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const { steps, layers } = sizes();
  const at = spot || chosen || { step: 0, layer: 0 };
  if (move) {
    spot = { step: Math.max(0, Math.min(steps - 1, at.step + move[0])), layer: Math.max(0, Math.min(layers - 1, at.layer + move[1])) };
    by("heat-text").textContent = describe(spot);
    draw();
  } else if (event.key === "Enter" || event.key === " ") choose(at);
  else return;
  event.preventDefault();
});

// Masks of a layer's heads.
function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => Object.assign(document.createElement("option"), { value, textContent: text })));
}
function masksHere() {
  const { model, branch } = grid();
  return data.rows[by("where-row").value].masks.filter((mask) => mask.model === model && mask.branch === branch);
}
function showMasks() {
  const layer = Number(by("mask-layer").value);
  by("masks").replaceChildren(...masksHere().filter((mask) => mask.layer === layer).map((mask) => {
    const figure = document.createElement("figure");
    const image = new Image();
    image.src = mask.image;
    const heads = mask.heads.length === 1 ? `head ${mask.heads[0]}` : `heads ${mask.heads.join(", ")}`;
    const text = `${heads}: density ${mask.density.toFixed(3)}`;
    image.alt = `Blocks of ${text}, step ${mask.step}`;
    const caption = document.createElement("figcaption");
    caption.textContent = `${text}, blocks of ${mask.block.join("x")}`;
    figure.append(image, caption);
    return figure;
  }));
  const taken = masksHere().find((mask) => mask.layer === layer);
  by("mask-step").textContent = taken && taken.step !== null ? `Taken at step ${taken.step}.` : "";
  if (!by("masks").children.length) by("masks").textContent = "No call of this layer was computed by blocks at the step that is shown.";
}
function showGrid() {
  chosen = spot = null;
  by("heads").replaceChildren();
  const layers = [...new Set(masksHere().map((mask) => mask.layer))].sort((a, b) => a - b);
  options(by("mask-layer"), layers.map((layer) => [layer, layer]));
  showMasks();
  draw();
}
function showRow() {
  const grids = data.rows[by("where-row").value].grids;
  const models = new Set(grids.map(({ model }) => model));
  options(by("where-grid"), grids.map(({ model, branch }, i) => [i, models.size > 1 ? `${model}, ${branch}` : branch]));
  showGrid();
}
by("where-row").addEventListener("change", showRow);
by("where-grid").addEventListener("change", showGrid);
by("mask-layer").addEventListener("change", showMasks);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
showRow();

by("copy").addEventListener("click", async () => {
  const range = document.createRange();
  range.selectNodeContents(by("command"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    await navigator.clipboard.writeText(by("command").textContent);
    by("copy").textContent = "Copied";
  } catch {
    by("copy").textContent = "Selected: press Ctrl+C";
  }
});
