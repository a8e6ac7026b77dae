// The page around detector.js: photos and camera in, drawn faces and milliseconds out.
//
// For programs: `?photo=ADDRESS` looks at a photo of this server at once, `&side=NUMBER` chooses one of the longest sides
// (0 leaves the photo as it is), `&score=NUMBER` the lowest score. The element #detections holds the last picture's faces as JSON,
// like detections.json of `python -m retinaface detect`, with `milliseconds` and `threads`; or an `error`.

import { findFaces, place, toInput } from "./detector.js";
import * as ort from "./ort.js";

const RUNS = 5; // of a photo, for the median time; fewer when they take more than
const RUNS_MILLISECONDS = 1000;
const REMEMBERED = 15; // frames of the camera
const MOST_PIXELS = 2 ** 24; // Safari gives nothing back of a larger canvas
const COLOUR = "#2be36e";
const LABELLED = 34; // pixels on the screen: a score beside a smaller face hides its neighbours

const element = (id) => document.getElementById(id);
const canvas = element("picture");
// No alpha channel, as OpenCV reads pictures.
const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });

let facts;
let session;
let stream = null; // of the camera
let photo = null; // its pixels
let last = null; // the last picture's pixels, its place and the detector's outputs: all that a new score needs
let times = []; // milliseconds per picture, the last ones

// One run at a time: whatever begins waits for the run under way, and what was begun before goes no further.
let turn = 0;
let running = Promise.resolve();

function begin(task) {
  const mine = ++turn;
  const isCurrent = () => mine === turn;
  running = running.then(() => isCurrent() && task(isCurrent)).catch(fail);
}

async function load() {
  // Threads share memory, which browsers allow only to pages served with cross-origin isolation headers.
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.proxy = true; // the page stays alive while the detector works
  facts = await (await fetchFile("model.json")).json();
  const model = new Uint8Array(await (await fetchFile("model.onnx")).arrayBuffer());
  element("model").textContent = `${facts.name} (${(model.length / 1e6).toFixed(2)} MB)`;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
}

async function fetchFile(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: the server says ${answer.status} ${answer.statusText}`);
  return answer;
}

async function openPhoto(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${blob.name ?? "This file"}: no picture that this browser can read`);
  }
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  photo = grab(bitmap, Math.floor(bitmap.width * shrink), Math.floor(bitmap.height * shrink));
  bitmap.close();
}

/** The pixels of a photo, or of what the camera sees now. */
function grab(source, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  context.drawImage(source, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Looks at a picture, whose time joins those of the runs before. */
async function look(pixels, before) {
  const started = performance.now();
  const where = place(pixels.width, pixels.height, facts, Number(element("side").value));
  const input = new ort.Tensor("float32", toInput(pixels, where, facts), [1, 3, where.height, where.width]);
  const outputs = await session.run({ [facts.input]: input });
  last = { pixels, where, outputs };
  const faces = chooseFaces();
  times = [...before, performance.now() - started].slice(-REMEMBERED);
  show(faces);
}

function chooseFaces() {
  return findFaces(last.outputs, last.where, facts, Number(element("score").value));
}

async function lookAtPhoto(isCurrent) {
  await look(photo, []);
  while (isCurrent() && times.length < RUNS && times.reduce((a, b) => a + b) < RUNS_MILLISECONDS) {
    await look(photo, times);
  }
}

async function openCamera() {
  try {
    return await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } });
  } catch (error) {
    throw new Error(`No picture from the camera: ${error.message}`);
  }
}

async function lookThroughCamera(isCurrent) {
  photo = null;
  stream = await openCamera();
  element("camera").textContent = "Stop camera";
  try {
    const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: stream });
    await video.play();
    for (let before = []; isCurrent() && stream.active; before = times) {
      await look(grab(video, video.videoWidth, video.videoHeight), before);
      await new Promise(requestAnimationFrame);
    }
  } finally {
    stream.getTracks().forEach((track) => track.stop());
    stream = null;
    element("camera").textContent = "Use camera";
  }
}

