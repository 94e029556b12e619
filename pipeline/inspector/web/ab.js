// Two captioners, blind: which of two texts describes the clip better, until the intervals tell them apart.
import { html, useEffect, useState } from "./preact-htm.js";
import { get, post, useAnswer } from "./api.js";
import { count, number, plural } from "./format.js";
import { useKeys } from "./keys.js";
import { Player } from "./player.js";
import { address, changed, go, recall, remember } from "./state.js";
import { Who } from "./voting.js";

const SIDES = { chosen: "the captions chosen", "other:chosen": "those of the other run" };

function Result({ a, b, again }) {
  const { data, error } = useAnswer(`api/ab/result?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`, again);
  if (error) return html`<p class="soft">${error}</p>`;
  if (!data) return html`<p class="soft">Counting …</p>`;
  if (!data.models?.length || !data.pairs) return html`<p class="soft">No pair has been judged yet.</p>`;
  const lows = data.models.map((m) => m.low ?? m.score);
  const highs = data.models.map((m) => m.high ?? m.score);
  const [low, high] = [Math.min(...lows), Math.max(...highs)];
  const at = (x) => `${(100 * (x - low)) / (high - low || 1)}%`;
  return html`<section class="result">
    <h2>${data.enough ? "Told apart" : "So far"} <small>${plural(data.pairs, "pair")}</small></h2>
    <p class="soft">${data.why}</p>
    <dl class="intervals">
      ${[...data.models].sort((x, y) => y.score - x.score).map(
        (m) => html`<dt><bdi>${m.name}</bdi></dt>
          <dd>
            <span class="interval"><i style=${{ left: at(m.low ?? m.score), right: `calc(100% - ${at(m.high ?? m.score)})` }} /><b style=${{ left: at(m.score) }} /></span>
            <span class="n">${number(m.score)} <span class="soft">[${number(m.low)}, ${number(m.high)}]</span></span>
          </dd>`,
      )}
    </dl>
    <p class="soft small">Bradley–Terry strengths with 95 % intervals.</p>
  </section>`;
}

function Pair({ a, b, who, onAnswered }) {
  const [pair, setPair] = useState(null);
  const [clip, setClip] = useState(null);
  const [error, setError] = useState("");
  const [busy, setBusy] = useState(false);

  async function next() {
    try {
      const query = new URLSearchParams({ a, b, who });
      const given = await get(`api/ab?${query}`);
      const shown = await get(`api/clip/${encodeURIComponent(given.clip)}`);
      setPair(given); // the texts never stand beside the clip before
      setClip(shown);
      setError("");
    } catch (failed) {
      setPair(null);
      setError(failed.message);
    }
    setBusy(false);
  }
  useEffect(() => void next(), [a, b, who]);

  async function answer(said) {
    if (busy || !pair?.pair) return;
    setBusy(true);
    try {
      await post("api/ab", { pair: pair.pair, answer: said, who });
    } catch (failed) {
      setBusy(false);
      return setError(`Not saved: ${failed.message}`);
    }
    onAnswered();
    await next();
  }
  useKeys("Blind comparison", [
    { keys: ["ArrowLeft"], show: "←", does: "the left one is better", run: () => answer("left") },
    { keys: ["ArrowRight"], show: "→", does: "the right one is better", run: () => answer("right") },
    { keys: ["ArrowDown"], show: "↓", does: "a tie", run: () => answer("tie") },
  ]);
  if (error && !pair) return html`<p class="message" role="status">${error}</p>`;
  if (!pair) return html`<p class="soft">…</p>`;
  const done = html`<p class="soft">${count(pair.done)} judged${pair.enough ? ": the intervals tell them apart, more pairs make them narrower." : "."}</p>`;
  return html`<div class="pair" aria-busy=${busy}>
    ${clip && html`<${Player} key=${clip.id} clip=${{ ...clip, stills: 0, sample_times: [] }} autoplay=${!matchMedia("(prefers-reduced-motion: reduce)").matches} />`}
    <div class="sides">
      <button class="side" onClick=${() => answer("left")} disabled=${busy}><span class="text" dir="auto">${pair.left}</span><span class="soft"><kbd>←</kbd> this one is better</span></button>
      <button class="side" onClick=${() => answer("right")} disabled=${busy}><span class="text" dir="auto">${pair.right}</span><span class="soft">this one is better <kbd>→</kbd></span></button>
    </div>
    <p class="row center"><button onClick=${() => answer("tie")} disabled=${busy}><kbd>↓</kbd> a tie</button></p>
    ${error && html`<p class="message" role="alert">${error}</p>`}
    ${done}
  </div>`;
}

export function Blind({ run, state }) {
  const names = [...run.models.map((m) => m.name), "chosen", ...(run.other ? ["other:chosen"] : [])];
  const [who, setWho] = useState(() => recall("who", ""));
  const [again, setAgain] = useState(0);
  const [seen, setSeen] = useState(false);
  const [a, b] = [state.a ?? names[0], state.b ?? names.find((name) => name !== (state.a ?? names[0]))];
  const select = (name, value) => html`<select
    aria-label=${name === "a" ? "First captioner" : "Second captioner"}
    value=${value}
    onChange=${(event) => go(changed(state, { a, b, [name]: event.target.value }))}
  >
    ${names.map((model) => html`<option value=${model} disabled=${model === (name === "a" ? b : a)}>${SIDES[model] ?? model}</option>`)}
  </select>`;
  if (run.models.length + (run.other ? 1 : 0) < 2) return html`<main class="sheet"><p class="message">A blind comparison takes two captioners; this run has ${run.models.length === 1 ? "one" : "none"}.</p></main>`;
  return html`<main class="sheet">
    <div class="row">
      <h1>Blind comparison</h1>
      <span class="row push against">${select("a", a)}<span class="soft">against</span>${select("b", b)}</span>
    </div>
    <p class="soft">Names are hidden and sides are drawn by lot. Which text describes the clip better?</p>
    ${who ? html`<${Pair} key=${`${a}\n${b}\n${who}`} a=${a} b=${b} who=${who} onAnswered=${() => setAgain(again + 1)} />` : html`<${Who} who="" onName=${(name) => (name ? (remember("who", name), setWho(name)) : go(changed(state, { view: "" })))} />`}
    <details onToggle=${(event) => setSeen(event.target.open)}>
      <summary>Result</summary>
      ${seen && html`<${Result} a=${a} b=${b} again=${again} />`}
    </details>
    <p><a href=${address({ range: {} })}>Back to the clips</a></p>
  </main>`;
}
