"use strict";

// The pages of numbers: how models compare, and what their captions are like.

const Numbers = (() => {
  const { panel, bars, histogram, sideways, interval, table, legend, color, percent, signed } = Charts;

  function modelName(m) {
    return make("td", {}, make("span", { className: "dot", style: { background: color(m) } }), models[m].name);
  }

  function scoreTable() {
    const texts = models.map(({ overall }) => scores.map((_, k) => overall?.[k]?.toFixed(4) ?? "–"));
    const best = scores.map((_, k) => {
      const different = new Set(texts.map((row) => row[k]));
      return different.size > 1 ? Math.max(...[...different].map(Number).filter((value) => !Number.isNaN(value))).toFixed(4) : null;
    });
    return table(["model", ...scores.map(([, label]) => label)], models.map((_, m) => [modelName(m), ...scores.map((_, k) =>
      make("td", { className: texts[m][k] === best[k] ? "best" : "" }, texts[m][k]))]));
  }

  function split(pair) {
    const parts = [
      [pair.losses, "better", pair.first, color(pair.first)], [pair.ties, "tie", null, null], [pair.wins, "better", pair.second, color(pair.second)],
    ];
    const bar = make("div", { className: "split" }, ...parts.filter(([count]) => count).map(([count, , m, tint]) =>
      make("div", { className: m === null ? "tie" : "", style: { flex: `${count} 1 0`, ...(tint ? { background: tint } : {}) }, title: m === null ? "equal CIDEr" : `${models[m].name} is better` }, String(count))));
    const text = make("div", { className: "legend" },
      make("span", {}, make("i", { style: { background: color(pair.first) } }), `${models[pair.first].name} better on ${pair.losses}`),
      make("span", {}, `equal on ${pair.ties}`),
      make("span", {}, make("i", { style: { background: color(pair.second) } }), `${models[pair.second].name} better on ${pair.wins}`));
    return [bar, text];
  }

  function differ(pair) {
    const cider = scores.findIndex(([name]) => name === "CIDEr");
    const gain = (i) => (images[i].captions[pair.second]?.scores?.[cider] ?? NaN) - (images[i].captions[pair.first]?.scores?.[cider] ?? NaN);
    const order = images.map((_, i) => i).filter((i) => !Number.isNaN(gain(i))).sort((a, b) => Math.abs(gain(b)) - Math.abs(gain(a)));
    return make("div", { className: "differ" }, ...order.slice(0, 12).map((i) => make("button", { data: { open: i } },
      images[i].size ? make("img", { src: thumbnail(i), alt: "", loading: "lazy" }) : null,
      make("span", {}, ...[pair.first, pair.second].map((m) => make("p", { style: { color: color(m) } }, images[i].captions[m].words.join(" ") || "(empty)")),
        make("small", {}, `${images[i].id}, CIDEr ${signed(gain(i), 2)}`)))));
  }

  function comparison(root) {
    root.append(panel("Scores", "Of the whole set; the best of each is bold.", scoreTable()));
    for (const pair of window.GALLERY.comparisons) {
      const reach = (rows) => Math.max(...rows.flatMap(([, ...numbers]) => numbers.slice(0, 3).map(Math.abs))) || 1;
      const cider = pair.intervals.filter(([label]) => label === "CIDEr"), others = pair.intervals.filter(([label]) => label !== "CIDEr");
      const rows = [[others, reach(others)], [cider, reach(cider)]].flatMap(([own, most]) => own.map(([label, difference, low, high, moreThanChance]) => {
        const chart = make("td", { className: "chart" });
        chart.append(interval(difference, low, high, most, moreThanChance ? (difference > 0 ? pair.second : pair.first) : null));
        return [label, signed(difference, 4), `${signed(low, 4)} to ${signed(high, 4)}`, chart];
      }));
      root.append(panel(`${models[pair.second].name} less ${models[pair.first].name}`,
        `The 95 % interval of a paired bootstrap over the ${pair.images} images. Where it is grey, as it reaches zero, the difference may be chance. BLEU of the whole set, the others as means over the images; CIDEr has its own scale.`,
        make("p", { className: "verdict" }, pair.verdict), table(["score", "difference", "95 % interval", ""], rows)));
      root.append(panel("Image by image", `By the CIDEr of each image. ${percent(pair.identical)} of the captions are the same in both; on the mean, ROUGE-L of one against the other is ${pair.overlap.toFixed(2)}.`, ...split(pair)));
      root.append(panel("Where they differ most", "", differ(pair)));
    }
  }

  function shares(values) {
    const total = values.reduce((sum, value) => sum + value, 0) || 1;
    return values.map((value) => value / total);
  }

  function lengths() {
    const all = models.map(({ quality }) => quality.lengths), numbers = all.flatMap((own) => Object.keys(own).map(Number));
    const low = Math.min(...numbers), labels = Array.from({ length: Math.max(...numbers) - low + 1 }, (_, k) => low + k);
    return bars(labels, all.map((own, model) => ({ model, name: models[model].name, values: shares(labels.map((label) => own[label] ?? 0)) })), { title: "lengths" });
  }

  function distribution(k) {
    const values = models.map((_, m) => images.map((image) => image.captions[m]?.scores?.[k]).filter((value) => value != null));
    const high = scores[k][0] === "CIDEr" ? Math.ceil(Math.max(1, ...values.flat())) : 1, count = scores[k][0] === "CIDEr" ? high : 10;
    const labels = Array.from({ length: count }, (_, bin) => ((bin * high) / count).toFixed(high > 1 ? 0 : 1));
    return bars(labels, values.map((own, model) => ({ model, name: models[model].name, values: histogram(own.length ? own : [0], high, count) })), { title: scores[k][1] });
  }

  const ROWS = [
    ["captions", (q) => q.captions], ["mean length, words", (q) => q.mean_length.toFixed(2)],
    ["vocabulary used", (q) => (q.words_known ? `${q.words_used} of ${q.words_known}` : q.words_used)],
    ["distinct captions", (q) => percent(q.distinct)],
    ["word for word in the training captions", (q) => (q.in_training === null ? "–" : percent(q.in_training))],
    ["Div-1, distinct words of all words", (q) => q.div1.toFixed(3)], ["Div-2, distinct pairs of all pairs", (q) => q.div2.toFixed(3)],
    ["with a repeated pair of words", (q) => percent(q.repetitions)],
    ["ending on an article, preposition or the like", (q) => percent(q.bad_endings)], ["empty", (q) => percent(q.empty)],
    ["attention entropy, bits (even look)", (q) => (q.attention.entropy === undefined ? "–" : `${q.attention.entropy.toFixed(2)} (${q.attention.largest_entropy.toFixed(2)})`)],
  ];

  function used(m) {
    const rows = models[m].quality.usage?.filter((row) => Math.abs(row.rate - row.reference_rate) > 0.05);
    if (!rows?.length) return null;
    return panel(`Words over-used and under-used: ${models[m].name}`, "Occurrences in a hundred words, less those in the references.",
      sideways(rows.map((row) => ({ label: row.word, value: row.rate - row.reference_rate, note: signed(row.rate - row.reference_rate, 2),
        hint: `${row.word}: ${row.rate.toFixed(2)} of a hundred words, in the references ${row.reference_rate.toFixed(2)}` })), { model: m }));
  }

  function sharpness(m) {
    const rows = models[m].quality.attention.words;
    if (!rows?.length) return null;
    const often = rows.filter((row) => row.count > 1), shown = often.length > 24 ? [...often.slice(0, 12), ...often.slice(-12)] : often;
    return panel(`How sharply each word looks: ${models[m].name}`, `Entropy of the attention in bits; an even look has ${models[m].quality.attention.largest_entropy.toFixed(2)}. The sharpest and the widest words that occur more than once.`,
      sideways(shown.map(({ word, entropy, count }) => ({ label: word, value: entropy, note: entropy.toFixed(2), hint: `${word}: ${entropy.toFixed(2)} bits, ${count} times` })), { model: m }));
  }

  function meanMaps(m) {
    const maps = models[m].quality.attention.mean_maps;
    if (!maps) return null;
    const peak = Math.max(...Object.values(maps).flat(2));
    const figures = Object.entries(maps).map(([name, rows]) => {
      const canvas = make("canvas", { width: rows[0].length, height: rows.length, style: { "image-rendering": "pixelated" } });
      const context = canvas.getContext("2d");
      rows.forEach((row, y) => row.forEach((value, x) => {
        context.globalAlpha = Math.min(1, value / peak);
        context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--m${m % 6}`);
        context.fillRect(x, y, 1, 1);
      }));
      return make("figure", {}, canvas, make("figcaption", {}, name));
    });
    return panel(`Where it looks on the whole: ${models[m].name}`, "Mean attention over all captions, on one scale.", make("div", { className: "maps" }, ...figures));
  }

  function quality(root) {
    if (single && scores.length) root.append(panel("Scores", "Of the whole set.", scoreTable()));
    root.append(panel("Captions", "What they are like, apart from being right.", table(["", ...models.map(({ name }) => name)], ROWS.map(([label, value]) => [label, ...models.map(({ quality: own }) => value(own))]))));
    const charts = [panel("Length in words", "Share of the captions.", lengths(), single ? null : legend(models))];
    scores.forEach(([name, label], k) => { if (["Bleu_4", "METEOR", "ROUGE_L", "CIDEr"].includes(name)) charts.push(panel(`${label} of an image`, "Share of the images.", distribution(k), single ? null : legend(models))); });
    root.append(make("div", { className: "panels" }, ...charts));
    for (let m = 0; m < models.length; m++) {
      const own = [used(m), sharpness(m), meanMaps(m)].filter(Boolean);
      if (own.length) root.append(make("div", { className: "panels" }, ...own));
    }
  }

  return { comparison, quality };
})();

start();
