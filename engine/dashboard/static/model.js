// Frames become pools: who owns which block, and what follows from it. No drawing here.

const RATE_FRAMES = 5; // over which tokens per second are counted, at least

function eachOfRuns(runs, visit) {
  for (let index = 0; index < runs.length; index += 2) {
    const end = runs[index] + runs[index + 1];
    for (let block = runs[index]; block < end; block += 1) visit(block);
  }
}

// One pool at one moment; `apply` takes it to the next frame.
export class Pool {
  constructor() {
    this.numBlocks = 0;
    this.running = [];
    this.waiting = [];
  }

  apply(frame) {
    if (frame.pool) this._start(frame.pool);
    this.time = frame.time;
    this.step = frame.step;
    this.generated = frame.generated;
    this.preemptions = frame.preemptions;
    this.holding = frame.holding;
    this.numWaiting = frame.num_waiting;
    this.numRunning = frame.num_running; // of this.running; those after them keep blocks only
    this.waiting = frame.waiting.map(
      ([number, id, domain, numPrompt, numKnown, numPreemptions]) =>
        ({ number, id, domain, numPrompt, numKnown, numPreemptions }));
    const before = new Map(this.running.map((seq) => [seq.number, seq]));
    this.running = frame.running.map((entry) => {
      const [number, numKnown, numComputed, numPreemptions, stays, runs] = entry;
      const old = before.get(number);
      const [id, domain, numPrompt, numCached] =
        entry.length > 6 ? entry.slice(6) : [old.id, old.domain, old.numPrompt, old.numCached];
      const table = old ? old.table.slice(0, stays) : [];
      eachOfRuns(runs, (block) => table.push(block));
      return {
        number, id, domain, numPrompt, numCached, numKnown, numComputed, numPreemptions, table,
      };
    });
    for (const [places, [added, removed]] of [[this.cached, frame.cached], [this.host, frame.host]]) {
      eachOfRuns(removed, (place) => { places[place] = 0; });
      eachOfRuns(added, (place) => { places[place] = 1; });
    }
  }

  _start(sizes) {
    this.numBlocks = sizes.num_blocks;
    this.blockSize = sizes.block_size;
    this.numHostSlots = sizes.num_host_slots;
    this.numSlots = sizes.num_slots;
    this.running = [];
    this.numRunning = 0;
    this.cached = new Uint8Array(this.numBlocks);
    this.host = new Uint8Array(this.numHostSlots);
    this.owner = new Int32Array(this.numBlocks); // number of the first owner, or -1
    this.refs = new Uint16Array(this.numBlocks);
    this.fill = new Uint16Array(this.numBlocks); // tokens in it, at most one block's
  }

  // Work out owners, reference counts and tokens of each block, and sums over all.
  derive() {
    const { owner, refs, fill, blockSize } = this;
    owner.fill(-1);
    refs.fill(0);
    fill.fill(0);
    for (let index = this.running.length - 1; index >= 0; index -= 1) {
      const { number, table, numComputed } = this.running[index];
      for (let position = 0; position < table.length; position += 1) {
        const block = table[position];
        const tokens = Math.min(blockSize, numComputed - position * blockSize);
        owner[block] = number;
        refs[block] += 1;
        if (tokens > fill[block]) fill[block] = tokens;
      }
    }
    const sums = { tokens: 0, owned: 0, shared: 0, saved: 0, cached: 0, host: 0 };
    for (let block = 0; block < this.numBlocks; block += 1) {
      const count = refs[block];
      if (count) {
        sums.owned += 1;
        sums.tokens += fill[block];
        if (count > 1) {
          sums.shared += 1;
          sums.saved += count - 1;
        }
      } else {
        sums.cached += this.cached[block];
      }
    }
    for (const used of this.host) sums.host += used;
    sums.free = this.numBlocks - sums.owned - sums.cached;
    this.sums = sums;
    return this;
  }

  // [{seq, position}] of all sequences that own a block, and where in their tables it is.
  ownersOf(block) {
    const owners = [];
    for (const seq of this.running) {
      const position = seq.table.indexOf(block);
      if (position >= 0) owners.push({ seq, position });
    }
    return owners;
  }
}

// The curves, one value a frame.
export class Series {
  constructor(limit = Infinity) {
    this.limit = limit;
    this.time = [];
    this.generated = [];
    this.curves = { used: [], useful: [], rate: [], running: [], waiting: [], hits: [], lost: [] };
  }

  add(pool, rateFrames = RATE_FRAMES) {
    const { sums, running, numRunning, blockSize, numBlocks } = pool;
    const { curves } = this;
    const first = Math.max(0, this.time.length - rateFrames);
    const elapsed = this.time.length ? pool.time - this.time[first] : 0;
    let prompt = 0;
    let cached = 0;
    for (const seq of running.slice(0, numRunning)) {
      prompt += seq.numPrompt;
      cached += seq.numCached;
    }
    curves.used.push(sums.owned / numBlocks);
    curves.useful.push(sums.owned ? sums.tokens / (sums.owned * blockSize) : NaN);
    curves.rate.push(elapsed > 0 ? (pool.generated - this.generated[first]) / elapsed : NaN);
    curves.running.push(numRunning);
    curves.waiting.push(pool.numWaiting);
    curves.hits.push(prompt ? cached / prompt : NaN);
    curves.lost.push(pool.preemptions);
    this.time.push(pool.time);
    this.generated.push(pool.generated);
    if (this.time.length > this.limit) {
      for (const values of [this.time, this.generated, ...Object.values(curves)]) values.shift();
    }
  }
}

// A recording: every frame is there, and any moment can be shown.
export class Recorded {
  constructor(recording) {
    this.frames = recording.frames;
    this.times = this.frames.map((frame) => frame.time);
    this.pool = new Pool();
    this.index = -1;
    this.series = new Series();
    const rateFrames = Math.max(1, Math.ceil(this.frames.length / 80));
    for (const frame of this.frames) {
      this.pool.apply(frame);
      this.series.add(this.pool.derive(), rateFrames);
    }
    this.index = this.frames.length - 1;
  }

  // The pool at a time: the last frame that is not after it.
  seek(time) {
    let low = 0;
    let high = this.times.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.times[middle] <= time) low = middle;
      else high = middle;
    }
    if (low !== this.index) {
      let from = low;
      while (!this.frames[from].pool && from !== this.index + 1) from -= 1;
      for (let index = from; index <= low; index += 1) this.pool.apply(this.frames[index]);
      this.index = low;
      this.pool.derive();
    }
    return this.pool;
  }
}
