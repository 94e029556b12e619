// One clip: its pictures, its captions, what was measured, why it was kept, what is like it; and the votes on it.
import { html, useEffect, useState } from "./preact-htm.js";
import { get, useAnswer } from "./api.js";
import { Captions } from "./captions.js";
import { Badges, Still } from "./card.js";
import { columnLabel, count, number, plural, time, words } from "./format.js";
import { useKeys } from "./keys.js";
import { Player } from "./player.js";
import { address, changed, filters, go, noFilters, recall, remember } from "./state.js";
import { Edit, Saved, settled, useVotes, Who } from "./voting.js";

const ORDER = ["chosen", "before", "none"];

function Pairs({ of }) {
  return html`<dl class="pairs">${of.filter(([, value]) => value !== "" && value != null).map(([name, value]) => html`<dt>${name}</dt><dd><bdi>${value}</bdi></dd>`)}</dl>`;
}

function Rules({ clip }) {
  if (!clip.rules?.length) return null;
  const limit = ({ min, max, words: said }) =>
    said ? String(said) : [min != null && `≥ ${number(min)}`, max != null && `≤ ${number(max)}`].filter(Boolean).join(", ");
  return html`<section>
    <h2>${clip.kept === false ? "Why it was dropped" : clip.kept ? "Kept by every rule" : "Rules"}</h2>
    <table class="rules">
      <thead><tr><th>rule</th><th class="right">value</th><th>keeps</th></tr></thead>
      <tbody>
        ${[...clip.rules]
          .sort((a, b) => Number(a.ok) - Number(b.ok))
          .map(
            (rule) => html`<tr class=${rule.ok ? "" : "failed"}>
              <td>${rule.ok ? "✓" : "✕"} ${words(rule.name)}</td>
              <td class="right">${typeof rule.value === "number" ? number(rule.value) : html`<bdi>${rule.value == null ? "–" : String(rule.value)}</bdi>`}</td>
              <td class="soft">${limit(rule)}</td>
            </tr>`,
          )}
      </tbody>
    </table>
  </section>`;
}

function Measures({ run, clip }) {
  const entries = Object.entries(clip.scores ?? {});
  if (!entries.length) return null;
  return html`<section>
    <h2>Measures</h2>
    <dl class="scores wide">
      ${entries.map(([name, value]) => {
        const column = run.columns.find((c) => c.name === name || c.name === `score_${name}`);
        const share = column && column.max > column.min ? (100 * (value - column.min)) / (column.max - column.min) : 0;
        return html`<dt title=${name}>${columnLabel(run, column?.name ?? name)}</dt>
          <dd><span class="meter" aria-hidden="true"><i style=${{ width: `${Math.max(0, Math.min(100, share))}%` }} /></span>${number(value)}</dd>`;
      })}
    </dl>
  </section>`;
}

function Others({ title, clips, state, like }) {
  if (!clips?.length) return null;
  return html`<section>
    <h2>${title}${like && html` <a class="small" href=${address({ ...noFilters(state), view: "", clip: "", at: "", sort: "", like })}>all in the grid</a>`}</h2>
    <ul class="strip">
      ${clips.map(
        ({ id, note }) => html`<li>
          <a href=${address(changed(state, { clip: id, at: "" }))}><span class="picture"><${Still} key=${id} id=${id} alt=${`clip ${id}`} /></span><span class="soft small">${note}</span></a>
        </li>`,
      )}
    </ul>
  </section>`;
}

function People({ votes }) {
  if (!votes.length) return null;
  const said = { best: "best", bad: "all bad", edit: "edited", keep: "keep", drop: "drop" };
  return html`<section>
    <h2>Votes</h2>
    <ul class="votes">
      ${votes.map((vote) => html`<li><bdi><b>${vote.who}</b></bdi> ${said[vote.kind]} <bdi>${vote.kind === "edit" ? vote.text : (vote.model ?? "")}</bdi> <span class="soft small">${(vote.at ?? "").slice(0, 16).replace("T", " ")}</span></li>`)}
    </ul>
  </section>`;
}

