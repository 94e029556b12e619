// Numbers, times and lists as they are read.

export function count(n) {
  return n == null ? "–" : Math.round(n).toLocaleString("en-US");
}

// Three significant digits, never an exponent for what a person would write out: 0.0123, 4.57, 1280.
export function number(x) {
  if (x == null || Number.isNaN(x)) return "–";
  if (Number.isInteger(x)) return Math.abs(x) < 1e9 ? count(x) : x.toPrecision(3);
  const size = Math.abs(x);
  if (size >= 1000) return count(x);
  return size >= 0.001 ? String(Number(x.toPrecision(3))) : x.toExponential(1);
}

// Two decimals of what lies around one: enough to scan a grid by.
export function short(x) {
  return Math.abs(x) < 100 && !Number.isInteger(x) ? x.toFixed(2) : number(x);
}

// 3.2 s, 1:03.2, 1:02:03
export function time(seconds) {
  if (seconds == null) return "–";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  if (h) return `${h}:${String(m).padStart(2, "0")}:${String(Math.floor(s)).padStart(2, "0")}`;
  return `${m}:${s.toFixed(1).padStart(4, "0")}`;
}

export function plural(n, one, many = one + "s") {
  return `${count(n)} ${n === 1 ? one : many}`;
}

// 'score_text_area' → 'text area', 'caption.clip_score' → 'clip score'
export function words(name) {
  return name.replace(/^(score_|caption\.)/, "").replaceAll("_", " ");
}

export function columnLabel(run, name) {
  return run.columns.find((column) => column.name === name)?.label || words(name);
}

export function percent(x) {
  return x == null ? "–" : `${(100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0)} %`;
}
