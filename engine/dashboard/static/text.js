// Numbers as people read them.

export const count = (value) => Math.round(value).toLocaleString("en");
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
export const percent = (share) => `${(100 * share).toFixed(1)}%`;
