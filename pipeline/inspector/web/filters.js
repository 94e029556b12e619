// The column of filters: kept or dropped, histograms, and what the clips have, with counts; and the chips of those set.
import { html, useState } from "./preact-htm.js";
import { useAnswer } from "./api.js";
import { columnLabel, count, number } from "./format.js";
import { Histogram } from "./histogram.js";
import { changed, FILTERS, filters, go, hasFilters, noFilters, recall, remember, SEVERAL, toggled, withRange } from "./state.js";

// Histograms that come first; the first four that a run has are open from the start.
const FIRST = ["agreement", "fit", "gap", "duration_s", "score_motion", "score_sharpness"];
const NAMES = {
  q: "words", text: "like the words", like: "looks like", kept: "decision", rule: "dropped by", model: "chosen",
  has: "captioned by", flag: "flag", bucket: "bucket", source: "source", voted: "votes",
};
const VOTED = { none: "not voted on", any: "voted on", best: "best chosen", bad: "all bad", edit: "edited", keep: "keep", drop: "drop" };

export function Chips({ run, state }) {
  if (!hasFilters(state)) return null;
  const chips = [];
  for (const name of FILTERS.filter((name) => state[name]))
    if (SEVERAL.includes(name))
      for (const [k, value] of state[name].entries())
        chips.push({ label: NAMES[name], joined: k > 0, value: name === "voted" ? (VOTED[value] ?? value) : value, without: () => go(toggled(state, name, value)) });
    else {
      const value = name === "kept" ? (state.kept === "1" ? "kept" : "dropped") : state[name];
      chips.push({ label: NAMES[name], value, without: () => go(changed(state, { [name]: "", at: "" })) });
    }
  for (const [column, [low, high]] of Object.entries(state.range)) {
    const [a, b] = [low === "" ? "" : number(Number(low)), high === "" ? "" : number(Number(high))];
    const value = a && b ? `${a} – ${b}` : a ? `≥ ${a}` : `≤ ${b}`;
    chips.push({ label: columnLabel(run, column), value, without: () => go(withRange(state, column, null)) });
  }
  return html`<ul class="chips" aria-label="Filters that are set">
    ${chips.map(
      ({ label, joined, value, without }) => html`<li class=${joined ? "joined" : ""}>
        <span class="soft">${joined ? "or" : label}</span> <bdi>${value}</bdi>
        <button class="plain" onClick=${without} aria-label=${`Remove filter ${label} ${value}`}>✕</button>
      </li>`,
    )}
    ${chips.length > 1 && html`<li class="clear"><button class="plain" onClick=${() => go(noFilters(state))}>Clear all</button></li>`}
  </ul>`;
}

// Names with counts, the most first; those chosen, of which a clip has any, are let go by choosing them again.
function Facet({ state, name, counts, most = 8, search = false }) {
  const [all, setAll] = useState(false);
  const [sought, setSought] = useState("");
  const chosen = state[name] ?? [];
  let entries = Object.entries(counts).filter(([, n]) => n !== 0).sort((a, b) => b[1] - a[1]);
  for (const value of chosen) if (!counts[value] && name !== "voted") entries.unshift([value, 0]);
  if (entries.length === 0) return null;
  const many = entries.length > most;
  if (sought) entries = entries.filter(([value]) => value.toLowerCase().includes(sought.toLowerCase()));
  const top = Math.max(...entries.map(([, n]) => n), 1);
  const shown = all || sought ? entries : entries.filter(([value], k) => k < most || chosen.includes(value));
  return html`<section class="facet" role="group" aria-label=${NAMES[name]}>
    <h3>${NAMES[name]}</h3>
    ${search && many && html`<input type="search" placeholder="find …" aria-label=${`Find among: ${NAMES[name]}`} value=${sought} onInput=${(event) => setSought(event.target.value)} />`}
    <ul>
      ${shown.map(
        ([value, n]) => html`<li key=${value}>
          <button
            class="option"
            aria-pressed=${chosen.includes(value)}
            title=${value}
            onClick=${() => go(toggled(state, name, value))}
          >
            <span class="share" style=${{ width: `${(100 * n) / top}%` }} />
            <bdi>${name === "voted" ? VOTED[value] : name === "source" ? value.split("/").at(-1) : value}</bdi><span class="n">${n === null ? "" : count(n)}</span>
          </button>
        </li>`,
      )}
    </ul>
    ${many && !sought && html`<button class="plain more" onClick=${() => setAll(!all)}>${all ? "fewer" : `${count(entries.length - shown.length)} more`}</button>`}
  </section>`;
}

