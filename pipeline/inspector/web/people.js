// Who has voted how much, how far they agree, and what the votes are good for.
import { html, useState } from "./preact-htm.js";
import { post, useAnswer } from "./api.js";
import { count, number, percent, words } from "./format.js";
import { address } from "./state.js";

function numbers(of) {
  return Object.entries(of ?? {}).filter(([, value]) => typeof value === "number" || typeof value === "string");
}

export function People({ state }) {
  const [again, setAgain] = useState(0);
  const [said, setSaid] = useState("");
  const { data, error } = useAnswer("api/votes", again);
  async function layer() {
    setSaid("…");
    try {
      const answer = await post("api/edits", {});
      setSaid(answer.message ?? `The edited captions are a layer now${answer.clips != null ? `: ${count(answer.clips)} clips` : ""}.`);
      setAgain(again + 1);
    } catch (failed) {
      setSaid(failed.message);
    }
  }
  if (error) return html`<main class="sheet"><p class="message" role="alert">${error}</p></main>`;
  if (!data) return html`<main class="sheet" aria-busy="true" />`;
  const progress = data.progress ?? {};
  const share = progress.total ? (progress.voted ?? progress.done ?? 0) / progress.total : null;
  const most = Math.max(...data.people.map((p) => p.votes), 1);
  return html`<main class="sheet">
    <h1>Votes</h1>
    ${
      share !== null &&
      html`<p><progress max="1" value=${share} aria-label="Clips voted on" /> ${count(progress.voted ?? progress.done)} of ${count(progress.total)} clips, ${percent(share)}</p>`
    }
    ${data.people.length === 0 && html`<p class="soft">Nobody has voted yet. Open a clip and press 1 – 9 for the best caption, 0 when all are bad, e to edit, k or d to keep or drop the clip.</p>`}
    ${
      data.people.length > 0 &&
      html`<h2>People</h2>
        <dl class="scores wide">
          ${data.people.map((p) => html`<dt><bdi>${p.who}</bdi></dt><dd><span class="meter" aria-hidden="true"><i style=${{ width: `${(100 * p.votes) / most}%` }} /></span>${count(p.votes)}</dd>`)}
        </dl>`
    }
    ${
      numbers(data.agreement).length > 0 &&
      html`<h2>Agreement</h2>
        <dl class="pairs">${numbers(data.agreement).map(([name, value]) => html`<dt>${words(name)}</dt><dd>${typeof value === "number" ? number(value) : value}</dd>`)}</dl>`
    }
    <h2>Use them</h2>
    <p><a class="button" href="api/export?kind=choices" download="choices.jsonl">Export the choices</a> <span class="soft">JSON lines a selector trains on: a clip's captions and the one people chose.</span></p>
    <p><button onClick=${layer}>Make the edits a caption layer</button> <span class="soft">Edited captions become <code>caption:edited</code>, which <code>clipmill shard</code> can choose.</span></p>
    ${said && html`<p role="status">${said}</p>`}
    <p><a href=${address({ ...state, view: "" })}>Back to the clips</a></p>
  </main>`;
}
