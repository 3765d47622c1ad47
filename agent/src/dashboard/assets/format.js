// Numbers as people read them.

/** Four significant digits, an exponent only where it is shorter. */
export function number(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) {
    const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
    const short = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return minus(`${short}e${exponent.replace("+", "")}`);
  }
  const fixed = size >= 10 ** digits ? x.toFixed(0) : x.toPrecision(digits);
  return minus(fixed.includes(".") ? fixed.replace(/\.?0+$/, "") : fixed);
}

function minus(text) {
  return text.replace(/-/g, "\u2212");
}

/** A whole number with thin spaces between thousands. */
export function count(n) {
  return String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** A whole number in four characters or so: 999, 1.2k, 34M. */
export function brief(n) {
  const units = ["", "k", "M", "G", "T"];
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${i === 0 ? n : n.toPrecision(n < 99.95 ? 2 : 3)}${units[i]}`;
}

/** Bytes in powers of 1000. */
export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let i = 0;
  while (n >= 999.5 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${i === 0 ? Math.round(n) : n.toPrecision(3)} ${units[i]}`;
}

/** A shape as torch writes it. */
export function shape(dims) {
  return `[${dims.join(", ")}]`;
}

/** Time of day of milliseconds since the epoch. */
export function clock(ms) {
  return ms > 0 ? new Date(ms).toLocaleTimeString() : "–";
}

/** Round numbers that divide `low..high` into about `wanted` pieces. */
export function ticks(low, high, wanted) {
  const span = high - low;
  if (!(span > 0) || !Number.isFinite(span)) return [low];
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= rough) ?? 10);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) out.push(i * step);
  return out;
}

/** Orders names as people do: layer 2 before layer 10. */
export const natural = new Intl.Collator("en", { numeric: true }).compare;

/** Orders what has a job and an attempt: the newest last. */
export function inJobs(a, b) {
  return a.job - b.job || a.attempt - b.attempt;
}

/** The job and attempt of a series, but for the first. */
export function ofJob({ job, attempt }) {
  return job || attempt ? ` · job ${job} attempt ${attempt}` : "";
}
