// One pool with all that belongs to it: curves, grid, details of a block, requests.

import { CHARTS, Chart } from "./charts.js";
import { css } from "./colours.js";
import { BlockGrid } from "./grid.js";
import { count, percent, plural } from "./text.js";

const MAX_ROWS = 48; // requests that are listed
const REASONS = {
  token: "its next token is still being computed",
  budget: "this step has no tokens left for it",
  slots: "as many run as may",
  blocks: "too few blocks are free",
  forecast: "running sequences will need the blocks",
  preemption: "a sequence just lost its blocks",
};

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text; // never markup: clients choose the names of requests
  return made;
}

export class Panel {
  constructor(template, { name, unit }) {
    this.element = template.content.cloneNode(true).firstElementChild;
    this.element.ariaLabel = name;
    const find = (selector) => this.element.querySelector(selector);
    find("h2").textContent = name;
    this.now = find(".now");
    this.charts = CHARTS.map((chart) => new Chart(chart, unit));
    find(".charts").append(...this.charts.map((chart) => chart.figure));
    this.poolSize = find(".pool h3 small");
    this.inspector = find(".inspector");
    this.host = find(".host");
    this.hostSize = find(".host small");
    this.rows = find(".rows");
    this.more = find(".more");
    this.queue = find(".queue");
    [this.runningSize, this.waitingSize] = this.element.querySelectorAll(".requests h3 small");
    this.pinned = null; // the number of a sequence
    this.pointed = null; // the number of one whose row is pointed at
    this.pool = null;
    this._makeLegend(find(".shares"), find(".legend"));
    this.grid = new BlockGrid(
      find(".pool > .grid"),
      `Blocks of ${name}. Arrow keys move, brackets follow the sequence, Enter keeps it lit.`,
      {
        inspect: () => this._show(),
        pin: (block) => this._pin(this.pool.ownersOf(block)[0]?.seq.number ?? null),
        unpin: () => this._pin(null),
        along: (block, step) => this._along(block, step),
      },
    );
    this.hostGrid = new BlockGrid(find(".host .grid"), `Host tier of ${name}`);
  }

  _makeLegend(shares, legend) {
    const kinds = [
      ["useful", "tokens"], ["reserved", "owned, empty"], ["cached", "cached"], ["free", "free"],
    ];
    this.kinds = kinds.map(([kind, label]) => {
      const bar = make("div", kind);
      const item = make("li", kind);
      const value = make("b");
      item.append(make("i", "swatch"), value, make("span", "", label));
      shares.append(bar);
      legend.append(item);
      return { kind, bar, value };
    });
    const item = make("li", "shared");
    this.shared = make("span");
    item.append(make("i", "swatch", "2"), this.shared);
    legend.append(item);
  }

  // How wide the grid may be.
  get width() {
    return this.grid.element.clientWidth;
  }

  // Fit the canvases into some room, and take over the page's colours.
  layout(pool, colours, room) {
    this.pool = pool;
    this.colours = colours;
    if (!pool.numBlocks) return;
    this.grid.layout(pool.numBlocks, room, colours);
    this.host.hidden = !pool.numHostSlots;
    const below = { width: room.width, height: room.height / 4 };
    if (pool.numHostSlots) this.hostGrid.layout(pool.numHostSlots, below, colours);
    this.poolSize.textContent = `${plural(pool.numBlocks, "block")} of ${plural(pool.blockSize, "token")}`;
  }

  // Show a pool as it is now. curves: what the charts draw, by key.
  draw(pool, curves) {
    this.pool = pool;
    if (!pool.numBlocks) return;
    this.grid.draw(pool);
    if (pool.numHostSlots) {
      this.hostGrid.draw({
        owner: null, fill: null, refs: new Uint16Array(pool.numHostSlots), cached: pool.host,
        blockSize: 1,
      });
      const used = pool.sums.host;
      this.hostSize.textContent = `${count(used)} of ${plural(pool.numHostSlots, "slot")} hold a swapped block`;
      this.hostGrid.light.ariaLabel = `Host tier: ${this.hostSize.textContent}`;
    }
    for (const chart of this.charts) chart.draw(curves(chart.key));
    this._drawShares(pool);
    this._drawRows(pool);
    this._drawQueue(pool);
    this._show();
  }