function show(faces) {
  draw(faces);
  const milliseconds = median(times);
  const { pixels, where } = last;
  const many = `${faces.scores.length} ${faces.scores.length === 1 ? "face" : "faces"}`;
  canvas.setAttribute("aria-label", `Picture with ${many}`);
  element("faces").textContent = faces.scores.length;
  const runs = times.length > 1 ? `, median of ${times.length}` : "";
  element("time").textContent = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms${runs}`;
  element("sizes").textContent = `${pixels.width} × ${pixels.height}, seen as ${where.columns} × ${where.rows}`;
  say("");
  report({ ...faces, milliseconds, threads: ort.env.wasm.numThreads });
}

function draw({ boxes, scores, landmarks }) {
  element("stage").classList.add("filled");
  element("invitation").hidden = true;
  context.putImageData(last.pixels, 0, 0);
  const unit = canvas.width / canvas.clientWidth || 1; // a pixel of the screen, in pixels of the picture
  context.font = `600 ${13 * unit}px system-ui, sans-serif`;
  boxes.forEach(([left, top, right, bottom], face) => {
    const width = right - left;
    context.strokeStyle = COLOUR;
    context.lineWidth = Math.min(2 * unit, Math.max(width / 12, unit));
    context.strokeRect(left, top, width, bottom - top);
    context.fillStyle = COLOUR;
    for (const [x, y] of landmarks[face]) {
      context.beginPath();
      context.arc(x, y, Math.min(2.5 * unit, Math.max(width / 24, 0.75 * unit)), 0, 2 * Math.PI);
      context.fill();
    }
    if (width >= LABELLED * unit) drawLabel(scores[face].toFixed(2), left, top, unit);
  });
}

function drawLabel(text, left, top, unit) {
  const height = 17 * unit;
  const above = Math.max(0, top - height);
  context.fillRect(left - unit, above, context.measureText(text).width + 6 * unit, height);
  context.fillStyle = "#08210f";
  context.fillText(text, left + 2 * unit, above + 13 * unit);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return (sorted[Math.floor((sorted.length - 1) / 2)] + sorted[Math.ceil((sorted.length - 1) / 2)]) / 2;
}

function report(content) {
  element("detections").textContent = JSON.stringify(content);
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

function fail(error) {
  console.error(error);
  say(error.message, true);
  report({ error: error.message });
}

function showPhoto(blob) {
  if (!blob) return;
  say("Looking …");
  begin(async (isCurrent) => {
    await openPhoto(blob);
    await lookAtPhoto(isCurrent);
  });
}

function connect() {
  const score = element("score");
  score.addEventListener("input", () => {
    element("score-shown").textContent = Number(score.value).toFixed(2);
    if (last) show(chooseFaces());
  });
  element("side-setting").hidden = facts.size !== null; // such a detector sees one size only
  element("side").addEventListener("change", () => {
    if (photo) begin(lookAtPhoto);
  });
  element("choose").addEventListener("click", () => element("file").click());
  element("file").addEventListener("change", ({ target }) => {
    showPhoto(target.files[0]);
    target.value = ""; // so that the same photo can be chosen again
  });
  element("camera").addEventListener("click", () => begin(stream ? async () => {} : lookThroughCamera));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    showPhoto(event.dataTransfer.files[0]);
  });
  for (const [kind, isOver] of Object.entries({ dragenter: true, dragleave: false, drop: false })) {
    element("stage").addEventListener(kind, () => element("stage").classList.toggle("over", isOver));
  }
}

function start() {
  const asked = new URLSearchParams(location.search);
  element("score").value = asked.get("score") ?? facts.defaults.score_threshold;
  element("score").dispatchEvent(new Event("input"));
  const side = [...element("side").options].find((option) => option.value === asked.get("side"));
  if (side) side.selected = true;
  element("choose").disabled = false;
  element("camera").disabled = !navigator.mediaDevices; // browsers have it for https and localhost only
  say(navigator.mediaDevices ? "" : "The camera needs an https address, or localhost.");
  if (asked.has("photo")) begin(async (isCurrent) => {
    await openPhoto(await (await fetchFile(asked.get("photo"))).blob());
    await lookAtPhoto(isCurrent);
  });
}

say("Loading the detector …");
load().then(connect).then(start).catch(fail);
