// Keys: whoever is on the page says which it answers to; '?' lists them.
import { html, useEffect, useLayoutEffect, useRef } from "./preact-htm.js";

const layers = []; // the last is asked first

function typing(target) {
  return target.closest?.("input:not([type=range]):not([type=checkbox]):not([type=radio]), textarea, select, dialog");
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || typing(event.target)) return;
  if (event.target.matches?.("[role=slider], input[type=range]") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  // A button or a link that has the focus keeps Space and Enter.
  if ((event.key === " " || event.key === "Enter") && event.target.closest?.("button, a, summary, label")) return;
  for (const layer of [...layers].reverse()) {
    const entry = layer.current.keys.find((k) => k.keys.includes(event.key));
    if (!entry) continue;
    event.preventDefault();
    entry.run(event);
    return;
  }
});

// keys: [{keys: [",", …], show: ",", does: "a frame back", run(event)}]
export function useKeys(title, keys) {
  const layer = useRef(null);
  layer.current = { title, keys };
  useLayoutEffect(() => {
    layers.push(layer);
    return () => void layers.splice(layers.indexOf(layer), 1);
  }, []);
}

// A modal dialog: Escape and a click outside close it; the focus goes back to where it was.
export function Dialog({ label, onClose, children }) {
  const box = useRef(null);
  useEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    return () => before?.focus?.();
  }, []);
  return html`<dialog
    ref=${box}
    aria-label=${label}
    onCancel=${(event) => (event.preventDefault(), onClose())}
    onPointerDown=${(event) => event.target === box.current && onClose()}
  >
    <div class="dialog">${children}</div>
  </dialog>`;
}

export function Help({ onClose }) {
  return html`<${Dialog} label="Keys" onClose=${onClose}>
    <header class="row"><h2>Keys</h2><button class="plain push" onClick=${onClose} aria-label="Close">✕</button></header>
    <div class="keylists">
      ${[...layers].reverse().map(
        ({ current }) =>
          current.keys.length > 0 &&
          html`<section>
            <h3>${current.title}</h3>
            <dl class="keylist">
              ${current.keys.filter((k) => k.does).map((k) => html`<dt>${k.show.split(" ").map((part) => (part === "–" ? part : html`<kbd>${part}</kbd>`))}</dt><dd>${k.does}</dd>`)}
            </dl>
          </section>`,
      )}
    </div>
  <//>`;
}