  _drawShares({ sums, numBlocks, blockSize, numRunning, numSlots, numWaiting, holding }) {
    const places = numBlocks * blockSize;
    const amounts = {
      useful: sums.tokens,
      reserved: sums.owned * blockSize - sums.tokens,
      cached: sums.cached * blockSize,
      free: sums.free * blockSize,
    };
    for (const { kind, bar, value } of this.kinds) {
      bar.style.flexGrow = amounts[kind];
      value.textContent = percent(amounts[kind] / places);
    }
    this.shared.textContent = sums.shared
      ? `${count(sums.shared)} shared, saving ${count(sums.saved)}` : "none shared";
    const parts = [`${count(numRunning)} of ${count(numSlots)} run`];
    if (numWaiting) {
      const why = REASONS[holding];
      parts.push(`${count(numWaiting)} wait${why ? `: ${why}` : ""}`);
    }
    this.now.textContent = parts.join(" · ");
    this.runningSize.textContent = plural(numRunning, "sequence");
    const why = numWaiting && REASONS[holding] ? ` · first: ${REASONS[holding]}` : "";
    this.waitingSize.textContent = `${plural(numWaiting, "request")}${why}`;
  }

  _drawRows(pool) {
    const shown = pool.running.slice(0, MAX_ROWS);
    while (this.rows.children.length < shown.length) this.rows.append(this._makeRow());
    while (this.rows.children.length > shown.length) this.rows.lastElementChild.remove();
    const domains = new Set([...pool.running, ...pool.waiting].map(({ domain }) => domain));
    this.element.classList.toggle("one-domain", domains.size < 2);
    const longest = shown.reduce((most, seq) => Math.max(most, seq.table.length), 1);
    shown.forEach((seq, index) => {
      const row = this.rows.children[index];
      row.number = seq.number;
      const [chip, name, domain, tokens] = row.children;
      chip.style.backgroundColor = css(this.colours.owner(seq.number).full);
      name.textContent = seq.id;
      name.title = seq.id;
      domain.textContent = seq.domain;
      const generated = seq.numKnown - seq.numPrompt;
      tokens.textContent = `${count(seq.numPrompt)} + ${count(generated)}`;
      const notes = [
        `${seq.id}, ${seq.domain}: ${plural(seq.numPrompt, "prompt token")}, ${count(generated)} generated`,
      ];
      if (seq.numCached) notes.push(`${count(seq.numCached)} found in the cache`);
      if (seq.numPreemptions) notes.push(`preempted ${plural(seq.numPreemptions, "time")}`);
      notes.push(plural(seq.table.length, "block"));
      row.title = notes.join("\n");
      row.ariaLabel = notes.join(", ");
      row.ariaPressed = String(seq.number === this.pinned);
      this._drawTable(row.lastElementChild, seq, longest);
    });
    const hidden = pool.running.length - shown.length;
    this.more.textContent = hidden > 0 ? `and ${count(hidden)} more` : "";
  }

