// The page of `clipmill inspect`: its header, its routes, its theme.
import { html, render, useEffect, useRef, useState } from "./preact-htm.js";
import { Blind } from "./ab.js";
import { carried, get, useAnswer } from "./api.js";
import { Changed } from "./changed.js";
import { Clip } from "./clip.js";
import { Compare } from "./compare.js";
import { Chips, Filters } from "./filters.js";
import { columnLabel, count, percent } from "./format.js";
import { Funnel } from "./funnel.js";
import { Grid } from "./grid.js";
import { Help, useKeys } from "./keys.js";
import { People } from "./people.js";
import { address, changed, go, parse, recall, remember, useAddress } from "./state.js";

const SORTS = [
  ["", "as in the run"],
  ["agreement", "lowest agreement first"],
  ["fit", "lowest visual fit first"],
  ["-gap", "biggest gap between models"],
  ["-flag_count", "most flags"],
  ["random", "random"],
  ["source", "by source"],
];
const WIDTHS = [170, 230, 310, 440]; // of a card, pixels

function Sort({ run, state }) {
  const sort = state.sort ?? "";
  const known = new Set(SORTS.map(([name]) => name));
  const has = new Set(run.columns.map((c) => c.name));
  const columns = run.columns.filter((c) => c.kind === "number");
  const listed = SORTS.filter(([name]) => ["", "random", "source"].includes(name) || has.has(name.replace(/^-/, "")));
  const set = (value) => go(changed(state, { sort: value === "random" ? `random:${1 + Math.floor(Math.random() * 9999)}` : value, at: "" }));
  return html`<label class="sort"><span class="sr">Sort</span>
    <select value=${sort.startsWith("random") ? "random" : sort} onChange=${(event) => set(event.target.value)}>
      ${listed.map(([name, label]) => html`<option value=${name}>${name === "" && state.like ? "most alike first" : label}</option>`)}
      <optgroup label="Low to high">${columns.filter((c) => !known.has(c.name)).map((c) => html`<option value=${c.name}>${columnLabel(run, c.name)} ↑</option>`)}</optgroup>
      <optgroup label="High to low">${columns.filter((c) => !known.has("-" + c.name)).map((c) => html`<option value=${"-" + c.name}>${columnLabel(run, c.name)} ↓</option>`)}</optgroup>
    </select>
    ${sort.startsWith("random") && html`<button onClick=${() => set("random")} aria-label="Shuffle again" title="Shuffle again">↻</button>`}
  </label>`;
}

// Words are sought while they are typed; one step of the history for all of them.
function Search({ run, state }) {
  const input = useRef(null);
  const timer = useRef(0);
  const [meaning, setMeaning] = useState(Boolean(state.text));
  const name = meaning ? "text" : "q";
  const typed = useRef(false);
  // What a search by meaning takes is loaded while the words are being typed.
  useEffect(() => void (meaning && !carried && get("api/warm").catch(() => {})), [meaning]);
  useEffect(() => {
    if (document.activeElement !== input.current) input.current.value = state.text ?? state.q ?? "";
    if (state.text || state.q) setMeaning(Boolean(state.text));
  }, [state.text, state.q]);
  function seek(now = false, as = name) {
    clearTimeout(timer.current);
    timer.current = setTimeout(
      () => {
        go(changed(parse(location.hash), { q: "", text: "", [as]: input.current.value.trim(), at: "", clip: "", view: "" }), { replace: typed.current });
        typed.current = true;
      },
      now ? 0 : as === "text" ? 450 : 180,
    );
  }
  return html`<form class="search" role="search" onSubmit=${(event) => (event.preventDefault(), seek(true))}>
    <input
      ref=${input}
      type="search"
      dir="auto"
      maxlength="500"
      aria-label=${meaning ? "Clips like these words" : "Words in captions, names and on the screen"}
      placeholder=${meaning ? "clips like these words …" : "words in captions …"}
      onInput=${() => seek()}
      onBlur=${() => (typed.current = false)}
      onKeyDown=${(event) => event.key === "Escape" && input.current.blur()}
    />
    ${
      !carried &&
      run.can?.text !== false &&
      html`<button
        type="button"
        aria-pressed=${meaning}
        title="Search by meaning, with the sentence embedding, instead of by the words themselves"
        onClick=${() => (setMeaning(!meaning), input.current.value.trim() && seek(true, meaning ? "q" : "text"))}
      >by meaning</button>`
    }
  </form>`;
}

function nextTheme(theme) {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  return dark ? "light" : "dark";
}

