// The page: a live engine, or recordings on one slider.

import { peak } from "./charts.js";
import { Colours } from "./colours.js";
import { Pool, Recorded, Series } from "./model.js";
import { Panel } from "./panel.js";

const LIVE_FRAMES = 300; // that the curves show
const PLAY_SECONDS = 30; // that a recording takes
const RETRY_MS = 2000;
const FORMAT = 1;
const THEMES = ["auto", "light", "dark"];

const at = (id) => document.getElementById(id);
const template = at("panel");

function say(text, kind = "") {
  at("status").textContent = text;
  at("status").className = kind;
}

// Panels, their theme, and when they are drawn.
class Page {
  constructor() {
    this.views = []; // {panel, pool(), curves(key)}
    this._pending = false;
    this._stale = true; // sizes or colours
    this._setTheme(this._remembered());
    at("theme").addEventListener("click", () => {
      this._setTheme(THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.restyle());
    let width = 0;
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width === width) return; // lists grow and shrink all the time
      width = contentRect.width;
      this.restyle();
    }).observe(at("panels"));
    window.addEventListener("resize", () => this.restyle());
  }

  show(views) {
    this.views = views;
    at("panels").replaceChildren(...views.map((view) => view.panel.element));
    at("panels").dataset.count = views.length;
    this.restyle();
  }

  restyle() {
    this._stale = true;
    this.redraw();
  }

  redraw() {
    if (this._pending) return;
    this._pending = true;
    requestAnimationFrame(() => {
      this._pending = false;
      if (this._stale) {
        this._stale = false;
        const colours = new Colours();
        const height = Math.max(240, Math.min(720, window.innerHeight - 440)); // the rest is text
        // Blocks of pools side by side are equally large.
        const width = Math.min(...this.views.map((view) => view.panel.width));
        for (const view of this.views) view.panel.layout(view.pool(), colours, { width, height });
      }
      for (const view of this.views) view.panel.draw(view.pool(), view.curves);
      if (this.views.length) document.documentElement.dataset.drawn = "yes"; // for tests
    });
  }

  _remembered() {
    try {
      return localStorage.getItem("octavo-theme") ?? "auto";
    } catch {
      return "auto"; // a page from a disk may have no storage
    }
  }

  _setTheme(theme) {
    this.theme = THEMES.includes(theme) ? theme : "auto";
    document.documentElement.dataset.theme = this.theme;
    at("theme").textContent = `Theme: ${this.theme}`;
    try {
      localStorage.setItem("octavo-theme", this.theme);
    } catch {
      // then it is forgotten
    }
    this.restyle();
  }
}

// Keys that work wherever the focus is, but for controls that take them themselves.
function listen({ toggle, move }) {
  at("play").addEventListener("click", toggle);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && !event.target.closest("button, summary, select")) toggle();
    else if (event.key === "," && move) move(-1);
    else if (event.key === "." && move) move(1);
    else return;
    event.preventDefault();
  });
}

function live(page) {
  let shown = null; // {pool, series}; what is drawn, which stands still in a pause
  let paused = false;
  let next = null;
  at("slider").hidden = true;

  const button = () => { at("play").textContent = paused ? "Go on" : "Pause"; };
  const clock = () => { at("clock").textContent = shown?.pool.time === undefined ? "" : `${shown.pool.time.toFixed(1)} s up, step ${shown.pool.step.toLocaleString("en")}`; };
  button();

  const start = (about) => {
    at("title").textContent = about.title;
    document.title = `${about.title} · Octavo`;
    next = { pool: new Pool(), series: new Series(LIVE_FRAMES) };
    shown = next;
    const panel = new Panel(template, { name: about.pools[0].name, unit: about.unit });
    page.show([{
      panel,
      pool: () => shown.pool,
      curves: (key) => {
        const { time, curves } = shown.series;
        const values = curves[key];
        return {
          times: time, values, from: time[0], to: time.at(-1), top: peak(values), at: null,
          index: values.length - 1,
        };
      },
    }]);
  };

  const connect = () => {
    say("connecting");
    const source = new EventSource("events");
    let hasEnded = false;
    const again = (why) => {
      if (hasEnded) return;
      hasEnded = true;
      source.close();
      say(why, "bad");
      setTimeout(connect, RETRY_MS);
    };
    source.addEventListener("about", (event) => {
      const about = JSON.parse(event.data);
      if (about.format !== FORMAT) {
        location.reload(); // the server is newer than the page
        return;
      }
      start(about);
    });
    source.addEventListener("frame", (event) => {
      const sizes = next.pool.numBlocks;
      next.pool.apply(JSON.parse(event.data));
      next.series.add(next.pool.derive());
      if (paused) return;
      say("live", "good");
      clock();
      if (next.pool.numBlocks === sizes) page.redraw();
      else page.restyle();
    });
    source.addEventListener("end", () => again("the engine has stopped"));
    source.onerror = () => again("no connection");
  };

  listen({
    toggle: () => {
      paused = !paused;
      if (paused) {
        // What is shown stays; the stream goes on beside it.
        shown = { pool: copyOf(next.pool), series: copyOf(next.series) };
        say("paused");
      } else {
        shown = next;
      }
      button();
      clock();
      page.redraw();
    },
  });
  connect();
}

