// Asks the server, or, in a page that carries its clips with it, the page itself.
import { useEffect, useRef, useState } from "./preact-htm.js";
import { answer } from "./static.js";

const embedded = document.getElementById("static-data");
export const carried = embedded && JSON.parse(embedded.textContent); // null where there is a server

async function read(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // What is not JSON is no answer of the inspector: say so below.
  }
  if (response.ok && body !== null) return body;
  throw new Error(body?.error ?? `The server answered ${response.status} ${response.statusText}.`);
}

export async function get(path, signal) {
  if (carried) return answer(carried, path);
  try {
    return await read(await fetch(path, { signal, headers: { Accept: "application/json" } }));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("The inspector does not answer. Is `clipmill inspect` still running?");
    throw error;
  }
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json", "X-Clipmill": "1" };
  try {
    return await read(await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("the inspector does not answer");
    throw error;
  }
}

// {data, error, loading} of a path; what was there stays until the new answer has come. No path: nothing.
export function useAnswer(path, again = 0) {
  const [got, set] = useState({ path: null, data: null, error: null });
  const newest = useRef(null);
  newest.current = path;
  useEffect(() => {
    if (!path) return;
    const stop = new AbortController();
    get(path, stop.signal).then(
      (data) => newest.current === path && set({ path, data, error: null }),
      (error) => error.name !== "AbortError" && newest.current === path && set({ path, data: null, error: error.message }),
    );
    return () => stop.abort();
  }, [path, again]);
  return { data: got.data, error: got.error, loading: got.path !== path, of: got.path };
}

export function mediaOf(id, run = 1) {
  if (carried) return carried.clips.find((clip) => clip.id === id)?.video_data ?? null;
  return `media/${encodeURIComponent(id)}.mp4${run === 2 ? "?run=2" : ""}`;
}

export function stillOf(id, k, run = 1) {
  if (carried) return carried.clips.find((clip) => clip.id === id)?.stills_data?.[k] ?? null;
  return `still/${encodeURIComponent(id)}/${k}.jpg${run === 2 ? "?run=2" : ""}`;
}
