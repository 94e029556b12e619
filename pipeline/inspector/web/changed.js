// Whether the run is still as it was read: another layer, other decisions, more clips; and to read it anew.
import { html, useEffect, useState } from "./preact-htm.js";
import { get, post } from "./api.js";

const LOOK_MS = 10_000;
const WORDS = { layers: "its layers", decisions: "its decisions", clips: "its clips" };

export function Changed({ run }) {
  const [state, set] = useState(null);
  const [error, setError] = useState("");
  const reading = Boolean(state?.reading);
  useEffect(() => {
    const look = () => !document.hidden && get("api/state").then(set, () => {}); // no answer: others say so
    const timer = setInterval(look, reading ? 500 : LOOK_MS);
    document.addEventListener("visibilitychange", look);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", look);
    };
  }, [reading]);
  if (!state) return null;
  const renew = () => post("api/renew", {}).then(set, (failed) => setError(failed.message));
  const failed = error || state.failed;
  if (failed) return html`<p class="notice failed" role="alert">It could not be read anew: ${failed} <button onClick=${() => (setError(""), renew())}>Try again</button></p>`;
  if (reading) return html`<p class="notice" role="status">Reading the run anew …</p>`;
  if (state.opened !== run.opened) return html`<p class="notice" role="status">The run was read anew. <button class="main" onClick=${() => location.reload()}>Show it</button></p>`;
  if (!state.changed.length) return null;
  return html`<p class="notice" role="status">The run has changed since it was read: ${state.changed.map((what) => WORDS[what] ?? what).join(", ")}. <button onClick=${renew}>Read it anew</button></p>`;
}
