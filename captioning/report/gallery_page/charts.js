"use strict";

// Small charts and tables; all text is set as text, never as markup.

function make(tag, properties = {}, ...children) {
  const { data = {}, style = {}, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const Charts = (() => {
  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const color = (model) => `var(--m${model % 6})`;
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  const signed = (value, digits) => {
    const text = Math.abs(value).toFixed(digits);
    return `${value < 0 && Number(text) ? "−" : "+"}${text}`;
  };

  // Grouped bars: `series` of {model, values}, one label a group.
  function bars(labels, series, { format = percent, width = 460, height = 190, title = "" } = {}) {
    const left = 42, bottom = 24, top = 8, right = 4;
    const largest = Math.max(1e-9, ...series.flatMap((one) => one.values));
    const step = (width - left - right) / labels.length, bar = Math.min((step * 0.8) / series.length, 34);
    const y = (value) => height - bottom - (value / largest) * (height - bottom - top);
    const chart = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    for (const share of [0, 0.5, 1]) {
      chart.append(svg("line", { x1: left, x2: width - right, y1: y(share * largest), y2: y(share * largest), class: "grid-line" }));
      chart.append(svg("text", { x: left - 7, y: y(share * largest) + 4, "text-anchor": "end" }, format(share * largest)));
    }
    series.forEach(({ model, values, name }, k) => values.forEach((value, i) => {
      const x = left + step * (i + 0.5) + bar * (k - series.length / 2);
      const shape = svg("rect", { x: x + 0.5, y: y(value), width: Math.max(bar - 1, 1), height: Math.max(height - bottom - y(value), 0), rx: Math.min(3, bar / 4), fill: color(model) });
      shape.append(svg("title", {}, `${name}, ${labels[i]}: ${format(value)}`));
      chart.append(shape);
    }));
    const every = Math.ceil(labels.length / 13);
    labels.forEach((label, i) => {
      if (i % every === 0) chart.append(svg("text", { x: left + step * (i + 0.5), y: height - 7, "text-anchor": "middle" }, String(label)));
    });
    return chart;
  }

  // Shares of `values` in `count` equal bins from 0 to `high`.
  function histogram(values, high, count) {
    const shares = new Array(count).fill(0);
    for (const value of values) shares[Math.min(Math.floor((value / high) * count), count - 1)] += 1 / values.length;
    return shares;
  }

  // Horizontal bars from zero, to both sides: rows of {label, value, note}.
  function sideways(rows, { width = 460, model = 0, title = "" } = {}) {
    const line = 21, left = 112, right = 62, height = rows.length * line + 6;
    const low = Math.min(0, ...rows.map((row) => row.value)), high = Math.max(0, ...rows.map((row) => row.value));
    const x = (value) => left + ((value - low) / (high - low || 1)) * (width - left - right);
    const chart = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    rows.forEach(({ label, value, note, hint }, i) => {
      const y = 4 + i * line, from = Math.min(x(0), x(value));
      const name = label.length > 15 ? `${label.slice(0, 14)}…` : label;
      const bar = svg("rect", { x: from, y: y + 2, width: Math.max(Math.abs(x(value) - x(0)), 1), height: line - 6, rx: 3, fill: color(model), opacity: value < 0 ? 0.45 : 1 });
      bar.append(svg("title", {}, hint || `${label}: ${note}`));
      chart.append(svg("text", { x: left - 8, y: y + 14, "text-anchor": "end", style: "fill: var(--ink); font-size: 12.5px" }, name), bar,
        svg("text", { x: width, y: y + 14, "text-anchor": "end" }, note));
    });
    chart.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: height, class: "zero" }));
    return chart;
  }

  // A difference with its interval, on an axis from -reach to reach, in the colour of the better model; null: grey.
  function interval(difference, low, high, reach, model) {
    const width = 300, height = 26, x = (value) => width / 2 + (value / reach) * (width / 2 - 8);
    const tint = model === null ? "var(--faint)" : color(model);
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${difference} in [${low}, ${high}]` },
      svg("line", { x1: 0, x2: width, y1: 13, y2: 13, class: "grid-line" }),
      svg("line", { x1: x(0), x2: x(0), y1: 2, y2: 24, class: "zero" }),
      svg("line", { x1: x(low), x2: x(high), y1: 13, y2: 13, stroke: tint, "stroke-width": 5, "stroke-linecap": "round", opacity: 0.4 }),
      svg("circle", { cx: x(difference), cy: 13, r: 5.5, fill: tint }));
  }

  function table(head, rows) {
    const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) =>
      cell instanceof Node && cell.tagName === "TD" ? cell : make("td", {}, cell instanceof Node ? cell : String(cell)))));
    return make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...body));
  }

  function panel(title, about, ...children) {
    return make("div", { className: "panel" }, make("h2", {}, title), about ? make("p", { className: "about" }, about) : null, ...children);
  }

  function legend(models) {
    return make("div", { className: "legend" }, ...models.map((model, k) => make("span", {}, make("i", { style: { background: color(k) } }), model.name)));
  }

  return { bars, histogram, sideways, interval, table, panel, legend, color, percent, signed };
})();
