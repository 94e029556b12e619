// Asks the server, or, in a page that carries its clips with it, the page itself.
import { useEffect, useRef, useState } from "./preact-htm.js";
import { answer } from "./static.js";

const embedded = document.getElementById("static-data");
export const carried = embedded && JSON.parse(embedded.textContent); // null where there is a server

// An error with the status of the answer; without one there was no answer.
class Refused extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

async function read(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // What is not JSON is no answer of the inspector: say so below.
  }
  if (response.ok && body !== null) return body;
  throw new Refused(body?.error ?? `The server answered ${response.status} ${response.statusText}.`, response.status);
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
    if (error instanceof TypeError) throw new Refused("the inspector does not answer", null);
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
      (error) => {
        if (error.name === "AbortError" || newest.current !== path) return;
        // Asked again in vain, what was there stays.
        set((before) => ({ path, data: before.path === path ? before.data : null, error: error.message }));
      },
    );
    return () => stop.abort();
  }, [path, again]);
  return { data: got.data, error: got.error, loading: got.path !== path, of: got.path };
}

// run: "" is the run that is looked at, "other" the one it is compared with.
export function mediaOf(id, run = "") {
  if (carried) return null;
  return `media/${encodeURIComponent(id)}.mp4${run && `?run=${run}`}`;
}

export function stillOf(id, k, run = "") {
  if (carried) return carried.clips.find((clip) => clip.id === id)?.images[k] ?? null;
  return `still/${encodeURIComponent(id)}/${k}.jpg${run && `?run=${run}`}`;
}
