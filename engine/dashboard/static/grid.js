// The pool as a grid of blocks on a canvas. A block's state is told by shape, its owner by colour:
//
//   free      an empty, faint outline
//   cached    hatched, grey
//   owned     filled from the bottom as far as it has tokens, with an outline in the owner's colour
//   shared    and with the number of its owners, or a dot where there is no room for it
//
// Only blocks that look different than before are painted, so 100,000 of them take milliseconds.

import { colourNumber, css, pixel } from "./colours.js";

const SIZES = [20, 18, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3]; // pixels of a block
const SMALLER = [3, 2, 1]; // for pools that fit nowhere
const MAX_HEIGHT = 4000; // pixels; browsers refuse canvases several times as high
const GUTTER = 46; // for the numbers of blocks, left of the grid
const [GROUND, FULL, TINT, LINE, BRIGHT, FREE, CACHED] = [0, 1, 2, 3, 4, 5, 6]; // pixels of a mask
const KIND_FREE = 0;
const KIND_CACHED = 1;
const KIND_OWNED = 2;
const MAX_REFS = 10; // that many and more look the same
// 3 x 5 pixels, row by row; the last one is a plus.
const DIGITS = [
  "111101101101111", "010110010010111", "111001111100111", "111001011001111", "101101111001001",
  "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
  "000010111010000",
];

export class BlockGrid {
  // element: an empty one, to draw in. handlers: {inspect(block or null), pin(block), unpin(),
  // along(block, step)}, of which the last gives another block; without handlers it is a display.
  constructor(element, label, handlers = null) {
    this.element = element;
    this.handlers = handlers;
    this.labels = document.createElement("div");
    this.labels.className = "numbers";
    this.labels.ariaHidden = "true";
    this.canvas = document.createElement("canvas");
    this.light = document.createElement("canvas"); // spotlight and focus, over the blocks
    this.light.className = "light";
    element.append(this.labels, this.canvas, this.light);
    this.canvas.ariaHidden = "true";
    this.numBlocks = 0;
    this.hovered = null;
    this.focused = null;
    if (handlers) {
      this.light.tabIndex = 0;
      this.light.setAttribute("role", "application");
      this.light.setAttribute("aria-roledescription", "block grid");
      this._listen();
    } else {
      this.light.setAttribute("role", "img");
    }
    this.light.ariaLabel = label;
  }

  // Choose the size of blocks for some room, {width, height}; at worst they need more height than
  // there is. Everything is painted anew by the next `draw`.
  layout(numBlocks, room, colours) {
    this.numBlocks = numBlocks;
    this.colours = colours;
    const width = Math.max(60, room.width - GUTTER);
    const ratio = Math.max(1, Math.round(window.devicePixelRatio || 1));
    const rowsAt = (size) => Math.ceil(numBlocks / this._columns(width, size));
    const fits = (height) => (each) => rowsAt(each) * each <= height;
    const size = SIZES.find(fits(room.height)) ?? SMALLER.find(fits(MAX_HEIGHT)) ?? 1;
    this.size = size;
    this.columns = Math.min(this._columns(width, size), numBlocks);
    this.rows = Math.ceil(numBlocks / this.columns);
    this.cell = size * ratio;
    this.ratio = ratio;
    for (const canvas of [this.canvas, this.light]) {
      canvas.width = this.columns * this.cell;
      canvas.height = this.rows * this.cell;
      canvas.style.width = `${this.columns * size}px`;
      canvas.style.height = `${this.rows * size}px`;
    }
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.context.fillStyle = css(colours.ground);
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.pixels = new Uint32Array(this.image.data.buffer).fill(pixel(colours.ground));
    this.seen = new Int32Array(numBlocks).fill(-1);
    this.masks = new Map();
    this.palettes = new Map();
    this._number();
    if (this.focused !== null) this.focused = Math.min(this.focused, numBlocks - 1);
  }

  _columns(width, size) {
    const most = Math.max(1, Math.floor(width / size));
    return most > 16 ? most - (most % 8) : most;
  }

  // The number of the first block of some rows.
  _number() {
    const every = Math.max(1, Math.ceil(26 / this.size));
    const labels = [];
    for (let row = 0; row < this.rows; row += every) {
      const label = document.createElement("span");
      label.textContent = (row * this.columns).toLocaleString("en");
      label.style.top = `${row * this.size + this.size / 2}px`;
      labels.push(label);
    }
    this.labels.replaceChildren(...labels);
  }