// What the keys and buttons of a vote do; absent where nobody votes.
function VoteBar({ voting, captions, onNext, ahead, setAhead, onEdit }) {
  const { mine } = voting;
  const button = (key, label, kind, on, act) =>
    html`<button class=${`vote ${kind}`} aria-pressed=${on} onClick=${act}><kbd>${key}</kbd> ${label}</button>`;
  return html`<div class="votebar" role="toolbar" aria-label="Votes">
    ${captions.length > 0 && html`<span class="soft hide-narrow"><kbd>1</kbd>${captions.length > 1 && html`–<kbd>${Math.min(9, captions.length)}</kbd>`} best</span>`}
    ${button("0", "all bad", "bad", mine.caption?.kind === "bad", () => onNext(voting.cast("bad")))}
    ${button("e", "edit", "edit", mine.caption?.kind === "edit", onEdit)}
    <span class="divider" />
    ${button("k", "keep", "keep", mine.keep?.kind === "keep", () => onNext(voting.cast("keep")))}
    ${button("d", "drop", "drop", mine.keep?.kind === "drop", () => onNext(voting.cast("drop")))}
    <span class="divider" />
    ${button("u", "undo", "undo", false, () => voting.cast("undo"))}
    <label class="hide-narrow"><input type="checkbox" checked=${ahead} onChange=${(event) => setAhead(event.target.checked)} /> then the next clip</label>
    <span class="push"><${Saved} /></span>
    <button class="plain" onClick=${voting.rename} title="Change the name">${voting.who ? html`<bdi>${voting.who}</bdi>` : "who?"}</button>
  </div>`;
}

export function Clip({ run, state, canVote }) {
  const [again, setAgain] = useState(0);
  const { data: clip, error, of } = useAnswer(`api/clip/${encodeURIComponent(state.clip)}`, again);
  // Neighbours of the first clip that is asked for take a moment.
  useEffect(() => {
    if (!clip?.neighbours_pending || again > 20) return;
    const timer = setTimeout(() => setAgain(again + 1), 700);
    return () => clearTimeout(timer);
  }, [clip]);
  if (error && !clip) return html`<main class="sheet"><p class="message" role="alert">${error}</p><p class="message"><a href=${address({ ...state, clip: "" })}>Back to the clips</a></p></main>`;
  if (!clip) return html`<main class="sheet waiting" aria-busy="true" />`;
  return html`<${Shown} key=${of} run=${run} state=${state} clip=${clip} canVote=${canVote} />`;
}

