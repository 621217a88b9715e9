// Small curves over time, one for each figure, as SVG.

import { count, percent } from "./text.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1000; // of the coordinates; the drawing stretches
const HEIGHT = 100;


// title: said in full where the name is short. full: the top of the scale, if it is fixed.
// total: a sum, whose last value is its peak.
export const CHARTS = [
  { key: "used", name: "cache owned", title: "share of blocks that sequences own", show: percent, full: 1 },
  { key: "useful", name: "of it useful", title: "share of owned places that hold a token", show: percent, full: 1 },
  { key: "rate", name: "tokens", title: "tokens generated", show: count, perTime: true },
  { key: "running", name: "running", title: "sequences that hold blocks", show: count },
  { key: "waiting", name: "waiting", title: "requests that hold no block", show: count },
  { key: "hits", name: "prefix hits", title: "prompt tokens of the running sequences that were found in the cache", show: percent, full: 1 },
  { key: "lost", name: "preempted", title: "times a sequence lost its blocks, since the start", show: count, total: true },
];

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The largest value of a curve that is a number.
export function peak(values) {
  let most = 0;
  for (const value of values) if (value > most) most = value;
  return most;
}

export class Chart {
  constructor({ key, name, title, show, full, perTime, total }, unit) {
    Object.assign(this, { key, show, full, hasPeak: full === undefined && !total });
    this.name = perTime ? `${name}/${unit === "s" ? "s" : "step"}` : name;
    this.figure = document.createElement("figure");
    this.figure.title = title;
    const caption = document.createElement("figcaption");
    const label = document.createElement("span");
    label.textContent = this.name;
    this.value = document.createElement("b");
    this.most = document.createElement("small");
    caption.append(label, this.most, this.value);
    this.svg = element("svg", {
      viewBox: `0 -3 ${WIDTH} ${HEIGHT + 4}`, preserveAspectRatio: "none", role: "img",
    });
    this.area = element("path", { class: "area" });
    this.line = element("path", { class: "line", "vector-effect": "non-scaling-stroke" });
    this.cursor = element("line", {
      class: "cursor", y1: -3, y2: HEIGHT + 1, "vector-effect": "non-scaling-stroke",
    });
    const base = element("line", {
      class: "base", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT, "vector-effect": "non-scaling-stroke",
    });
    this.svg.append(this.area, base, this.line, this.cursor);
    this.figure.append(caption, this.svg);
  }

  // Draw a curve from `from` to `to`; `top` is the top of its scale. at: the time that is shown,
  // and index: that of its value.
  draw({ times, values, from, to, top, at, index }) {
    const most = this.full ?? (top || 1);
    const span = Math.max(1e-9, to - from);
    const x = (time) => (WIDTH * (time - from)) / span;
    let line = "";
    let area = "";
    let begin = null;
    let last = 0;
    const close = () => {
      if (begin !== null) area += `L${last.toFixed(1)} ${HEIGHT}L${begin.toFixed(1)} ${HEIGHT}Z`;
      begin = null;
    };
    for (let each = 0; each < times.length; each += 1) {
      const value = values[each];
      if (Number.isNaN(value)) {
        close();
        continue;
      }
      last = x(times[each]);
      const y = HEIGHT * (1 - Math.min(1, value / most));
      const point = `${begin === null ? "M" : "L"}${last.toFixed(1)} ${y.toFixed(1)}`;
      begin ??= last;
      line += point;
      area += point;
    }
    close();
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
    const value = values[index];
    const text = value === undefined || Number.isNaN(value) ? "–" : this.show(value);
    this.value.textContent = text;
    this.most.textContent = this.hasPeak && top ? `peak ${this.show(top)}` : "";
    this.svg.setAttribute("aria-label", `${this.name}: ${text}`);
    this.cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, x(at));
  }
}
