// Two runs side by side: what changed, clip by clip.
import { html } from "./preact-htm.js";
import { useAnswer } from "./api.js";
import { Text } from "./captions.js";
import { Still } from "./card.js";
import { count, number, plural, words } from "./format.js";
import { address, changed, go } from "./state.js";

const PAGE = 30;
const CHANGES = { caption: "other caption", kept: "now kept", dropped: "now dropped", scores: "other scores", new: "new", gone: "gone" };

// The scores that moved most, of their size.
function Scores({ scores }) {
  const by = ([, [a, b]]) => Math.abs(b - a) / (Math.abs(a) + Math.abs(b) || 1);
  const moved = Object.entries(scores ?? {}).sort((x, y) => by(y) - by(x)).slice(0, 6);
  if (!moved.length) return null;
  return html`<p class="small">${moved.map(
    ([name, [a, b]]) => html`<span class="moved"><span class="soft">${words(name)}</span> ${number(a)} → <b>${number(b)}</b></span> `,
  )}</p>`;
}

function Side({ side, from, title }) {
  if (!side) return html`<div class="soft">not in ${title}</div>`;
  return html`<div>
    <p class="row small"><bdi class="soft">${side.model ?? "–"}</bdi> ${side.kept !== false ? html`<span class="badge kept">kept</span>` : html`<span class="badge drop">${(side.dropped_by ?? []).map(words).join(", ") || "dropped"}</span>`}</p>
    <${Text} text=${side.caption} from=${from} />
  </div>`;
}

export function Compare({ run, state }) {
  const page = Number(state.page ?? 0);
  const query = `api/compare?change=${state.change ?? ""}&offset=${page * PAGE}&limit=${PAGE}`;
  const { data, error, loading } = useAnswer(query);
  if (error) return html`<main class="sheet"><p class="message" role="alert">${error}</p></main>`;
  if (!data) return html`<main class="sheet" aria-busy="true" />`;
  const pages = Math.ceil(data.total / PAGE);
  const turn = (to) => html`<button disabled=${to < 0 || to >= pages} onClick=${() => go(changed(state, { page: to ? String(to) : "" }))}>${to < page ? "‹ before" : "next ›"}</button>`;
  const names = { a: run.name, b: run.other?.name ?? "the other run" };
  return html`<main class="sheet" aria-busy=${loading}>
    <h1>What changed</h1>
    <p class="soft">From <b><bdi>${names.a}</bdi></b> to <b><bdi>${names.b}</bdi></b>: <ins>words that are new</ins>, <del>words that are gone</del>.</p>
    <div class="segments" role="group" aria-label="Kind of change">
      <button aria-pressed=${!state.change} onClick=${() => go(changed(state, { change: "", page: "" }))}>All</button>
      ${Object.entries(CHANGES)
        .filter(([name]) => data.counts?.[name])
        .map(([name, label]) => html`<button aria-pressed=${state.change === name} onClick=${() => go(changed(state, { change: name, page: "" }))}>${label} <span class="n">${count(data.counts[name])}</span></button>`)}
    </div>
    ${data.rows.length === 0 && html`<p class="message">Nothing changed.</p>`}
    <ol class="changes">
      ${data.rows.map(
        ({ id, change, a, b, scores }) => html`<li key=${id}>
          <a class="picture" href=${change === "new" ? undefined : address({ range: {}, clip: id })} aria-label=${`clip ${id}`}><${Still} id=${id} run=${change === "new" ? "other" : ""} /><span class="length">${CHANGES[change] ?? change}</span></a>
          <div>
            <div class="sides">
              <${Side} side=${a} title=${names.a} />
              <${Side} side=${b} title=${names.b} from=${a?.caption && b?.caption ? a.caption : null} />
            </div>
            <${Scores} scores=${scores} />
          </div>
        </li>`,
      )}
    </ol>
    ${pages > 1 && html`<p class="row center">${turn(page - 1)}<span class="soft">${count(page + 1)} of ${plural(pages, "page")}</span>${turn(page + 1)}</p>`}
    <p><a href=${address({ range: {} })}>Back to the clips</a></p>
  </main>`;
}