function Decision({ state, kept }) {
  if (!state.kept && kept?.undecided && !kept[0] && !kept[1])
    return html`<p class="soft small">Nothing is decided yet: <code>clipmill shard</code> keeps and drops.</p>`;
  const option = (value, label, n) => html`<button
    aria-pressed=${(state.kept ?? "") === value}
    onClick=${() => go(changed(state, { kept: value, at: "" }))}
  >
    ${label}${n != null && html` <span class="n">${count(n)}</span>`}
  </button>`;
  return html`<div class="segments" role="group" aria-label="decision">
    ${option("", "All")} ${option("1", "Kept", kept?.[1])} ${option("0", "Dropped", kept?.[0])}
  </div>`;
}

export function Filters({ run, state, canVote }) {
  const { data, error } = useAnswer(`api/facets?${filters(state, { sort: false })}`);
  const varied = run.columns.filter((c) => c.kind === "number" && c.min !== c.max).map((c) => c.name);
  const columns = [...new Set([...FIRST.filter((name) => varied.includes(name)), ...varied])];
  const [open, setOpen] = useState(() => recall("histograms", null) ?? columns.slice(0, 4));
  const shown = columns.filter((name) => open.includes(name) || state.range[name]);
  const keep = (names) => (setOpen(names), remember("histograms", names));
  const rest = columns.filter((name) => !shown.includes(name));
  return html`<aside class="filters" aria-label="Filters">
    <${Decision} state=${state} kept=${data?.kept} />
    <section class="measures">
      ${!error && shown.map(
        (name) => html`<div key=${name} class="measure">
          <h3>
            ${columnLabel(run, name)}
            ${!state.range[name] && html`<button class="plain push faint" title="Hide this histogram" aria-label=${`Hide the histogram of ${columnLabel(run, name)}`} onClick=${() => keep(open.filter((n) => n !== name))}>✕</button>`}
            ${state.range[name] && html`<button class="plain push" onClick=${() => go(withRange(state, name, null))}>reset</button>`}
          </h3>
          <${Histogram} run=${run} state=${state} column=${name} />
        </div>`,
      )}
      ${
        rest.length > 0 &&
        html`<select aria-label="Show another histogram" value="" onChange=${(event) => (keep([...open, event.target.value]), (event.target.value = ""))}>
          <option value="">+ another measure …</option>
          ${rest.map((name) => html`<option value=${name}>${columnLabel(run, name)}</option>`)}
        </select>`
      }
    </section>
    ${error && html`<p class="soft small">${error}</p>`}
    ${
      data &&
      html`
        <${Facet} state=${state} name="rule" counts=${data.rules} />
        <${Facet} state=${state} name="flag" counts=${data.flags} />
        <${Facet} state=${state} name="model" counts=${data.models} />
        <${Facet} state=${state} name="has" counts=${data.has ?? Object.fromEntries(run.models.map((m) => [m.name, m.clips]))} />
        <${Facet} state=${state} name="bucket" counts=${data.buckets} />
        <${Facet} state=${state} name="source" counts=${data.sources} search=${true} />
        ${canVote && html`<${Facet} state=${state} name="voted" counts=${Object.fromEntries(Object.keys(VOTED).map((kind) => [kind, null]))} />`}
      `
    }
  </aside>`;
}