function Shown({ run, state, clip, canVote }) {
  const at = state.at === undefined ? null : Number(state.at);
  const query = filters(state);
  const list = useAnswer(at === null ? null : `api/clips?${query}&offset=${at}&limit=2`);
  const voting = useVotes(clip);
  const [editing, setEditing] = useState(false);
  const [ahead, setAheadState] = useState(() => recall("ahead", false));
  const setAhead = (on) => (remember("ahead", on), setAheadState(on));
  const vs = state.vs ?? "chosen";
  const setVs = (name) => go(changed(state, { vs: name === "chosen" ? "" : name }), { replace: true });
  const show = (id, index) => id && go(changed(state, { clip: id, at: index === null ? "" : String(index) }), { replace: true });

  // The next of the list as it is now: a vote may have taken this clip out of it.
  async function along(by) {
    if (at === null || at + by < 0) return;
    const { rows } = await get(`api/clips?${query}&offset=${Math.max(0, at + Math.min(by, 0))}&limit=2`).catch(() => ({ rows: [] }));
    const still = by > 0 && rows[0]?.id === clip.id;
    const next = still ? rows[1] : rows[0];
    if (next && next.id !== clip.id) show(next.id, by < 0 ? at - 1 : still ? at + 1 : at);
  }
  const then = (voted) => voted && ahead && settled().then(() => setTimeout(() => along(1), 200)); // long enough to see it
  const back = () => go(changed(state, { clip: "" }));
  const base = voting.mine.caption?.kind === "edit" ? voting.mine.caption : null;
  const start = clip.captions.find((c) => c.model === (voting.mine.caption?.model ?? "")) ?? clip.captions.find((c) => c.chosen) ?? clip.captions[0];
  const best = (model) => then(voting.cast("best", { model }));

  useKeys("Clip", [
    { keys: ["Escape"], show: "Esc", does: "back to the grid", run: back },
    ...(at === null ? [] : [
      { keys: ["ArrowRight", "n"], show: "→ n", does: "next clip of the list", run: () => along(1) },
      { keys: ["ArrowLeft", "p"], show: "← p", does: "clip before in the list", run: () => along(-1) },
    ]),
    { keys: ["]"], show: "]", does: "next clip of its source", run: () => show(clip.after, null) },
    { keys: ["["], show: "[", does: "clip before in its source", run: () => show(clip.before, null) },
    { keys: ["c"], show: "c", does: "differences from: chosen, one before, nothing", run: () => setVs(ORDER[(ORDER.indexOf(vs) + 1) % 3]) },
  ]);
  useKeys("Votes", canVote ? [
    { keys: [..."123456789"], show: "1 – 9", does: "this caption is the best", run: (event) => {
      const caption = clip.captions[Number(event.key) - 1];
      if (caption?.text) best(caption.model);
    } },
    { keys: ["0"], show: "0", does: "all are bad", run: () => then(voting.cast("bad")) },
    { keys: ["e"], show: "e", does: "edit the caption", run: () => setEditing(true) },
    { keys: ["k"], show: "k", does: "keep the clip", run: () => then(voting.cast("keep")) },
    { keys: ["d"], show: "d", does: "drop the clip", run: () => then(voting.cast("drop")) },
    { keys: ["u"], show: "u", does: "undo my last vote on this clip", run: () => voting.cast("undo") },
    { keys: ["a"], show: "a", does: "after a vote go to the next clip, or stay", run: () => setAhead(!ahead) },
  ] : []);

  const sources = [clip.before && { id: clip.before, note: "before" }, clip.after && { id: clip.after, note: "after" }].filter(Boolean);
  const twins = [clip.duplicate_of && { id: clip.duplicate_of, note: "kept instead" }, ...(clip.duplicates ?? []).map((id) => ({ id, note: "its copy" }))].filter(Boolean);
  return html`<main class="clip">
    <header class="row clip-head">
      <button class="plain" onClick=${back}>← Clips</button>
      <h1 title=${clip.name}><bdi>${clip.name.split("/").at(-1) || clip.name}</bdi></h1>
      <span class="soft">${time(clip.start_s)} – ${time(clip.end_s)}</span>
      <span class="badges">${clip.kept && html`<span class="badge kept">kept</span>`}<${Badges} row=${clip} /></span>
      ${
        at !== null &&
        html`<span class="push row tight">
          <button onClick=${() => along(-1)} disabled=${at === 0} aria-label="Clip before in the list">‹</button>
          <span class="soft">${count(at + 1)} of ${count(list.data?.total)}</span>
          <button onClick=${() => along(1)} disabled=${list.data != null && at + 1 >= list.data.total} aria-label="Next clip in the list">›</button>
        </span>`
      }
    </header>
    <div class="halves">
      <div class="left"><${Player} clip=${clip} /><${Rules} clip=${clip} /></div>
      <div class="rightside">
        <${Captions} captions=${clip.captions} vs=${vs} onVs=${setVs} mine=${voting.mine.caption?.kind === "best" ? voting.mine.caption.model : null} onBest=${canVote ? best : null} />
        ${voting.mine.caption?.kind === "edit" && html`<article class="caption voted edited"><header class="row"><h3>edited by <bdi>${voting.who}</bdi></h3></header><p class="text" dir="auto">${voting.mine.caption.text}</p></article>`}
      </div>
    </div>
    <div class="details">
      <${Measures} run=${run} clip=${clip} />
      <section>
        <h2>Where it is from</h2>
        <${Pairs} of=${[
          ["source", clip.source],
          ["time", `${number(clip.start_s)} – ${number(clip.end_s)} s`],
          ["frames", clip.frames && `${count(clip.frames)}${clip.fps ? ` at ${number(clip.fps)} fps` : ""}`],
          ["picture", clip.width && `${clip.width} × ${clip.height}`],
          ["bucket", clip.bucket],
          ["clip", clip.id],
          ["in", clip.media?.tar && `${clip.media.tar}, bytes ${clip.media.offset}–${clip.media.offset + clip.media.size}`],
          ...Object.entries(clip.meta ?? {}),
        ]} />
        ${clip.text?.length > 0 && html`<h3>On the screen</h3><ul class="onscreen">${clip.text.map((line) => html`<li><bdi>${line}</bdi></li>`)}</ul>`}
        ${clip.provenance && html`<details><summary>Provenance</summary><pre>${JSON.stringify(clip.provenance, null, 2)}</pre></details>`}
      </section>
      <${Others} title="Its source" clips=${sources} state=${state} />
      <${Others} title=${plural(twins.length, "duplicate")} clips=${twins} state=${state} />
      <${Others} title="Looks like it" like=${clip.id} clips=${(clip.neighbours ?? []).map((n) => ({ id: n.id, note: number(n.similarity) }))} state=${state} />
      <${People} votes=${voting.votes} />
    </div>
    ${canVote && html`<${VoteBar} voting=${voting} captions=${clip.captions} onNext=${then} ahead=${ahead} setAhead=${setAhead} onEdit=${() => setEditing(true)} />`}
    ${
      editing &&
      html`<${Edit}
        text=${base?.text ?? start?.text ?? ""}
        model=${base ? "" : start?.model}
        onClose=${() => setEditing(false)}
        onSave=${(text) => (setEditing(false), then(voting.cast("edit", { model: start?.model, text })))}
      />`
    }
    ${voting.asking && html`<${Who} who=${voting.who} onName=${(name) => then(voting.name(name))} />`}
  </main>`;
}
