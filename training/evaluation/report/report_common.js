// Helpers of both pages. Captions are untrusted text: they only become text nodes.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toFixed(digits);
}

// a measured value: always with decimals, so that 1.000 does not look like a count
function fixed(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function table(head, rows) {
  const numeric = (i) => (i > 0 ? "number" : null);
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((text, i) => make("th", { class: numeric(i), scope: "col" }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, i) => make("td", { class: numeric(i) }, cell)))))));
}

function section(id, title, ...children) {
  document.getElementById("sections").append(make("section", { id }, make("h2", {}, title), ...children));
  document.querySelector("nav").append(make("a", { href: "#" + id }, title));
}

function definition(pairs) {
  return make("dl", {}, pairs.filter(([, v]) => v !== null && v !== undefined && v !== "")
    .map(([k, v]) => [make("dt", {}, k), make("dd", {}, typeof v === "object" && !(v instanceof Node) ? JSON.stringify(v) : v)]));
}

// The colour map inferno, readable in grey too: five anchors, linear between them.
const ANCHORS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
function colour(share) {
  const x = Math.min(Math.max(share, 0), 1) * (ANCHORS.length - 1);
  const i = Math.min(Math.floor(x), ANCHORS.length - 2);
  return ANCHORS[i].map((low, k) => Math.round(low + (ANCHORS[i + 1][k] - low) * (x - i)));
}
const GRADIENT = "linear-gradient(90deg," + ANCHORS.map((c) => `rgb(${c})`).join(",") + ")";

// Alpha follows the value, so that the image stays visible where the map is low.
function paint(canvas, values, height, width, options = {}) {
  const small = document.createElement("canvas");
  small.width = width;
  small.height = height;
  const context = small.getContext("2d");
  const pixels = context.createImageData(width, height);
  values.forEach((value, i) => {
    const share = value / 255;
    pixels.data.set([...colour(share), options.opaque ? 255 : Math.round(255 * options.strength * (0.15 + 0.85 * share))], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  const scale = Math.max(1, Math.round(480 / Math.max(width, height)));
  canvas.width = width * scale;
  canvas.height = height * scale;
  const target = canvas.getContext("2d");
  target.imageSmoothingEnabled = Boolean(options.smooth);
  target.imageSmoothingQuality = "high";
  target.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function bytes(text) {
  return Array.from(atob(text), (c) => c.charCodeAt(0));
}

function themeButton() {
  const root = document.documentElement;
  const dark = () => root.dataset.theme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const button = make("button", { type: "button", id: "theme", "aria-label": "switch between light and dark" });
  const show = () => { button.textContent = dark() ? "☀ light" : "☾ dark"; };
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
  show();
  document.querySelector("header.top").append(button);
}

const LINES = ["#b4531f", "#2f7d9b", "#7a5ea8", "#5a8a3a", "#c08a1e", "#9b3d63"];
function curve(title, lines, chosen) {
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const W = 520, H = 240, L = 52, R = 12, T = 14, B = 28;
  const px = (x) => L + (W - L - R) * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5);
  const py = (y) => H - B - (H - T - B) * (y1 > y0 ? (y - y0) / (y1 - y0) : 0.5);
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  const draw = (tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.setAttribute("class", "curve");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", title);
  const short = (v) => (v !== 0 && Math.abs(v) < 0.01 ? v.toExponential(1) : Number(v.toPrecision(3)).toLocaleString("en"));
  for (const share of [0, 0.5, 1]) {
    const y = y0 + share * (y1 - y0), x = x0 + share * (x1 - x0);
    draw("line", { x1: L, x2: W - R, y1: py(y), y2: py(y), class: "axis" });
    draw("text", { x: L - 6, y: py(y) + 4, "text-anchor": "end" }, short(y));
    draw("text", { x: px(x), y: H - 8, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, short(x));
  }
  lines.forEach((line, i) => {
    draw("polyline", { points: line.points.map((p) => px(p[0]).toFixed(1) + "," + py(p[1]).toFixed(1)).join(" "),
      fill: "none", stroke: LINES[i % LINES.length], "stroke-width": 2, "stroke-linejoin": "round" });
    if (line.points.length < 40) {
      for (const p of line.points) draw("circle", { cx: px(p[0]), cy: py(p[1]), r: 2.5, fill: LINES[i % LINES.length] });
    }
  });
  if (chosen !== null && chosen !== undefined && chosen >= x0 && chosen <= x1) {
    draw("line", { x1: px(chosen), x2: px(chosen), y1: T, y2: H - B, stroke: "currentColor", "stroke-dasharray": "4 4" });
    const right = px(chosen) > W / 2; // on the side of the line with more room
    draw("text", { x: px(chosen) + (right ? -5 : 5), y: T + 10, "text-anchor": right ? "end" : "start" }, "chosen: step " + short(chosen));
  }
  return make("div", { class: "card" }, make("h3", {}, title), svg,
    make("div", {}, lines.map((line, i) => make("span", { class: "key" },
      make("i", { style: { background: LINES[i % LINES.length] } }), line.name))));
}
