"use strict";

// Attention maps: reading them from attention/NNN.js and drawing them over images.

const Attention = (() => {
  const SIDE = 96; // pixels of a drawn map, before the browser stretches it over the image
  const chunks = new Map(); // number -> {promise, rows, done}
  const HEAT = [[0, 0, 4, 0], [59, 15, 112, 120], [140, 41, 129, 165], [222, 73, 104, 190], [254, 159, 109, 205], [252, 253, 191, 220]];
  let style = "spotlight";

  window.ATTENTION = (number, rows) => { chunks.get(number).rows = rows; };

  function load(number) {
    if (!chunks.has(number)) {
      const chunk = { rows: [] };
      chunks.set(number, chunk);
      chunk.promise = new Promise((resolve) => {
        const script = document.createElement("script");
        script.src = `attention/${String(number).padStart(3, "0")}.js`;
        script.onload = script.onerror = () => { script.remove(); resolve(); };
        document.head.append(script);
      });
    }
    return chunks.get(number).promise;
  }

  // The maps of a caption, one Float32Array of [0, 1] a word; none where it has no attention.
  async function maps(image, model) {
    const { chunk, models } = window.GALLERY;
    const grid = models[model].grid;
    if (!grid) return [];
    await load(Math.floor(image / chunk));
    const text = chunks.get(Math.floor(image / chunk)).rows[image % chunk]?.[model];
    if (!text) return [];
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const cells = grid[0] * grid[1];
    return Array.from({ length: bytes.length / cells }, (_, word) =>
      Float32Array.from(bytes.subarray(word * cells, (word + 1) * cells), (value) => value / 255));
  }

  // Weights of a cubic B-spline for each of SIDE places between `cells` cells: smooth, never below zero.
  function spline(cells) {
    return Array.from({ length: SIDE }, (_, i) => {
      const place = ((i + 0.5) * cells) / SIDE - 0.5, first = Math.floor(place), t = place - first;
      const weights = [(1 - t) ** 3 / 6, (4 - 6 * t * t + 3 * t ** 3) / 6, (1 + 3 * t + 3 * t * t - 3 * t ** 3) / 6, t ** 3 / 6];
      return weights.map((weight, k) => [Math.min(Math.max(first - 1 + k, 0), cells - 1), weight]);
    });
  }
  const splines = new Map();

  function smooth(map, [height, width]) {
    for (const cells of [height, width]) if (!splines.has(cells)) splines.set(cells, spline(cells));
    const across = splines.get(width), down = splines.get(height);
    const rows = new Float32Array(height * SIDE), out = new Float32Array(SIDE * SIDE);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < SIDE; x++) for (const [cell, weight] of across[x]) rows[y * SIDE + x] += weight * map[y * width + cell];
    let peak = 1e-6;
    for (let y = 0; y < SIDE; y++)
      for (let x = 0; x < SIDE; x++) {
        let value = 0;
        for (const [cell, weight] of down[y]) value += weight * rows[cell * SIDE + x];
        out[y * SIDE + x] = value;
        if (value > peak) peak = value;
      }
    return out.map((value) => value / peak);
  }

  function paint(canvas, values, strength = 1) {
    canvas.width = canvas.height = SIDE;
    const context = canvas.getContext("2d"), imageData = context.createImageData(SIDE, SIDE), pixels = imageData.data;
    for (let i = 0; i < values.length; i++) {
      const value = values[i];
      if (style === "spotlight") {
        pixels[4 * i] = 6; pixels[4 * i + 1] = 7; pixels[4 * i + 2] = 14;
        pixels[4 * i + 3] = 218 * strength * (1 - Math.pow(value, 0.8));
      } else {
        const place = Math.min(value, 0.9999) * (HEAT.length - 1), k = Math.floor(place), t = place - k;
        for (let c = 0; c < 4; c++) pixels[4 * i + c] = HEAT[k][c] * (1 - t) + HEAT[k + 1][c] * t;
        pixels[4 * i + 3] *= strength;
      }
    }
    context.putImageData(imageData, 0, 0);
  }

  return {
    maps, smooth, paint, load,
    get style() { return style; },
    set style(value) { style = value; },
  };
})();