  // Paint what changed. owner: Int32Array, -1 for none; refs, fill (tokens): Uint16Array;
  // cached: Uint8Array. Returns how many blocks were painted.
  draw({ owner, refs, fill, cached, blockSize }) {
    const levels = Math.max(1, this._inner());
    const { seen, columns, cell } = this;
    let painted = 0;
    let top = Infinity;
    let bottom = -1;
    for (let block = 0; block < this.numBlocks; block += 1) {
      let look;
      if (refs[block]) {
        const level = Math.min(63, Math.ceil((fill[block] * Math.min(levels, 63)) / blockSize));
        const count = Math.min(MAX_REFS, refs[block]);
        look = (colourNumber(owner[block]) << 12) | (level << 6) | (count << 2) | KIND_OWNED;
      } else {
        look = cached[block] ? KIND_CACHED : KIND_FREE;
      }
      if (seen[block] === look) continue;
      seen[block] = look;
      const row = Math.floor(block / columns);
      this._paint((block - row * columns) * cell, row * cell, look);
      painted += 1;
      if (row < top) top = row;
      if (row > bottom) bottom = row;
    }
    if (painted) {
      const height = (bottom - top + 1) * cell;
      this.context.putImageData(this.image, 0, 0, 0, top * cell, this.canvas.width, height);
    }
    return painted;
  }

  _paint(left, top, look) {
    const mask = this._mask(look & 0xfff);
    const palette = this._palette(look >> 12, look & 3);
    const { cell, pixels } = this;
    const width = this.canvas.width;
    let index = 0;
    for (let y = 0; y < cell; y += 1) {
      let at = (top + y) * width + left;
      for (let x = 0; x < cell; x += 1) {
        pixels[at] = palette[mask[index]];
        at += 1;
        index += 1;
      }
    }
  }

  _palette(number, kind) {
    const key = kind === KIND_OWNED ? number : -1;
    let palette = this.palettes.get(key);
    if (palette === undefined) {
      const { colours } = this;
      const { full, tint, line, bright } = colours.owner(key < 0 ? 0 : key);
      palette = Uint32Array.from(
        [colours.ground, full, tint, line, bright, colours.free, colours.cached], pixel);
      this.palettes.set(key, palette);
    }
    return palette;
  }

  // Pixels between blocks, and of a block inside its outline.
  _gap() {
    if (this.cell >= 14) return 2;
    return this.cell >= 4 ? 1 : 0;
  }

  _inner() {
    const inside = this.cell - this._gap();
    return inside >= 6 ? inside - 2 : inside;
  }

  _mask(look) {
    let mask = this.masks.get(look);
    if (mask === undefined) {
      mask = this._makeMask(look & 3, look >> 6, (look >> 2) & 15);
      this.masks.set(look, mask);
    }
    return mask;
  }

  _makeMask(kind, level, refs) {
    const { cell } = this;
    const inside = cell - this._gap();
    const mask = new Uint8Array(cell * cell).fill(GROUND);
    const outlined = inside >= 6;
    for (let y = 0; y < inside; y += 1) {
      for (let x = 0; x < inside; x += 1) {
        const isEdge = outlined && (x === 0 || y === 0 || x === inside - 1 || y === inside - 1);
        let value;
        if (kind === KIND_FREE) {
          value = isEdge || !outlined ? FREE : GROUND;
        } else if (kind === KIND_CACHED) {
          value = inside < 4 || (x + y) % 4 < 2 ? CACHED : GROUND;
        } else {
          const fromBottom = inside - (outlined ? 1 : 0) - y;
          const isFull = inside < 4 ? level > 0 : fromBottom <= level;
          if (isFull) value = FULL;
          else value = isEdge ? LINE : TINT;
          if (isEdge && level > 0) value = isFull || level >= this._inner() ? FULL : LINE;
          if (!outlined && !isFull && level === 0) value = inside < 4 ? LINE : TINT;
        }
        mask[y * cell + x] = value;
      }
    }
    if (kind === KIND_OWNED && refs > 1) this._mark(mask, inside, refs);
    return mask;
  }

