// Colours: those of the theme, read from the style sheet, and one for each sequence.

const NUMBERS = 2 ** 18; // sequences this far apart share a colour
const GOLDEN_ANGLE = 137.508; // degrees: numbers that follow each other get hues far apart

// OKLCH to sRGB bytes (https://bottosson.github.io/posts/oklab/).
function oklch(lightness, chroma, hue) {
  const angle = (hue * Math.PI) / 180;
  const a = chroma * Math.cos(angle);
  const b = chroma * Math.sin(angle);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((linear) => {
    const value = Math.min(1, Math.max(0, linear));
    const encoded = value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055;
    return Math.round(255 * encoded);
  });
}

function mix(over, under, share) {
  return over.map((value, index) => Math.round(share * value + (1 - share) * under[index]));
}

export function css([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}

// A pixel of an ImageData seen as a Uint32Array, on a little-endian machine.
export function pixel([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

export function colourNumber(number) {
  return number % NUMBERS;
}

// What the style sheet says now; made anew when the theme changes.
export class Colours {
  constructor() {
    const probe = document.createElement("span");
    document.body.append(probe);
    const read = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    };
    this.ground = read("ground");
    this.free = read("free");
    this.cached = read("cached");
    this.text = read("text");
    this.isDark = this.ground[0] < 128;
    probe.remove();
    this._owners = new Map();
  }

  // {full, tint, line, bright} of a sequence.
  owner(number) {
    const key = colourNumber(number);
    let found = this._owners.get(key);
    if (found === undefined) {
      const hue = (20 + key * GOLDEN_ANGLE) % 360;
      const levels = this.isDark ? [0.72, 0.64, 0.8] : [0.66, 0.57, 0.75];
      const lightness = levels[key % 3];
      const full = oklch(lightness, 0.105, hue);
      found = {
        full,
        tint: mix(full, this.ground, 0.13),
        line: mix(full, this.ground, 0.55),
        bright: oklch(this.isDark ? 0.93 : 0.36, 0.07, hue),
      };
      this._owners.set(key, found);
    }
    return found;
  }
}
