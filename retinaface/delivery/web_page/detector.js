// From pixels to faces. The steps, their order and their numbers are those of Detector.detect in Python, so that both
// find the same faces: letterbox() there is place(), resize() and toInput() here, postprocess() is findFaces().
//
// `facts` is the content of model.json. A place says where a picture lies in the detector's input, always in the top
// left corner: { columns, rows } of the picture there, { width, height } of the input, { scaleX, scaleY } against the
// picture itself.

/** Where a picture goes: `side` is the longest side in pixels that it is shrunk to, 0 for none. */
export function place(width, height, facts, side) {
  const [roomHeight, roomWidth] = facts.size ?? [side || Infinity, side || Infinity];
  const scale = Math.min(roomHeight / height, roomWidth / width, 1);
  const columns = Math.max(1, round(width * scale));
  const rows = Math.max(1, round(height * scale));
  return {
    columns,
    rows,
    width: facts.size ? roomWidth : Math.max(facts.smallest_picture, columns),
    height: facts.size ? roomHeight : Math.max(facts.smallest_picture, rows),
    scaleX: columns / width,
    scaleY: rows / height,
  };
}

/** As Python rounds: a half goes to the even neighbour. */
function round(value) {
  return value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value);
}

/** Makes the input of the detector, (1, 3, height, width) float32: BGR, minus the mean colour, which fills the rest. */
export function toInput(pixels, where, facts) {
  const rgba = resize(pixels, where.columns, where.rows);
  const plane = where.width * where.height;
  const input = new Float32Array(3 * plane); // zeros: the mean colour, once it is subtracted
  const [blue, green, red] = facts.mean_bgr;
  for (let row = 0; row < where.rows; row++) {
    let from = 4 * row * where.columns;
    let to = row * where.width;
    for (let column = 0; column < where.columns; column++, from += 4, to++) {
      input[to] = rgba[from + 2] - blue;
      input[to + plane] = rgba[from + 1] - green;
      input[to + 2 * plane] = rgba[from] - red;
    }
  }
  return input;
}

/**
 * Bilinear, between the centres of pixels and without smoothing first, in OpenCV's whole numbers: bit for bit what
 * cv2.resize gives on photos in Python, where detectors are evaluated. The browser's own resizing differs from one
 * browser to the next.
 */
export function resize(pixels, columns, rows) {
  const { width, height, data } = pixels;
  if (columns === width && rows === height) return data;
  const across = neighbours(width, columns);
  const down = neighbours(height, rows);
  const resized = new Uint8ClampedArray(4 * columns * rows);
  for (let row = 0, to = 0; row < rows; row++) {
    const upper = 4 * width * down.first[row];
    const lower = 4 * width * down.second[row];
    const [upperWeight, lowerWeight] = [down.firstWeight[row], down.secondWeight[row]];
    for (let column = 0; column < columns; column++, to += 4) {
      const left = 4 * across.first[column];
      const right = 4 * across.second[column];
      const [leftWeight, rightWeight] = [across.firstWeight[column], across.secondWeight[column]];
      for (let colour = 0; colour < 3; colour++) {
        const top = data[upper + left + colour] * leftWeight + data[upper + right + colour] * rightWeight;
        const bottom = data[lower + left + colour] * leftWeight + data[lower + right + colour] * rightWeight;
        // Both weights have 11 bits, and of these 22 bits 4, 16 and 2 are dropped again.
        const sum = ((upperWeight * (top >> 4)) >> 16) + ((lowerWeight * (bottom >> 4)) >> 16);
        resized[to + colour] = (sum + 2) >> 2;
      }
    }
  }
  return resized;
}

/** For each pixel of a resized side: the two pixels of the original one that it lies between, and their weights. */
function neighbours(length, resized) {
  const [first, second, firstWeight, secondWeight] = Array.from({ length: 4 }, () => new Int32Array(resized));
  for (let index = 0; index < resized; index++) {
    // OpenCV computes with 32 bits here; with more, some weights would be rounded otherwise.
    const position = Math.min(Math.max(Math.fround(((index + 0.5) * length) / resized - 0.5), 0), length - 1);
    first[index] = Math.floor(position);
    second[index] = Math.min(first[index] + 1, length - 1);
    const share = Math.fround(position - first[index]);
    firstWeight[index] = round(2048 * Math.fround(1 - share));
    secondWeight[index] = round(2048 * share);
  }
  return { first, second, firstWeight, secondWeight };
}