  // The number of owners, or a dot.
  _mark(mask, inside, refs) {
    const { cell } = this;
    const set = (x, y, value) => { mask[y * cell + x] = value; };
    if (inside >= 9) {
      const scale = Math.max(1, Math.floor((inside - 2) / 7));
      const left = Math.floor((inside - 3 * scale) / 2);
      const top = Math.floor((inside - 5 * scale) / 2);
      const digit = DIGITS[refs];
      for (let y = -1; y <= 5 * scale; y += 1) {
        for (let x = -1; x <= 3 * scale; x += 1) set(left + x, top + y, GROUND);
      }
      for (let y = 0; y < 5 * scale; y += 1) {
        for (let x = 0; x < 3 * scale; x += 1) {
          const bit = digit[Math.floor(y / scale) * 3 + Math.floor(x / scale)];
          if (bit === "1") set(left + x, top + y, BRIGHT);
        }
      }
    } else if (inside >= 4) {
      const dot = inside >= 7 ? 3 : 2;
      const left = Math.floor((inside - dot) / 2);
      for (let y = 0; y < dot; y += 1) {
        for (let x = 0; x < dot; x += 1) set(left + x, left + y, GROUND);
      }
    } else {
      for (let y = 0; y < inside; y += 1) for (let x = 0; x < inside; x += 1) set(x, y, BRIGHT);
    }
  }

  // Leave only these blocks in the light (null: all), and show where the focus is.
  spotlight(blocks) {
    const context = this.light.getContext("2d");
    const { cell } = this;
    context.clearRect(0, 0, this.light.width, this.light.height);
    const place = (block) => [(block % this.columns) * cell, Math.floor(block / this.columns) * cell];
    if (blocks !== null) {
      context.globalAlpha = 0.78;
      context.fillStyle = css(this.colours.ground);
      context.fillRect(0, 0, this.light.width, this.light.height);
      context.globalAlpha = 1;
      for (const block of blocks) context.clearRect(...place(block), cell, cell);
    }
    const at = this.hovered ?? (this.light.matches(":focus") ? this.focused : null);
    if (at === null || at >= this.numBlocks) return;
    const [x, y] = place(at);
    const width = 2 * this.ratio;
    const side = Math.max(cell - this._gap(), 4 * this.ratio) + width;
    context.lineWidth = width + 2;
    context.strokeStyle = css(this.colours.ground);
    context.strokeRect(x - width / 2, y - width / 2, side, side);
    context.lineWidth = width;
    context.strokeStyle = css(this.colours.text);
    context.strokeRect(x - width / 2, y - width / 2, side, side);
  }

  // The block that the pointer or the keyboard is at, or null.
  get current() {
    return this.hovered ?? (this.light.matches(":focus") ? this.focused : null);
  }

  _listen() {
    const { light, handlers } = this;
    const inspect = () => handlers.inspect(this.current);
    light.addEventListener("pointermove", (event) => {
      const column = Math.floor(event.offsetX / this.size);
      const block = Math.floor(event.offsetY / this.size) * this.columns + column;
      const isBlock = column >= 0 && column < this.columns && block >= 0 && block < this.numBlocks;
      this.hovered = isBlock ? block : null;
      inspect();
    });
    light.addEventListener("pointerleave", () => { this.hovered = null; inspect(); });
    light.addEventListener("click", () => {
      if (this.hovered === null) return;
      this.focused = this.hovered;
      handlers.pin(this.hovered);
    });
    light.addEventListener("focus", () => { this.focused ??= 0; inspect(); });
    light.addEventListener("blur", inspect);
    light.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const moved = this._moved(event.key);
      if (moved !== null) {
        this.focused = Math.min(this.numBlocks - 1, Math.max(0, moved));
        this.hovered = null;
        inspect();
      } else if (event.key === "Enter") {
        handlers.pin(this.focused);
      } else if (event.key === "Escape") {
        handlers.unpin();
      } else {
        return;
      }
      event.preventDefault();
    });
  }

  _moved(key) {
    const { focused, columns } = this;
    const row = focused - (focused % columns);
    const inGrid = (block) => (block >= 0 && block < this.numBlocks ? block : focused);
    switch (key) {
      case "ArrowLeft": return focused - 1;
      case "ArrowRight": return focused + 1;
      case "ArrowUp": return inGrid(focused - columns);
      case "ArrowDown": return inGrid(focused + columns);
      case "PageUp": return inGrid(focused - 10 * columns);
      case "PageDown": return inGrid(focused + 10 * columns);
      case "Home": return row;
      case "End": return row + columns - 1;
      case "[": return this.handlers.along(focused, -1);
      case "]": return this.handlers.along(focused, 1);
      default: return null;
    }
  }
}
