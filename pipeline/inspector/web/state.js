// What is looked at, and the address that says so: everything after '#' is one query string, so a view can be sent.
import { useEffect, useState } from "./preact-htm.js";

// Filters in the order they are shown; the server knows them under the same names.
export const FILTERS = ["q", "text", "like", "kept", "rule", "model", "has", "flag", "bucket", "source", "voted"];
export const SEVERAL = ["rule", "model", "has", "flag", "bucket", "source", "voted"]; // of several values any will do
const OWN = ["view", "clip", "at", "vs", "a", "b", "change", "page"]; // names of this page alone
const SINGLE = [...FILTERS, "sort", ...OWN];

// '#q=dog&flag=loop&range=fit:0.1:' → {q: "dog", flag: ["loop"], range: {fit: ["0.1", ""]}}; names nobody knows are
// dropped.
export function parse(hash) {
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const state = { range: {} };
  for (const name of SINGLE) {
    const values = [...new Set(query.getAll(name).filter(Boolean))];
    if (values.length) state[name] = SEVERAL.includes(name) ? values : values[0];
  }
  for (const text of query.getAll("range")) {
    const [, column, low, high] = /^(.*):([^:]*):([^:]*)$/.exec(text) ?? [];
    if (column && (low || high)) state.range[column] = [low, high];
  }
  return state;
}

function write(state, names) {
  const query = new URLSearchParams();
  for (const name of names) for (const value of state[name] ? [state[name]].flat() : []) query.append(name, value);
  for (const [column, [low, high]] of Object.entries(state.range)) query.append("range", `${column}:${low}:${high}`);
  return query.toString();
}

// The query string that /api/clips and its kin take.
export function filters(state, { sort = true } = {}) {
  return write(state, sort ? [...FILTERS, "sort"] : FILTERS);
}

export function address(state) {
  return "#" + write(state, SINGLE);
}

// The state with `patch` laid over it; an empty value takes a name away.
export function changed(state, patch) {
  return { ...state, ...patch, range: { ...(patch.range ?? state.range) } };
}

// With one more value of a filter, or without it where it was there.
export function toggled(state, name, value) {
  const before = state[name] ?? [];
  const values = before.includes(value) ? before.filter((v) => v !== value) : [...before, value];
  return changed(state, { [name]: values.length ? values : "", at: "" });
}

export function withRange(state, column, pair) {
  const range = { ...state.range };
  if (pair && (pair[0] || pair[1])) range[column] = pair;
  else delete range[column];
  return changed(state, { range, at: "" });
}

export function noFilters(state) {
  return { ...Object.fromEntries(OWN.map((name) => [name, state[name]])), sort: state.sort, range: {} };
}

export function hasFilters(state) {
  return FILTERS.some((name) => state[name]) || Object.keys(state.range).length > 0;
}

const listeners = new Set();

// Show another state: a new step of the history, or in place of this one.
export function go(state, { replace = false } = {}) {
  const to = address(state);
  if (to === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](null, "", to);
  listeners.forEach((listener) => listener());
}

export function useAddress() {
  const [hash, set] = useState(location.hash);
  useEffect(() => {
    const listener = () => set(location.hash);
    listeners.add(listener);
    addEventListener("popstate", listener);
    addEventListener("hashchange", listener);
    return () => {
      listeners.delete(listener);
      removeEventListener("popstate", listener);
      removeEventListener("hashchange", listener);
    };
  }, []);
  return hash;
}

// What this browser remembers: the voter's name, the theme, the size of the cards. Works where storage is refused.
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem("clipmill." + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem("clipmill." + name, JSON.stringify(value));
  } catch {
    // A private window: the setting lasts as long as the page.
  }
}