// A deep copy that keeps its class.
function copyOf(value) {
  return Object.assign(Object.create(Object.getPrototypeOf(value)), structuredClone({ ...value }));
}

function replay(page, about) {
  const isSeconds = about.unit === "s";
  const recorded = about.pools.map((pool) => new Recorded(pool));
  const end = Math.max(...recorded.map(({ times }) => times.at(-1)));
  const slider = at("slider");
  let time = 0;
  let playing = null; // the time of the last animation frame

  document.title = `${about.title} · Octavo`;
  at("title").textContent = about.title;
  const frames = recorded.map(({ times }) => times.length);
  const seen = about.pools.map((pool) => pool.num_seen);
  say(`recorded: ${frames.map((number, index) => `${number} of ${seen[index].toLocaleString("en")}`).join(" and ")} moments`);
  outcome(about);

  const tops = {};
  for (const { series } of recorded) {
    for (const [key, values] of Object.entries(series.curves)) {
      tops[key] = Math.max(tops[key] ?? 0, peak(values));
    }
  }
  page.show(recorded.map((recording, index) => ({
    panel: new Panel(template, { name: about.pools[index].name, unit: about.unit }),
    pool: () => recording.seek(time),
    curves: (key) => ({
      times: recording.times, values: recording.series.curves[key], from: 0, to: end,
      top: tops[key], at: time, index: recording.index,
    }),
  })));

  const show = (text) => (isSeconds ? `${text.toFixed(1)} s` : `step ${Math.round(text).toLocaleString("en")}`);
  const go = (to) => {
    time = Math.min(end, Math.max(0, to));
    slider.value = String(Math.round((1000 * time) / (end || 1)));
    at("clock").textContent = `${show(time)} of ${show(end)}`;
    slider.setAttribute("aria-valuetext", show(time));
    page.redraw();
  };
  const play = (now) => {
    if (playing === null) return;
    const elapsed = now - playing;
    playing = now;
    go(time + (end * elapsed) / (1000 * PLAY_SECONDS));
    if (time >= end) stop();
    else requestAnimationFrame(play);
  };
  const stop = () => {
    playing = null;
    at("play").textContent = "Play";
  };
  const toggle = () => {
    if (playing !== null) {
      stop();
      return;
    }
    if (time >= end) go(0);
    playing = performance.now();
    at("play").textContent = "Pause";
    requestAnimationFrame(play);
  };
  // To the next moment of any of the recordings.
  const move = (direction) => {
    stop();
    const times = recorded.flatMap((each) => each.times);
    const further = times.filter((each) => (each - time) * direction > 1e-9);
    if (further.length) go(direction > 0 ? Math.min(...further) : Math.max(...further));
  };
  slider.addEventListener("input", () => { stop(); go((end * slider.value) / 1000); });
  listen({ toggle, move });
  stop();
  go(end / 4); // the pool is full by then; a good look at the start
}

// What came of it, for all recordings.
function outcome({ summary, figures, pools }) {
  if (!summary && !figures.length) return;
  at("outcome").hidden = false;
  at("summary").textContent = summary;
  const cell = (tag, text) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (tag === "th") made.scope = "row";
    return made;
  };
  const head = document.createElement("tr");
  head.append(cell("td", ""), ...figures.map(([name]) => {
    const made = cell("th", name);
    made.scope = "col";
    return made;
  }));
  at("figures").replaceChildren(head, ...pools.map((pool, index) => {
    const row = document.createElement("tr");
    row.append(cell("th", pool.name), ...figures.map((figure) => cell("td", figure[index + 1])));
    return row;
  }));
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const page = new Page();
const packed = at("recording");
if (packed) unpack(packed.textContent).then((about) => replay(page, about));
else live(page);