  _makeRow() {
    const row = make("li");
    row.tabIndex = 0;
    row.setAttribute("role", "button");
    row.append(make("i", "chip"), make("span", "id"), make("span", "domain"), make("span", "tokens"));
    const canvas = make("canvas");
    canvas.ariaHidden = "true";
    row.append(canvas);
    const toggle = () => this._pin(this.pinned === row.number ? null : row.number);
    row.addEventListener("click", toggle);
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter") toggle();
      else if (event.key === "Escape") this._pin(null);
    });
    const point = (number) => () => { this.pointed = number(); this._show(); };
    row.addEventListener("pointerenter", point(() => row.number));
    row.addEventListener("focus", point(() => row.number));
    row.addEventListener("pointerleave", point(() => null));
    row.addEventListener("blur", point(() => null));
    return row;
  }

  // The block table, in the order of positions, with the looks of the grid.
  _drawTable(canvas, seq, longest) {
    const { pool } = this;
    const ratio = Math.max(1, Math.round(window.devicePixelRatio || 1));
    const width = canvas.clientWidth * ratio;
    const height = canvas.clientHeight * ratio;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const step = Math.min(8 * ratio, width / longest);
    const gap = step > 4 * ratio ? ratio : 0; // blocks are told apart where there is room for it
    const { full, tint, line } = this.colours.owner(seq.number);
    const { table } = seq;
    const edge = (position) => Math.round(position * step);
    // One rectangle for each block, or for all of them.
    const bars = (blocks, top, bottom) => {
      if (!gap) {
        context.fillRect(0, top, edge(blocks), bottom - top);
        return;
      }
      for (let each = 0; each < blocks; each += 1) {
        context.fillRect(edge(each), top, edge(each + 1) - edge(each) - gap, bottom - top);
      }
    };
    context.fillStyle = css(line);
    bars(table.length, 0, height);
    context.fillStyle = css(tint);
    bars(table.length, ratio, height - ratio);
    context.fillStyle = css(full);
    const numFull = Math.min(table.length, Math.floor(seq.numComputed / pool.blockSize));
    bars(numFull, 0, height);
    const rest = seq.numComputed - numFull * pool.blockSize;
    if (rest > 0 && numFull < table.length) {
      const filled = Math.max(1, Math.round((height * rest) / pool.blockSize));
      const inside = Math.max(1, edge(numFull + 1) - edge(numFull) - gap);
      context.fillRect(edge(numFull), height - filled, inside, filled);
    }
    context.fillStyle = css(this.colours.ground);
    table.forEach((block, position) => {
      if (pool.refs[block] < 2) return;
      const inside = Math.max(1, edge(position + 1) - edge(position) - gap);
      const dot = Math.max(1, Math.floor(inside / 2));
      const left = edge(position) + Math.floor((inside - dot) / 2);
      context.fillRect(left, Math.floor((height - dot) / 2), dot, dot);
    });
  }

  _drawQueue({ waiting, numWaiting }) {
    const items = waiting.slice(0, 12).map((request) => {
      const item = make("li");
      item.append(make("span", "id", request.id), make("span", "domain", request.domain));
      const again = request.numPreemptions ? `, preempted ${plural(request.numPreemptions, "time")}` : "";
      item.append(make("span", "tokens", `${plural(request.numKnown, "token")}${again}`));
      return item;
    });
    if (items.length && numWaiting > items.length) {
      items.push(make("li", "more", `and ${count(numWaiting - items.length)} more`));
    }
    this.queue.replaceChildren(...items);
  }

  _pin(number) {
    this.pinned = number;
    for (const row of this.rows.children) row.ariaPressed = String(row.number === number);
    this._show();
  }

  // The block before or after this one in its first owner's table.
  _along(block, step) {
    const owners = this.pool.ownersOf(block);
    const { seq, position } = owners.find((each) => each.seq.number === this.pinned) ?? owners[0] ?? {};
    return seq?.table[position + step] ?? block;
  }

  // Light up the sequence that is pinned or pointed at, and say what the block at hand is.
  _show() {
    const { pool } = this;
    if (!pool?.sums) return;
    const block = this.grid.current;
    const owners = block === null ? [] : pool.ownersOf(block);
    const number = this.pointed ?? owners[0]?.seq.number ?? this.pinned;
    const lit = pool.running.find((seq) => seq.number === number);
    this.grid.spotlight(lit ? lit.table : null);
    const lines = block === null ? [] : this._describe(block, owners);
    if (block === null && lit) lines.push(["", `${lit.id}: ${plural(lit.table.length, "block")}`]);
    if (!lines.length) lines.push(["hint", "Point at a block, or move between blocks with the arrow keys."]);
    const text = lines.map(([, line]) => line).join("\n");
    if (text === this._said) return; // so that screen readers aren't told it again
    this._said = text;
    this.inspector.replaceChildren(...lines.map(([kind, line]) => make("p", kind, line)));
  }

  _describe(block, owners) {
    const { pool } = this;
    const name = `Block ${count(block)}`;
    if (!owners.length) {
      return pool.cached[block]
        ? [["what", `${name}: cached`], ["", "Nobody's; its tokens can be found again, or evicted."]]
        : [["what", `${name}: free`], ["", "Nobody's, and it holds nothing."]];
    }
    const refs = owners.length > 1 ? `shared by ${owners.length} sequences` : "owned by one sequence";
    const tokens = pool.fill[block];
    const holds = tokens ? `${tokens} of ${pool.blockSize} tokens` : "reserved, no token yet";
    const lines = [["what", `${name}: ${refs}, ${holds}`]];
    for (const { seq, position } of owners.slice(0, 3)) {
      const first = position * pool.blockSize;
      lines.push(["", `${seq.id} (${seq.domain}): block ${position + 1} of ${seq.table.length}, `
        + `positions ${count(first)}–${count(first + pool.blockSize - 1)}`]);
    }
    if (owners.length > 3) lines.push(["", `and ${owners.length - 3} more`]);
    return lines;
  }
}
