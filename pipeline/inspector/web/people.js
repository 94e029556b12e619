// Who has voted how much, how far they agree, and what the votes are good for.
import { html, useState } from "./preact-htm.js";
import { post, useAnswer } from "./api.js";
import { count, number, percent, plural } from "./format.js";
import { address } from "./state.js";

const QUESTIONS = { caption: "which caption", keep: "keep or drop" };

export function People({ state }) {
  const [again, setAgain] = useState(0);
  const [said, setSaid] = useState("");
  const { data, error } = useAnswer("api/votes", again);
  async function layer() {
    setSaid("…");
    try {
      const answer = await post("api/edits", {});
      setSaid(html`${Object.entries(answer.layers).map(([name, n]) => `${name}: ${plural(n, "clip")}`).join(", ")}. To choose by them: <code>${answer.next}</code>`);
      setAgain(again + 1);
    } catch (failed) {
      setSaid(failed.message);
    }
  }
  if (error) return html`<main class="sheet"><p class="message" role="alert">${error}</p></main>`;
  if (!data) return html`<main class="sheet" aria-busy="true" />`;
  const { clips, of } = data.progress;
  const most = Math.max(...data.people.map((p) => p.votes), 1);
  return html`<main class="sheet">
    <h1>Votes</h1>
    <p><progress max="1" value=${clips / (of || 1)} aria-label="Clips voted on" /> ${count(clips)} of ${count(of)} clips, ${percent(clips / (of || 1))}</p>
    ${data.people.length === 0 && html`<p class="soft">Nobody has voted yet. Open a clip and press 1 – 9 for the best caption, 0 when all are bad, e to edit, k or d to keep or drop the clip.</p>`}
    ${
      data.people.length > 0 &&
      html`<h2>People</h2>
        <dl class="scores wide">
          ${data.people.map((p) => html`<dt><bdi>${p.who}</bdi></dt><dd><span class="meter" aria-hidden="true"><i style=${{ width: `${(100 * p.votes) / most}%` }} /></span>${count(p.votes)}</dd>`)}
        </dl>`
    }
    <h2>Agreement</h2>
    <dl class="pairs">
      ${Object.entries(data.agreement).map(
        ([question, { alpha, low, high, clips: both, pairs }]) => html`<dt>${QUESTIONS[question] ?? question}</dt>
          <dd>
            ${alpha == null ? "nobody has judged the same clip as another yet" : html`α = <b>${number(alpha)}</b>${low != null && html` [${number(low)}, ${number(high)}]`} <span class="soft">over ${plural(both, "clip")}, ${plural(pairs, "pair")} of votes</span>`}
          </dd>`,
      )}
    </dl>
    <p class="soft small">Krippendorff's α with a 95 % interval: 1 is full agreement, 0 what chance would give.</p>
    <h2>Use them</h2>
    <p><a class="button" href="api/export?kind=choices" download="choices.jsonl">Export the choices</a> <span class="soft">JSON lines a selector trains on: a clip's captions and the one people chose.</span></p>
    <p><button onClick=${layer}>Make the edits a caption layer</button> <span class="soft">Edits become <code>caption:edited</code>, votes the score <code>human</code>; <code>clipmill shard</code> can choose by them.</span></p>
    ${said && html`<p role="status">${said}</p>`}
    <p><a href=${address({ ...state, view: "" })}>Back to the clips</a></p>
  </main>`;
}