/**
 * Finds the faces in the detector's outputs, best first, in pixels of the picture:
 * { boxes: [[x1, y1, x2, y2]], scores: [], landmarks: [[[x, y] five times]] }, as in detections.json.
 */
export function findFaces(outputs, where, facts, scoreThreshold) {
  const { nms_threshold: nmsThreshold, top_k: topK, keep } = facts.defaults;
  const candidates = findCandidates(outputs.class_logits.data, where, facts, scoreThreshold);
  const best = candidates.sort((a, b) => b.score - a.score).slice(0, topK);
  for (const each of best) each.box = decodeBox(outputs.box_deltas.data, each, facts);
  const faces = suppress(best, nmsThreshold, keep);
  const toPicture = ([x, y]) => [x / where.scaleX, y / where.scaleY];
  return {
    boxes: faces.map(({ box }) => [...toPicture(box.slice(0, 2)), ...toPicture(box.slice(2))]),
    scores: faces.map(({ score }) => score),
    landmarks: faces.map((face) => decodeLandmarks(outputs.landmark_deltas.data, face, facts).map(toPicture)),
  };
}

/** The anchors with a score that is high enough: by level, row, column and size, as the detector counts them. */
function findCandidates(logits, where, facts, scoreThreshold) {
  // Nothing is found where no picture is, but for pictures so small that they are always filled up.
  const usedWidth = Math.max(facts.smallest_picture, where.columns);
  const usedHeight = Math.max(facts.smallest_picture, where.rows);
  const candidates = [];
  let index = 0;
  facts.strides.forEach((stride, level) => {
    for (let y = 0; y < where.height; y += stride) {
      for (let x = 0; x < where.width; x += stride) {
        for (const size of facts.anchor_sizes[level]) {
          // The softmax of two logits, background and face; 32 bits, so that equal scores are equal elsewhere too.
          const score = Math.fround(1 / (1 + Math.exp(Math.fround(logits[2 * index] - logits[2 * index + 1]))));
          if (score >= scoreThreshold && x < usedWidth && y < usedHeight) {
            candidates.push({ index, score, x: x + stride / 2, y: y + stride / 2, size });
          }
          index++;
        }
      }
    }
  });
  return candidates;
}

/** Offsets of the centre in units of the anchor, logarithms of the size ratio (SSD, arXiv:1512.02325). */
function decodeBox(deltas, { index, x, y, size }, facts) {
  const [ofCentre, ofSize] = facts.variances;
  const [dx, dy, dw, dh] = deltas.subarray(4 * index, 4 * index + 4);
  const centreX = x + dx * ofCentre * size;
  const centreY = y + dy * ofCentre * size;
  const halfWidth = (size * Math.exp(dw * ofSize)) / 2;
  const halfHeight = (size * Math.exp(dh * ofSize)) / 2;
  return [centreX - halfWidth, centreY - halfHeight, centreX + halfWidth, centreY + halfHeight];
}

function decodeLandmarks(deltas, { index, x, y, size }, facts) {
  const step = facts.variances[0] * size;
  return Array.from({ length: 5 }, (_, point) => {
    const at = 10 * index + 2 * point;
    return [x + deltas[at] * step, y + deltas[at + 1] * step];
  });
}

/** Drops what overlaps a better face too much (non-maximum suppression), until enough are kept. */
function suppress(candidates, nmsThreshold, keep) {
  const kept = [];
  for (const each of candidates) {
    if (kept.length === keep) break;
    if (kept.every((better) => overlap(better.box, each.box) <= nmsThreshold)) kept.push(each);
  }
  return kept;
}

/** Intersection over union. */
function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const both = width * height;
  return both / (area(a) + area(b) - both);
}

function area([left, top, right, bottom]) {
  return (right - left) * (bottom - top);
}
