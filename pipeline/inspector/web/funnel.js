// The funnel: what each rule of the run takes, one after the other, and alone.
import { html } from "./preact-htm.js";
import { useAnswer } from "./api.js";
import { count, number, percent, words } from "./format.js";
import { address, changed } from "./state.js";

function limits(rule) {
  if (rule.words) return Array.isArray(rule.words) ? rule.words.join(", ") : String(rule.words);
  const [low, high] = [rule.min, rule.max];
  if (low != null && high != null) return `${number(low)} – ${number(high)}`;
  return low != null ? `≥ ${number(low)}` : high != null ? `≤ ${number(high)}` : "";
}

export function Funnel({ run, state }) {
  const { data, error } = useAnswer("api/funnel");
  if (error) return html`<p class="message" role="alert">${error}</p>`;
  const rules = Array.isArray(data) ? data : (data?.rules ?? run.rules);
  const all = run.counts.clips;
  const bare = { range: {} };
  const bar = (left, taken) => html`<span class="flow" aria-hidden="true">
    <i class="left" style=${{ width: `${(100 * left) / (all || 1)}%` }} /><i class="taken" style=${{ width: `${(100 * taken) / (all || 1)}%` }} />
  </span>`;
  return html`<main class="sheet">
    <h1>The funnel</h1>
    <p class="soft">Rules in the order of the recipe. A clip is kept when no rule takes it; open a rule to see its clips.</p>
    <div class="wide">
      <table>
        <thead>
          <tr><th>rule</th><th>keeps</th><th class="right">takes here</th><th class="right">takes alone</th><th class="right">left</th><th class="growing hide-narrow"></th></tr>
        </thead>
        <tbody>
          <tr><td>found</td><td /><td /><td /><td class="right">${count(all)}</td><td class="hide-narrow">${bar(all, 0)}</td></tr>
          ${rules.map(
            (rule) => html`<tr>
              <td><a href=${address(changed(bare, { rule: rule.name }))}>${words(rule.name)}</a></td>
              <td class="soft">${rule.column && rule.column !== rule.name ? words(rule.column) + " " : ""}${limits(rule)}</td>
              <td class="right">${count(rule.in_order)}</td>
              <td class="right">${count(rule.alone)}</td>
              <td class="right">${count(rule.left)}</td>
              <td class="hide-narrow">${bar(rule.left, rule.in_order)}</td>
            </tr>`,
          )}
          <tr class="total">
            <td><a href=${address(changed(bare, { kept: "1" }))}>kept</a></td><td /><td /><td />
            <td class="right">${count(run.counts.kept)}</td><td class="soft hide-narrow">${percent(run.counts.kept / (all || 1))} of the clips</td>
          </tr>
        </tbody>
      </table>
    </div>
    <p><a href=${address({ ...state, view: "" })}>Back to the clips</a></p>
  </main>`;
}