function App() {
  const state = parse(useAddress());
  const [asked, askAgain] = useState(0);
  const { data: run, error } = useAnswer("api/run", asked);
  // While the captions are being read, what is made of them is missing: look again until it is there.
  const reading = run?.reading && !run.reading.done && !run.reading.failed ? run.reading : null;
  useEffect(() => {
    if (!reading) return;
    const timer = setTimeout(() => askAgain(asked + 1), error ? 3000 : run.counts.clips > 50_000 ? 2500 : 500);
    return () => clearTimeout(timer);
  }, [run, error, asked]);
  const [theme, setTheme] = useState(() => recall("theme", ""));
  const [size, setSize] = useState(() => recall("size", 1));
  const [help, setHelp] = useState(false);
  const [drawer, setDrawer] = useState(false); // on narrow screens the filters lie over the grid
  const [found, setFound] = useState({ total: null });
  useEffect(() => {
    if (theme) document.documentElement.dataset.theme = theme;
    remember("theme", theme);
  }, [theme]);
  useEffect(() => remember("size", size), [size]);
  useEffect(() => void (document.title = run ? `${run.name} · clipmill inspector` : "clipmill inspector"), [run]);
  const switchTheme = () => setTheme(nextTheme(theme));
  const resize = (by) => setSize((s) => Math.max(0, Math.min(WIDTHS.length - 1, s + by)));
  const inGrid = !state.clip && !state.view;
  useKeys("Everywhere", [
    { keys: ["?"], show: "?", does: "these keys", run: () => setHelp(true) },
    { keys: ["/"], show: "/", does: "search", run: () => document.querySelector(".search input")?.select() },
    { keys: ["f"], show: "f", does: "filters, on a narrow screen", run: () => inGrid && setDrawer(!drawer) },
    { keys: ["+", "="], show: "+", does: "larger cards", run: () => resize(1) },
    { keys: ["-"], show: "-", does: "smaller cards", run: () => resize(-1) },
    { keys: ["t"], show: "t", does: "light or dark", run: switchTheme },
    ...(state.clip || inGrid ? [] : [{ keys: ["Escape"], show: "Esc", does: "back to the clips", run: () => go(changed(state, { view: "", clip: "" })) }]),
  ]);

  if (error && !run) return html`<p class="message" role="alert">${error}</p>`;
  if (!run) return html`<p class="boot">Opening the run …</p>`;
  const canVote = !carried && run.voting !== false;
  const grown = `${run.columns.length} ${Boolean(reading)}`; // what may be asked for: asked anew when it grows
  const link = (view, label) => html`<a href=${address(changed(state, { view, clip: "", at: state.at }))} aria-current=${(state.view ?? "") === view && !state.clip ? "page" : undefined}>${label}</a>`;
  const main = state.clip
    ? html`<${Clip} run=${run} state=${state} canVote=${canVote} />`
    : state.view === "funnel" ? html`<${Funnel} run=${run} state=${state} />`
    : state.view === "ab" && canVote ? html`<${Blind} run=${run} state=${state} />`
    : state.view === "votes" && canVote ? html`<${People} state=${state} />`
    : state.view === "compare" && run.other ? html`<${Compare} run=${run} state=${state} />`
    : html`<div class=${drawer ? "browse open" : "browse"}>
        <${Filters} key=${grown} run=${run} state=${state} canVote=${canVote} />
        <button class="veil" aria-label="Close the filters" onClick=${() => setDrawer(false)} tabindex="-1" />
        <main class="found">
          <div class="bar row">
            <button class="narrow" aria-expanded=${drawer} onClick=${() => setDrawer(!drawer)}>Filters</button>
            <span class="total" role="status"><b>${count(found.total)}</b> of ${count(run.counts.clips)} clips</span>
            ${found.ms != null && html`<span class="soft small hide-narrow">${Math.max(1, Math.round(found.ms))} ms</span>`}
            ${state.text && found.loading && html`<span class="soft small late" role="status">looking by meaning; the first time what reads the words is loaded …</span>`}
            ${reading && html`<span class="soft small">reading captions: ${percent(Math.min(reading.captions, reading.words) / (reading.of || 1))}</span>`}
            ${run.reading?.failed && html`<span class="small failed" role="alert">${run.reading.failed}</span>`}
            <${Chips} run=${run} state=${state} />
            <span class="push row tight">
              <${Sort} run=${run} state=${state} />
              <span class="row tight hide-narrow"><button onClick=${() => resize(-1)} disabled=${size === 0} aria-label="Smaller cards">−</button><button onClick=${() => resize(1)} disabled=${size === WIDTHS.length - 1} aria-label="Larger cards">+</button></span>
            </span>
          </div>
          <${Grid} key=${grown} state=${state} cardWidth=${WIDTHS[size]} onFound=${setFound} />
        </main>
      </div>`;
  return html`<div class=${state.clip ? "app one" : "app"}>
    <header class="top">
      <a class="name" href="#" title=${run.uri}><b>clipmill</b> <bdi>${run.name}</bdi></a>
      <${Search} run=${run} state=${state} />
      <nav aria-label="Views">
        ${link("", "Clips")} ${link("funnel", "Funnel")} ${canVote && link("ab", "Blind A/B")} ${canVote && link("votes", "Votes")} ${run.other && link("compare", "Compare")}
      </nav>
      <span class="row tight">
        <button class="plain" onClick=${switchTheme} aria-label="Light or dark" title="Light or dark  t">◐</button>
        <button class="plain" onClick=${() => setHelp(true)} aria-label="Keys" title="Keys  ?">?</button>
      </span>
    </header>
    ${!carried && html`<${Changed} run=${run} />`}
    ${main}
    ${help && html`<${Help} onClose=${() => setHelp(false)} />`}
  </div>`;
}

render(html`<${App} />`, document.getElementById("app"));
